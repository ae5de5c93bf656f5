"""What training adds to PPO, the benchmark's arithmetic and command line, and that the smallest task is learned."""

import copy
import json
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import benchmark
from auxiliary import Novelty
from environments.section import Schedule
from run.config import Config, check_config, load_config
from trainer import Options, PPOTrainer

ROOT = Path(__file__).parent.parent
STATED = {
    Path(model["path"]).name: model["statistics"]
    for model in json.loads((ROOT / "docs" / "results" / "models.json").read_text())["models"]
}
MINIGRID = {"type": "Minigrid", "name": "MiniGrid-MemoryS7-v0"}


def tiny(name: str, **changes) -> Config:
    """Return a shipped config scaled down to a fraction of a second."""
    config = load_config(ROOT / "configs" / f"{name}.yaml").model_dump()
    config["transformer"] |= {"embed_dim": 32, "num_blocks": 2, "memory_length": 16} | changes.pop("transformer", {})
    config |= {"n_workers": 4, "worker_steps": 32, "n_mini_batch": 2, "epochs": 1, "hidden_layer_size": 16}
    return check_config(config | changes, "test")


def copied_weights(trainer: PPOTrainer) -> list[tuple[torch.nn.Module, dict]]:
    """Return a copy of all that an optimiser step changes, by what holds it."""
    return [(module, copy.deepcopy(module.state_dict())) for module in (trainer.model, trainer.auxiliary)]


def put_back(weights: list[tuple[torch.nn.Module, dict]]) -> None:
    """Let modules have weights of `copied_weights` again."""
    for module, state in weights:
        module.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("poc_memory_env", "learned"), ("minigrid", "absolute"), ("searing_spotlights", ""), ("mystery_path", "relative")],
)
def test_bf16_computes_the_same_but_for_rounding(sampled, name, encoding):
    trainer = sampled(tiny(name, transformer={"positional_encoding": encoding, "query_position": False}), seed=4)
    samples = next(trainer.buffer.minibatches(np.random.default_rng(1)))
    weights = copied_weights(trainer)
    expected = trainer._train_minibatch(samples, 0.1, 0.001)
    put_back(weights)
    trainer.options.precision = "bf16"
    found = trainer._train_minibatch(samples, 0.1, 0.001)
    assert (found != expected).any()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("poc_memory_env", {}),
        ("cartpole_masked", {}),
        ("minigrid_published", {"recall_coefficient": 0.5, "reconstruction_coefficient": 0.5}),
    ],
)
@pytest.mark.parametrize("parts", (2, 3))
def test_parts_of_a_minibatch(sampled, monkeypatch, name, changes, parts):
    """Parts, differentiated side by side, give the losses and gradients of the whole, and the same ones every time.

    Parts see the minibatch's frames filled up to a multiple, the whole does not.
    """
    trainer = sampled(tiny(name, **changes))
    lanes = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))
    samples = next(trainer.buffer.minibatches(np.random.default_rng(1)))
    weights, results = copied_weights(trainer), []
    trainer.optimizer.max_grad_norm = np.inf
    for divided, map_parts in ((parts, lanes.map), (parts, lanes.map), (1, map)):
        trainer.parts, trainer.map_parts = divided, map_parts
        monkeypatch.setattr("kernels.store.MANY_FRAMES", 0 if divided == parts else 512)
        put_back(weights)
        losses = trainer._train_minibatch(samples, 0.1, 0.001)
        results.append((losses, trainer.optimizer.weights.grad.clone()))
    parted, again, whole = results
    assert len(trainer.buffer.minibatch(samples).split(parts)) == parts
    for found, same, expected in zip(parted, again, whole, strict=True):
        assert torch.equal(found, same)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_recall_targets(sampled):
    trainer = sampled(tiny("minigrid_published", recall_coefficient=0.5))
    buffer = trainer.buffer
    samples = next(buffer.minibatches(np.random.default_rng(1)))
    found = trainer.auxiliary["recall"].targets(buffer, samples, buffer.minibatch(samples).candidates)
    targets, known = found["shown"], found["known"]
    frames = sorted({int(buffer.observation_index.flat[sample]) for sample in samples})
    assert targets.shape == (len(samples), len(frames)) and 0 < known.float().mean() < 1
    for row, sample in enumerate(samples):
        w, t = divmod(int(sample), buffer.worker_steps)
        step = int(buffer.step[w, t])
        if not known[row]:
            assert step > t or step > trainer.config.transformer.memory_length
            continue
        episode = {int(buffer.observation_index[w, earlier]) for earlier in range(t - step, t)}
        assert [int(target) for target in targets[row]] == [int(frame in episode) for frame in frames]


