"""What training adds to PPO against plain formulations: prediction, reconstruction, recall, novelty, bf16."""

import copy
import json
import platform
import subprocess
import sys
from pathlib import Path

import canonical
import numpy as np
import pytest
import textbook
import torch
from canonical import BASE, excess
from test_exactness import GRADIENT_TOLERANCE, TOLERANCE, assert_close, unsettle
from torch import Tensor
from torch.nn import functional
from walk import ACTIONS, SHOWN, walk

from auxiliary import Novelty, Reconstruction, auxiliary_tasks, embedded_candidates
from environments.section import Schedule
from kernels.frames import FrameCrossEntropy
from model import Output
from run.config import check_config
from trainer import PPOTrainer
from utils import UserError

ROOT = Path(__file__).parent.parent
STATED = {
    Path(model["path"]).name: model["statistics"]
    for model in json.loads((ROOT / "docs" / "results" / "models.json").read_text())["models"]
}


def constant(value: float) -> dict:
    return {"initial": value, "final": value, "max_decay_steps": 1}


def output_of(tensor: Tensor) -> Output:
    """Return as much of a model's output as auxiliary tasks read."""
    return Output(None, None, None, tensor, [])


# --------------------------------------------------------------------------------------------------------- prediction


def expected_loss(
    trainer: PPOTrainer, samples: np.ndarray, own: dict[str, Tensor], output: Tensor, embedded: Tensor
) -> tuple[Tensor, float, float, float]:
    """Return the textbook's loss of samples, and the shares that are told, that could be, and after which it ended."""
    buffer, task, store, following = trainer.buffer, trainer.task, trainer.buffer.observations, []
    for worker, t in zip(*np.divmod(samples, buffer.worker_steps), strict=True):
        last = t + 1 == buffer.worker_steps
        index = buffer.last_index[worker] if last else buffer.observation_index[worker, t + 1]
        ended = buffer.terminated[worker, t] or buffer.truncated[worker, t]
        following.append(None if ended else int(index))
    questions = textbook.question(own, task.continuous > 0, output, buffer.actions.flatten(0, 1)[samples])
    loss, told, possible = torch.zeros((), dtype=torch.float64), 0, 0
    if task.frame is not None:
        frames = [frame.numpy().tobytes() for frame in store.frames.frames[: len(store.frames)]]
        seen = sorted({int(index) for index in buffer.frame_index().flat[samples]})
        following_frames = [None if i is None else frames[store.frame_index(np.array([i]))[0]] for i in following]
        distinct = [frames[index] for index in seen]
        candidates = embedded[: len(distinct)]
        loss, told, possible = textbook.frame_prediction(own, questions, candidates, distinct, following_frames)
    if task.vector:
        moments = trainer.model.moments
        vectors = [None if i is None else store.vectors[i].double() for i in following]
        normal = [v if v is None else textbook.normalise(v, moments.mean, moments.variance) for v in vectors]
        loss = loss + textbook.vector_prediction(own, questions, normal)
    return loss, told / len(samples), possible / len(samples), following.count(None) / len(samples)


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("shown", SHOWN)
def test_prediction_is_the_textbooks(sampled, monkeypatch, shown, actions):
    """Loss, shares, and gradients by outputs, embedded frames and own weights."""
    trainer = sampled(check_config(walk(shown, actions), "test"))
    monkeypatch.setattr("kernels.store.MANY_FRAMES", 0)  # so that frames are filled up
    task, coverage = trainer.tasks["prediction"], []
    unsettle(task, 0)
    for number, samples in enumerate(trainer.buffer.minibatches(np.random.default_rng(1))):
        batch = trainer.buffer.minibatch(samples)
        output = torch.randn(len(samples), 16, generator=torch.Generator().manual_seed(number), requires_grad=True)
        embedded = trainer.model.embed(batch.observations).detach().requires_grad_()
        own = {name: p.detach().double().requires_grad_() for name, p in task.named_parameters()}
        plain = [tensor.detach().double().requires_grad_() for tensor in (output, embedded)]
        expected, *shares, ended = expected_loss(trainer, samples, own, *plain)
        candidates = embedded if shown == "vectors" else embedded_candidates(trainer.ranks, batch, embedded)
        found, reported = task.loss(output_of(output), batch, candidates)
        assert_close(found, expected)
        assert_close(torch.stack(reported), torch.tensor([expected.item(), *shares][: len(task.reports)]))
        settings = {"allow_unused": True, "materialize_grads": True}
        gradients = torch.autograd.grad(expected, [*own.values(), *plain], **settings)
        computed = torch.autograd.grad(found, [*task.parameters(), output, embedded], **settings)
        for name, one, other in zip((*own, "output", "embedded"), computed, gradients, strict=True):
            assert excess(one, other, **GRADIENT_TOLERANCE) <= 1, name
        coverage.append((ended, 1 - shares[1]))
    ended, left_out = np.mean(coverage, axis=0)
    assert 0 < ended < 0.5 and (shown == "vectors" or ended < left_out < 0.9)


