"""What training adds to PPO against plain formulations: prediction, reconstruction, recall, novelty, bf16."""

import copy
import json
from pathlib import Path

import canonical
import numpy as np
import pytest
import textbook
import torch
from canonical import BASE, GRADIENT_TOLERANCE, assert_close, excess
from test_exactness import unsettle
from test_faults import command
from torch import Tensor

import evaluate
from auxiliary import Novelty, Reconstruction, auxiliary_tasks, embedded_candidates
from environments.section import Schedule
from model import Output
from run.config import check_config
from tests.walk import ACTIONS, SHOWN, constant, walk
from trainer import PPOTrainer
from utils import UserError

ROOT = Path(__file__).parent.parent
STATED = {
    Path(model["path"]).name: model["statistics"]
    for model in json.loads((ROOT / "docs" / "results" / "models.json").read_text())["models"]
}


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
        loss, told, possible = textbook.frame_prediction(own, questions, embedded, distinct, following_frames)
    if task.vector:
        moments = trainer.model.moments
        vectors = [None if i is None else store.vectors[i].double() for i in following]
        normal = [v if v is None else textbook.normalise(v, moments.mean, moments.variance) for v in vectors]
        loss = loss + textbook.vector_prediction(own, questions, normal)
    return loss, told / len(samples), possible / len(samples), following.count(None) / len(samples)


@pytest.mark.parametrize(("shown", "actions"), [*zip(SHOWN, ACTIONS, strict=True)])
def test_prediction_is_the_textbooks(sampled, shown, actions):
    """Loss, shares, and gradients by outputs, embedded frames and own weights."""
    trainer = sampled(check_config(walk(shown, actions), "test"))
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
        found, reported = task.loss(Output(None, None, None, output, []), batch, candidates)
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


def test_episodes_of_one_step(started):
    """Where every episode ends at once there is nothing to predict: no loss, and nothing that is not finite."""
    trainer = started(check_config(walk("both", "one branch", {"longest": 1}), "test"))
    for scalars in (trainer.train_update(), trainer.train_update()):
        assert scalars["losses/prediction"] == 0 and all(np.isfinite(value) for value in scalars.values())
        assert scalars["training/prediction_accuracy"] == 0


@pytest.mark.parametrize(("encoding", "length"), (("learned", 1), ("relative", 4)))
def test_bf16_computes_the_same_but_for_rounding(sampled, encoding, length):
    """Losses and gradients of a minibatch are close to those of float32, and not equal."""
    changes = {"transformer": {"positional_encoding": encoding}, "segment_length": length, "recall_coefficient": 0.1}
    changes["clip_range_schedule"] = constant(0.2)  # far from where the loss has a kink
    trainer = sampled(check_config(walk("both", "branches", **changes), "test"))
    samples = next(trainer.buffer.minibatches(np.random.default_rng(1)))
    modules, found = (trainer.model, trainer.auxiliary), []
    weights = [copy.deepcopy(module.state_dict()) for module in modules]
    for trainer.dtype in (torch.float32, torch.bfloat16):
        for module, state in zip(modules, weights, strict=True):
            module.load_state_dict(state)
        found.append(trainer._train_minibatch(samples))
    assert (found[0] != found[1]).any()
    torch.testing.assert_close(*found, rtol=0.05, atol=0.02)


def test_reconstruction_has_the_size_of_the_frame():
    for size in ((84, 84), (36, 36), (40, 64), (37, 51)):
        model = canonical.build(BASE | {"visual": True}, (3, *size))
        assert Reconstruction(model)(torch.randn(2, model.transformer.embed_dim)).shape == (2, 3, *size)
    with pytest.raises(UserError, match="needs frames"):
        config = canonical.product_config(BASE | {"reconstruction_coefficient": 0.1})
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


# ----------------------------------------------------------------------------------------------------- what is learned


def evaluated(folder: Path, model: Path, *arguments: str) -> dict:
    """Return what evaluate.py writes of a model."""
    command(folder, str(model), "--output=found", "--cpu", *arguments, program=evaluate)
    return json.loads((folder / "found.json").read_text())["models"][0]


@pytest.mark.slow
def test_poc_memory_env_is_learned(tmp_path):
    """From scratch to success in at least 95 of 100 unseen episodes by 40,960 steps (seed 1, the least steady)."""
    command(tmp_path, f"--config={ROOT}/configs/poc_memory_env.yaml", "--updates=20", "--seed=1", "--cpu")
    model = evaluated(tmp_path, Path("models/poc_memory_env.nn"), "--seeds=100", "--repetitions=1")
    assert model["run"]["steps"] == 40_960 and model["statistics"]["success"]["mean"] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", STATED)
def test_shipped_model_is_as_good_as_stated(name, tmp_path):
    """On 50 unseen seeds × 5, the mean reward lies within the interval of docs/results/models.json."""
    model = evaluated(tmp_path, ROOT / "models" / name)
    reward = STATED[name]["reward"]
    assert reward["low"] <= model["statistics"]["reward"]["mean"] <= reward["high"]
