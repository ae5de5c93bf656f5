"""Prediction of the next observation, for every kind of observation and action, against the plain formulation."""

import gymnasium
import numpy as np
import pytest
import textbook
import torch
from canonical import excess
from gymnasium import spaces
from run.lifecycle import state_of
from run.report import update_scalars
from test_exactness import GRADIENT_TOLERANCE, assert_close, unsettle
from torch import Tensor

from auxiliary import NextObservation
from model import Categorical, Prediction
from run.config import check_config
from trainer import Options, PPOTrainer

SIDE, LONGEST = 5, 12
FRAME = spaces.Box(0, 255, (SIDE, SIDE, 1), np.uint8)
VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
SHOWN = {"frames": FRAME, "vectors": VECTOR, "both": spaces.Dict(frame=FRAME, vector=VECTOR)}
ACTIONS = {
    "one branch": spaces.Discrete(4),
    "branches": spaces.MultiDiscrete([3, 2]),
    "continuous": spaces.Box(-2, 2, (2,), np.float32),
}


class Walk(gymnasium.Env):
    """Walks about a small torus; shows where that is, as a frame, and numbers of very different sizes."""

    def __init__(self, shown, actions, longest=LONGEST):
        self.observation_space, self.action_space, self.longest = SHOWN[shown], ACTIONS[actions], longest

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.age = self.np_random.integers(SIDE, size=2), 0
        self.end = int(self.np_random.integers(1, 2 * self.longest))
        return self.observe(), {}

    def step(self, action):
        way = np.floor(np.resize(action, 2)).astype(int)
        self.place, self.age = (self.place + way + self.np_random.integers(2, size=2)) % SIDE, self.age + 1
        return self.observe(), 1.0, self.age >= self.end, self.age >= self.longest, {}

    def observe(self):
        frame = np.zeros(FRAME.shape, dtype=np.uint8)
        frame[(*self.place, 0)] = 200
        vector = np.array([self.place[0], 100 + 30 * self.place[1], self.age / 100], dtype=np.float32)
        parts = {"frame": frame, "vector": vector}
        if self.observation_space is FRAME:
            return frame
        return vector if self.observation_space is VECTOR else parts


gymnasium.register("Walk-v0", Walk)


def config(shown: str, actions: str, arguments: dict | None = None, **changes) -> dict:
    """Return a config of the walk that trains in moments."""
    schedule = {"initial": 1e-3, "final": 1e-3, "max_decay_steps": 10}
    arguments = {"shown": shown, "actions": actions} | (arguments or {})
    environment = {"type": "Gymnasium", "name": "tests.test_prediction:Walk-v0", "arguments": arguments}
    transformer = {"num_blocks": 2, "embed_dim": 16, "num_heads": 2, "memory_length": 8, "positional_encoding": ""}
    return {
        "environment": environment | {"max_episode_steps": LONGEST},
        "updates": 4,
        "epochs": 1,
        "n_workers": 4,
        "worker_steps": 16,
        "n_mini_batch": 4,
        "hidden_layer_size": 8,
        "prediction_coefficient": 0.5,
        "normalize_observations": shown != "frames",
        "transformer": transformer | changes.pop("transformer", {}),
        "learning_rate_schedule": schedule,
        "beta_schedule": schedule,
        "clip_range_schedule": schedule,
    } | changes


def behind(trainer: PPOTrainer, samples: np.ndarray) -> list[int | None]:
    """Return which stored observation followed each sample, None where the episode ended."""
    buffer, found = trainer.buffer, []
    for worker, t in zip(*np.divmod(samples, buffer.worker_steps), strict=True):
        last = t + 1 == buffer.worker_steps
        index = buffer.last_index[worker] if last else buffer.observation_index[worker, t + 1]
        ended = buffer.terminated[worker, t] or buffer.truncated[worker, t]
        found.append(None if ended else int(index))
    return found