@pytest.mark.parametrize(
    ("target", "told", "possible", "accuracy"),
    [([0, 1, 1, -1], 2, 3, 2 / 3), ([1, 2, -1, 2], 0, 3, 0), ([-1] * 4, 0, 0, 0)],
)
def test_accuracy(sampled, monkeypatch, target, told, possible, accuracy):
    """The share of next frames that are told, of those that could be; where none could, 0 and no gradient."""
    trainer = sampled(check_config(walk("frames", "one branch"), "test"))
    task, candidates = trainer.tasks["prediction"], torch.eye(16)[:3].requires_grad_()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.zero_()
        task.query.weight.copy_(torch.eye(16))
    monkeypatch.setattr(task, "next_frame", lambda batch: torch.tensor(target))
    output = 50 * candidates.detach()[[0, 1, 2, 0]]  # says frames 0, 1, 2 and 0
    loss, reported = task.loss(output_of(output), trainer.buffer.minibatch(np.arange(4)), candidates)
    gradients = torch.autograd.grad(loss, [candidates, *task.parameters()])
    assert [round(4 * float(share)) for share in reported[1:]] == [told, possible]
    assert all(torch.isfinite(gradient).all() for gradient in gradients) and (possible or not loss)
    assert any(gradient.any() for gradient in gradients) == (possible > 0)
    statistics = torch.zeros(2, len(trainer.tags))  # of another minibatch in which nothing could be told, too
    for name, share in zip(("predicted", "predictable"), reported[1:], strict=True):
        statistics[0, trainer.tags.index(f"losses/{name}")] = share
    scalars = trainer._scalars(statistics, np.ones(2))
    assert scalars["training/prediction_accuracy"] == pytest.approx(accuracy)
    tags = {tag for tag in scalars if "predict" in tag}
    assert tags == {"losses/prediction", "training/prediction_accuracy", "gradients/prediction"}


@pytest.mark.parametrize("shown", SHOWN)
def test_episodes_of_one_step(sampled, shown):
    """Where every episode ends at once there is nothing to predict: no loss, and nothing that is not finite."""
    trainer = sampled(check_config(walk(shown, "one branch", {"longest": 1}), "test"))
    scalars = trainer.train_update()
    assert scalars["losses/prediction"] == 0 and all(np.isfinite(value) for value in scalars.values())
    assert scalars.get("training/prediction_accuracy", 0) == 0


@pytest.mark.parametrize(
    ("actions", "transformer", "precision"),
    [
        ("branches", {"gtrxl": True, "positional_encoding": "learned", "query_position": True}, "float32"),
        ("one branch", {"positional_encoding": "relative", "layer_norm": "post"}, "bf16"),
        ("continuous", {"positional_encoding": "absolute", "query_position": True}, "bf16"),
    ],
)
def test_it_is_learned_with_everything_else(sampled, actions, transformer, precision):
    """With gates, positions, recall and bf16: the loss falls."""
    changes = {"epochs": 4, "recall_coefficient": 0.1, "learning_rate_schedule": constant(1e-2)}
    trainer = sampled(check_config(walk("both", actions, transformer=transformer, **changes), "test"))
    trainer.options.precision = precision
    first, *_, last = [trainer.train_update()["losses/prediction"] for _ in range(5)]
    assert last < 0.8 * first