def test_recall_teaches_the_encoder_about_the_past(sampled):
    """The loss of a step reaches the encoding of a frame that only an earlier step saw; PPO's does not."""
    trainer = sampled(tiny("minigrid_published", recall_coefficient=0.5))
    frames = trainer.buffer.observations.frames.frames[:2].permute(0, 3, 1, 2)
    embedded = trainer.model.embed(frames)
    embedded.retain_grad()
    output = torch.randn(1, embedded.shape[1])
    trainer.auxiliary["recall"](output, embedded)[0, 1].backward()
    assert embedded.grad[0].abs().sum() == 0 and embedded.grad[1].abs().sum() > 0


def test_novelty_is_paid_once_per_episode(sampled):
    schedule = {"initial": 10.0, "final": 10.0, "power": 1.0, "max_decay_steps": 1}
    trainer = sampled(tiny("minigrid_published", novelty_schedule=schedule))
    buffer = trainer.buffer
    for w in range(buffer.n_workers):
        for t in range(buffer.worker_steps - 1):
            begun = t - int(buffer.step[w, t])
            if begun < 0:  # part of the episode lies in front of this rollout
                continue
            earlier = set(buffer.observation_index[w, begun : t + 1].tolist())
            ended = buffer.terminated[w, t] or buffer.truncated[w, t]
            new = not ended and int(buffer.observation_index[w, t + 1]) not in earlier
            assert (buffer.rewards[w, t] > 5) == new
    reported = [info["reward"] for info in trainer.finished]
    assert reported and max(reported) <= 1  # statistics stay those of the task


def test_novelty_remembers_what_it_did_not_pay_for():
    novelty = Novelty(Schedule(initial=0.0, final=1.0, max_decay_steps=1), n_workers=1)
    novelty.begin(0, b"start")
    shown = ((b"first", 0), (b"first", 1), (b"second", 1))
    assert [novelty.bonus(range(1), [digest], np.array([False]), update)[0] for digest, update in shown] == [0, 0, 1]