def expected_loss(
    trainer: PPOTrainer, samples: np.ndarray, own: dict[str, Tensor], output: Tensor, embedded: Tensor
) -> tuple[Tensor, float, float]:
    """Return the textbook's loss of samples, and the shares of next frames that are told and that could be."""
    buffer, task = trainer.buffer, trainer.task
    store, following = buffer.observations, behind(trainer, samples)
    actions = buffer.actions.flatten(0, 1)[samples]
    questions = textbook.question(own, task.continuous > 0, output, actions)
    loss, told, possible = torch.zeros((), dtype=torch.float64), 0, 0
    if task.frame is not None:
        frames = [frame.numpy().tobytes() for frame in store.frames.frames[: len(store.frames)]]
        seen = sorted({int(index) for index in buffer.frame_index().flat[samples]})
        next_frames = [None if i is None else frames[store.frame_index(np.array([i]))[0]] for i in following]
        distinct = [frames[index] for index in seen]
        loss, told, possible = textbook.frame_prediction(own, questions, embedded, distinct, next_frames)
    if task.vector:
        moments = trainer.model.moments
        vectors = [None if i is None else store.vectors[i].double() for i in following]
        normal = [v if v is None else textbook.normalise(v, moments.mean, moments.variance) for v in vectors]
        loss = loss + textbook.vector_prediction(own, questions, normal)
    return loss, told / len(samples), possible / len(samples)


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("shown", SHOWN)
def test_prediction_is_the_textbooks(sampled, monkeypatch, shown, actions):
    """Loss, shares, and gradients by outputs, embedded frames and own weights, in one part and in two."""
    monkeypatch.setattr("kernels.store.MANY_FRAMES", 0)  # so that frames are filled up
    trainer = sampled(check_config(config(shown, actions), "test"))
    task, coverage = trainer.auxiliary["prediction"], []
    unsettle(task, 0)
    for number, samples in enumerate(trainer.buffer.minibatches(np.random.default_rng(1))):
        batch = trainer.buffer.minibatch(samples)
        batch.targets["prediction"] = task.targets(trainer.buffer, samples, batch.candidates)
        output = torch.randn(len(samples), 16, generator=torch.Generator().manual_seed(number), requires_grad=True)
        embedded = trainer.model.embed(batch.observations).detach().requires_grad_()
        own = {name: p.detach().double().requires_grad_() for name, p in task.named_parameters()}
        plain = [tensor.detach().double().requires_grad_() for tensor in (output, embedded)]
        frames = plain[1][: batch.distinct]
        expected, told, possible = expected_loss(trainer, samples, own, plain[0], frames)
        leaves = [*own.values(), *plain]
        gradients = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
        for parts in (1, 2):
            found, shares = torch.zeros(()), torch.zeros(2)
            for part in batch.split(parts):
                prediction = Prediction(Categorical([]), torch.zeros(0), output[:0], output[rows(batch, part)], [])
                loss, reported = task.loss(prediction, part, embedded, part.targets["prediction"])
                share = len(part) / len(samples)
                found = found + share * loss
                shares += share * torch.stack((*reported[1:], *shares[len(reported) - 1 :]))
                assert torch.equal(reported[0], loss)
            assert_close(found, expected)
            if shown != "vectors":
                assert_close(shares, torch.tensor([told, possible]))
            inputs = [*task.parameters(), output, embedded]
            computed = torch.autograd.grad(found, inputs, allow_unused=True, materialize_grads=True)
            for name, one, other in zip((*own, "output", "embedded"), computed, gradients, strict=True):
                assert excess(one, other, **GRADIENT_TOLERANCE) <= 1, name
        coverage.append((np.mean([index is None for index in behind(trainer, samples)]), 1 - possible))
    ended, left_out = np.mean(coverage, axis=0)
    assert 0 < ended < 0.5 and (shown == "vectors" or ended < left_out < 0.9)


def rows(batch, part) -> np.ndarray:
    """Return the places in a minibatch of the samples of a part of it."""
    return np.searchsorted(batch.samples, part.samples)


# -------------------------------------------------------------------------------------------------- what is reported


def hand_made(trainer: PPOTrainer, target: list[int]) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
    """Return the loss of samples that say frames 0, 1, 2, 0 of three, by what was to be said; reports, gradients."""
    task: NextObservation = trainer.auxiliary["prediction"]
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.zero_()
        task.query.weight.copy_(torch.eye(16))
    batch = trainer.buffer.minibatch(np.arange(4))
    batch.distinct, embedded = 3, torch.eye(16)[:3].requires_grad_()
    output = 50 * embedded.detach()[[0, 1, 2, 0]]
    prediction = Prediction(Categorical([]), torch.zeros(0), output[:0], output, [])
    loss, reported = task.loss(prediction, batch, embedded, {"frame": torch.tensor(target)})
    return loss, reported, torch.autograd.grad(loss, [embedded, *task.parameters()])