@pytest.mark.parametrize("length", (1, 4))
@pytest.mark.parametrize("encoding", ("learned", "relative"))
def test_bf16_computes_the_same_but_for_rounding(sampled, encoding, length):
    """Losses and gradients of a minibatch are close to those of float32, and not equal."""
    changes = {"transformer": {"positional_encoding": encoding}, "segment_length": length, "recall_coefficient": 0.1}
    changes["clip_range_schedule"] = constant(0.2)  # far from where the loss has a kink
    trainer = sampled(check_config(walk("both", "branches", **changes), "test"))
    samples = next(trainer.buffer.minibatches(np.random.default_rng(1)))
    modules, found = (trainer.model, trainer.auxiliary), []
    weights = [copy.deepcopy(module.state_dict()) for module in modules]
    for precision in ("float32", "bf16"):
        for module, state in zip(modules, weights, strict=True):
            module.load_state_dict(state)
        trainer.options.precision = precision
        found.append(trainer._train_minibatch(samples))
    assert (found[0] != found[1]).any()
    torch.testing.assert_close(*found, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("size", ((84, 84), (36, 36), (40, 64), (37, 51)))
def test_reconstruction_is_that_of_transposed_convolutions(size):
    """The decoder and its loss, both rearranged, against PyTorch's own: loss and gradients."""
    model = canonical.build(BASE | {"visual": True}, (3, *size))
    decoder = Reconstruction(model)
    unsettle(decoder, 0)
    frames = torch.randint(0, 256, (7, 3, *size), dtype=torch.uint8)
    which = torch.randint(0, 7, (35,))  # more than are taken at once
    output = torch.randn(35, model.transformer.embed_dim)
    plain = copy.deepcopy(decoder).double()
    x = functional.relu(plain.hidden(output.double())).view(-1, 64, *plain.sizes[3])
    x = functional.relu(plain.deconv3(x, output_size=plain.sizes[2]))
    x = functional.relu(plain.deconv2(x, output_size=plain.sizes[1]))
    logits = plain.deconv1(x, output_size=plain.sizes[0])
    expected = functional.binary_cross_entropy_with_logits(logits, frames[which].double() / 255)
    loss = FrameCrossEntropy.apply(decoder(output), frames, which) / logits.numel()
    (3 * expected).backward()
    (3 * loss).backward()
    assert excess(loss, expected, relative=1e-5, floor=TOLERANCE) <= 1
    for (name, parameter), other in zip(decoder.named_parameters(), plain.parameters(), strict=True):
        assert excess(parameter.grad, other.grad, **GRADIENT_TOLERANCE) <= 1, name


def test_reconstruction_can_be_left_out():
    """There is no decoder where its loss has no weight; for vectors there is none, and it says so."""
    given = BASE | {"visual": True}
    for coefficient, tasks in ((0.0, set()), (0.1, {"reconstruction"})):
        config = canonical.product_config(given | {"reconstruction_coefficient": coefficient})
        assert set(auxiliary_tasks(config, canonical.build(given, (3, 36, 36)))) == tasks
    with pytest.raises(UserError, match="needs frames"):
        auxiliary_tasks(config, canonical.build(BASE, (5,)))


# -------------------------------------------------------------------------------------------------- recall and novelty


def test_recall_targets(sampled):
    """A frame is to be recalled if the episode has shown it, where the whole episode lies in rollout and memory."""
    trainer = sampled(check_config(walk("frames", "one branch", recall_coefficient=0.5), "test"))
    buffer = trainer.buffer
    samples = next(buffer.minibatches(np.random.default_rng(1)))
    shown, known = trainer.tasks["recall"].targets(buffer.minibatch(samples))
    frames = sorted({int(buffer.observation_index.flat[sample]) for sample in samples})
    assert shown.shape == (len(samples), len(frames)) and 0 < known.float().mean() < 1
    for row, (w, t) in enumerate(zip(*np.divmod(samples, buffer.worker_steps), strict=True)):
        step = int(buffer.step[w, t])
        assert known[row] == (step <= min(t, trainer.config.transformer.memory_length))
        if known[row]:
            episode = {int(buffer.observation_index[w, earlier]) for earlier in range(t - step, t)}
            assert [int(target) for target in shown[row]] == [int(frame in episode) for frame in frames]


def test_recall_teaches_the_encoder_about_the_past(sampled):
    """The loss of a step reaches the encoding of a frame that only an earlier step saw; PPO's does not."""
    trainer = sampled(check_config(walk("frames", "one branch", recall_coefficient=0.5), "test"))
    embedded = trainer.model.embed(trainer.buffer.observations.frames.frames[:2].permute(0, 3, 1, 2))
    embedded.retain_grad()
    trainer.tasks["recall"](torch.randn(1, embedded.shape[1]), embedded)[0, 1].backward()
    assert embedded.grad[0].abs().sum() == 0 and embedded.grad[1].abs().sum() > 0


def test_novelty_is_paid_once_per_episode(sampled):
    """For what the running episode has not shown yet, the start included; what is reported stays the task's."""
    trainer = sampled(check_config(walk("frames", "one branch", novelty_schedule=constant(100)), "test"))
    buffer = trainer.buffer
    for w, t in np.ndindex(buffer.n_workers, buffer.worker_steps - 1):
        begun = t - int(buffer.step[w, t])
        if begun >= 0:  # else a part of the episode lies before this rollout
            earlier = set(buffer.observation_index[w, begun : t + 1].tolist())
            ended = buffer.terminated[w, t] or buffer.truncated[w, t]
            new = not ended and int(buffer.observation_index[w, t + 1]) not in earlier
            assert (buffer.rewards[w, t] > 50) == new
    trainer.episodes.collect()
    rewards = [episode["reward"] for episode in trainer.episodes.latest]
    assert rewards and max(rewards) < 50


def test_novelty_remembers_what_it_did_not_pay_for():
    novelty = Novelty(Schedule(initial=0.0, final=1.0, max_decay_steps=1), n_workers=1)
    novelty.begin(0, b"start")
    shown = ((b"first", 0), (b"first", 1), (b"second", 1))
    assert [novelty.bonus(range(1), [digest], np.array([False]), update)[0] for digest, update in shown] == [0, 0, 1]


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


# ----------------------------------------------------------------------------------------------------- what is learned


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