@pytest.mark.parametrize("name, relative", (("cartpole_masked_published", 0), ("cartpole_masked", 1)))
def test_operations_are_counted_from_the_shapes(sampled, name, relative):
    trainer = sampled(tiny(name))
    buffer, samples, dim, hidden, blocks, epochs = trainer.buffer, 128, 32, 16, 2, 1
    trainer.update += 1  # count_operations looks at the update before
    dense = blocks * (5 + 12) * dim**2 + 2 * dim * hidden + 2 * hidden
    encoder, embedding = 4 * dim, dim**2
    seen = np.minimum(buffer.step, 16).mean()
    attention = 2 * blocks * dim * seen
    sampling = samples * (dense + attention) + len(buffer.observations) * (encoder + embedding)
    training = epochs * samples * (3 * dense + 2 * attention + 3 * embedding + 2 * encoder)
    # Scores by distance for each sample, a table of 17 distances for the rollout and each of two minibatches.
    positions = relative * blocks * (dim * seen * 4 * samples + 17 * dim**2 * (1 + 2 * 2))
    assert benchmark.count_operations(trainer) == pytest.approx(2 * (sampling + training + positions))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--updates=1", "--cpu", "--processes=1", "--overlap=on", "--profile"],
        ["--updates=1", "--device=cpu", "--attention=textbook", "--overlap=off"],
        ["--updates=1", "--cpu", "--precision=bf16", "--overlap=auto"],
        ["--environments"],
    ],
)
def test_benchmark(arguments, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny("minigrid_published").model_dump()))
    command = [sys.executable, ROOT / "benchmark.py", "--config=tiny.yaml", "--output=found.json", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    rates = {name: value for name, value in found.items() if "steps/s" in name or name.endswith("per_second")}
    assert len(rates) >= 3 and all(rate > 0 for rate in rates.values())
    shares = [value for name, value in found.items() if name.startswith("share:")]
    assert not shares or sum(shares) == pytest.approx(1, abs=0.01)


def test_benchmark_takes_allowed_actions():
    """Forbidden actions give way to the first allowed one of their branch, others stay."""
    masks = np.array([[True, True, False, True, True], [False, True, False, False, True]])
    actions = np.array([[0, 0], [0, 2]])
    assert benchmark.permitted(actions, masks, (2, 3)).tolist() == [[0, 1], [1, 2]]
    assert benchmark.permitted(actions, None, (2, 3)) is actions


@pytest.mark.parametrize("name", ("mystery_path_grid_published", "mortar_mayhem_grid"))
def test_textbook_benchmark_does_the_same_work(name):
    """The textbook formulation samples and learns what the fast one does."""
    trainers = [PPOTrainer(tiny(name), "test", 3, Options(torch.device("cpu"))) for _ in range(2)]
    benchmark.use_textbook_formulation(trainers[1])
    statistics = []
    for trainer in trainers:
        trainer.start_workers()
        trainer.sample()
        trainer.workers.close()
        statistics.append(trainer._train_minibatch(np.arange(trainer.samples), 0.1, 0.001))
    assert torch.equal(*(trainer.buffer.actions for trainer in trainers))
    torch.testing.assert_close(*statistics, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    """A tensor that is freed and made again soon costs no page faults any more."""
    code = """
import kernels.allocator, resource, torch
kernels.allocator.keep_memory()
faults = []
for _ in range(100):
    torch.ones(2**22)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-21])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16  # eight huge pages each would be 160


def test_benchmark_help():
    done = subprocess.run([sys.executable, ROOT / "benchmark.py", "--help"], capture_output=True, text=True)
    lines = done.stdout.rstrip("\n").split("\n")
    assert done.returncode == 0 and any("python benchmark.py --config" in line for line in lines)
    assert len(lines) <= 24 and max(map(len, lines)) <= 80


@pytest.mark.slow
def test_poc_memory_env_is_learned(tmp_path):
    """From scratch to success in at least 95 of 100 unseen episodes by 40,960 steps (seed 1, the least steady)."""
    command = [sys.executable, ROOT / "train.py", f"--config={ROOT}/configs/poc_memory_env.yaml", "--updates=20"]
    assert subprocess.run([*command, "--seed=1", "--cpu"], cwd=tmp_path).returncode == 0
    command = [sys.executable, ROOT / "evaluate.py", "models/poc_memory_env.nn", "--output=found", "--cpu"]
    assert subprocess.run([*command, "--seeds=100", "--repetitions=1"], cwd=tmp_path).returncode == 0
    (model,) = json.loads((tmp_path / "found.json").read_text())["models"]
    assert model["run"]["steps"] == 40_960 and model["statistics"]["success"]["mean"] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", STATED)
def test_shipped_model_is_as_good_as_stated(name, tmp_path):
    """On 50 unseen seeds × 5, the mean reward lies within the interval of docs/results/models.json."""
    command = [sys.executable, ROOT / "evaluate.py", ROOT / "models" / name, "--output=found", "--cpu"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    (model,) = json.loads((tmp_path / "found.json").read_text())["models"]
    reward = STATED[name]["reward"]
    assert reward["low"] <= model["statistics"]["reward"]["mean"] <= reward["high"]