@pytest.mark.parametrize(
    ("target", "told", "possible", "accuracy"),
    [([0, 1, 1, -1], 2, 3, 2 / 3), ([0, -1, -1, -1], 1, 1, 1), ([1, 2, -1, 2], 0, 3, 0), ([-1] * 4, 0, 0, 0)],
)
def test_accuracy(sampled, target, told, possible, accuracy):
    """The share of next frames that are told, of those that could be; where none could, 0 and no gradient."""
    trainer = sampled(check_config(config("frames", "one branch"), "test"))
    loss, reported, gradients = hand_made(trainer, target)
    assert [round(4 * float(share)) for share in reported[1:]] == [told, possible]
    assert all(torch.isfinite(gradient).all() for gradient in gradients) and (possible or not loss)
    assert any(gradient.any() for gradient in gradients) == (possible > 0)
    names = [*trainer.reports, *trainer.optimizer.modules, "all"]
    statistics = torch.zeros(2, len(names))  # of another minibatch in which nothing could be told, too
    for name, share in zip(("predicted", "predictable"), reported[1:], strict=True):
        statistics[0, names.index(name)] = share
    scalars = update_scalars(trainer, statistics, np.ones(2))
    assert scalars["training/prediction_accuracy"] == pytest.approx(accuracy)
    tags = {tag for tag in scalars if "predict" in tag}
    assert tags == {"losses/prediction", "training/prediction_accuracy", "gradients/prediction"}


@pytest.mark.parametrize("shown", SHOWN)
def test_episodes_of_one_step(sampled, shown):
    """Where every episode ends at once there is nothing to predict: no loss, and nothing that is not finite."""
    trainer = sampled(check_config(config(shown, "one branch", {"longest": 1}), "test"))
    scalars = trainer.train_update()
    assert scalars["losses/prediction"] == 0 and all(np.isfinite(value) for value in scalars.values())
    assert scalars.get("training/prediction_accuracy", 0) == 0


# ------------------------------------------------------------------------------------------- together with everything


@pytest.mark.parametrize(
    ("actions", "transformer", "changes"),
    [
        ("branches", {"gtrxl": True, "positional_encoding": "learned", "query_position": True}, {}),
        ("one branch", {"positional_encoding": "relative", "layer_norm": "post"}, {"recall_coefficient": 0.1}),
        ("continuous", {"positional_encoding": "absolute", "query_position": True}, {}),
    ],
)
@pytest.mark.parametrize("precision", ("float32", "bf16"))
def test_it_is_learned_with_everything_else(sampled, precision, actions, transformer, changes):
    """With gates, positions, recall and bf16: the loss falls."""
    settings = config("both", actions, transformer=transformer, epochs=4, **changes)
    settings["learning_rate_schedule"] = settings["beta_schedule"] | {"initial": 1e-2}
    trainer = sampled(check_config(settings, "test"))
    trainer.options.precision = precision
    first, *_, last = [trainer.train_update()["losses/prediction"] for _ in range(8)]
    assert last < 0.8 * first


@pytest.mark.parametrize("shown", ("both", "vectors"))
def test_resumed_to_the_bit(tmp_path, shown):
    """A run that is interrupted and resumed ends as one that was not: weights, task, optimiser and statistics."""
    settings, ends = config(shown, "branches", recall_coefficient=0.1 * (shown == "both")), []
    for stops in ((4,), (2, 4)):
        state = None
        for stop in stops:
            options = Options(torch.device("cpu"), folder=tmp_path)
            trainer = PPOTrainer(check_config(settings, "test"), "test", 3, options, state)
            trainer.start_workers()
            try:
                scalars = [trainer.train_update() for _ in range(stop - trainer.update)][-1]
            finally:
                trainer.workers.close()
            state = state_of(trainer)
        ends.append((state, {tag: value for tag, value in scalars.items() if not tag.startswith("performance/")}))
    (one, curve), (other, resumed_curve) = ends
    assert curve == resumed_curve
    for part in ("weights", "auxiliary"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(tensor, other[part][name]) for name, tensor in one[part].items())
    moments = [state["optimizer"]["state"][0]["exp_avg"] for state in (one, other)]
    assert torch.equal(*moments) and torch.equal(one["memory"], other["memory"])
