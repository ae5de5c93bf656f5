"""The product's rearranged mathematics against the plain formulation of `textbook.py`, over whole rollouts.

A `History` keeps every step that every worker ever took and predicts each from its own window in float64. The product
keeps a timeline, folds projections into queries, lets queries share columns and stores frames once. Both must agree in
what they predict while sampling, in what training recomputes, and in every gradient.
"""

import copy
import multiprocessing
from collections.abc import Iterator

import canonical
import numpy as np
import pytest
import textbook
import torch
import xxhash
from canonical import BASE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from auxiliary import Reconstruction, auxiliary_tasks
from buffer import generalised_advantages
from kernels import gating, products
from kernels.frames import FrameCrossEntropy
from kernels.groups import group_queries
from kernels.store import FrameStore
from kernels.windows import MASKED, Windows
from memory import STRETCH, ObservationStore, Timeline, policy_step
from model import Categorical, Prediction
from run.config import check_config
from trainer import Options, PPOTrainer
from utils import UserError, create_env, training_seed
from worker import SharedArrays

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # of outputs, absolute
GRADIENT_TOLERANCE = {"relative": 1e-4, "floor": 1e-6}
ENCODINGS = ("", "absolute", "learned", "relative")
VARIANTS = [
    pytest.param(
        {"gtrxl": gtrxl, "layer_norm": norm, "positional_encoding": encoding},
        id=f"{'gtrxl' if gtrxl else 'trxl'}-{norm or 'nonorm'}-{encoding or 'none'}",
    )
    for gtrxl in (False, True)
    for norm in ("pre", "post", "")
    for encoding in ENCODINGS
]
every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)


def assert_close(found: Tensor, expected: Tensor, what: object = "", tolerance: float = TOLERANCE) -> None:
    assert canonical.excess(found, expected, 0, tolerance) <= 1, what


def unsettle(model: nn.Module, seed: int) -> None:
    """Moves every weight, so that biases and norms, which start as zeros and ones, count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def compare(prediction: Prediction, expected: textbook.Step, what: object) -> None:
    """Requires that a prediction of the product is the textbook's."""
    for found, branch in zip(prediction.policy.log_probs, expected.log_softmaxes, strict=True):
        assert_close(found, branch, what)
    assert_close(prediction.value, expected.value, what)
    assert_close(prediction.inputs.transpose(0, 1), expected.memory, what)
    assert_close(prediction.output, expected.output, what)


class History:
    """Every step that every worker ever took, remembered and predicted the textbook's way.

    Args:
        config: flat.
        n_workers: number of workers.
    """

    def __init__(self, config: dict, n_workers: int) -> None:
        self.config = config
        nothing = torch.zeros(0, config["num_blocks"], config["embed_dim"], dtype=torch.float64)
        self.items = [nothing] * n_workers
        self.starts: list[list[bool]] = [[] for _ in range(n_workers)]

    def windows(self, samples: list[tuple[int, int]], final: bool = False) -> textbook.Windows:
        """Returns the windows of (worker, index in its history); with `final`, of what followed that step."""
        parts = [
            textbook.windows_from_history(
                self.items[worker], self.starts[worker], self.config["memory_slots"], [index], final
            )
            for worker, index in samples
        ]
        return textbook.Windows(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def predict(self, parameters: dict, observations: Tensor, windows: textbook.Windows) -> textbook.Step:
        return textbook.forward(
            parameters, self.config, textbook.encode(parameters, self.config, observations), *windows
        )

    def begin(self, starts: np.ndarray) -> list[tuple[int, int]]:
        """Begins one step of every worker where none has begun; returns (worker, index in its history) of each."""
        for own, items, starting in zip(self.starts, self.items, starts.tolist(), strict=True):
            if len(own) == len(items):
                own.append(starting)
            assert own[-1] == starting
        return [(worker, len(own) - 1) for worker, own in enumerate(self.starts)]

    @torch.no_grad()
    def take(self, parameters: dict, observations: Tensor, starts: np.ndarray) -> textbook.Step:
        """Takes one step in every worker, from observations (W, …), and remembers it."""
        taken = self.predict(parameters, observations, self.windows(self.begin(starts)))
        self.items = [torch.cat((items, new[None])) for items, new in zip(self.items, taken.memory, strict=True)]
        return taken


class Rollouts:
    """A model and its timeline, driven as the trainer drives them, and the plain history of the same steps.

    Args:
        changes: to BASE.
        n_workers, worker_steps: the size of a rollout.
        ends: the probability that an episode ends at a step; it also ends after `max_episode_steps`.
        seed: of weights, observations and ends.
    """

    def __init__(
        self, changes: dict, n_workers: int = 3, worker_steps: int = 12, ends: float = 0.12, seed: int = 0
    ) -> None:
        self.config = BASE | changes
        self.n_workers, self.worker_steps, self.ends = n_workers, worker_steps, ends
        torch.manual_seed(seed)
        task = canonical.product_task(self.config, (5,))
        self.model = canonical.build(self.config, (5,))
        with torch.no_grad():
            for block in self.model.transformer.blocks:  # so that attention is far from uniform
                block.attention.query.weight.mul_(3)
                block.attention.key.weight.mul_(3)
        settings = canonical.product_config(self.config).transformer
        self.timeline = Timeline(self.model, settings, n_workers, worker_steps, CPU)
        self.in_place = self.timeline.in_place  # whether windows may be read where they lie
        self.store = ObservationStore(task, self.config["embed_dim"], n_workers * worker_steps, CPU)
        self.arrays = SharedArrays(n_workers, task, multiprocessing)
        self.generator = np.random.default_rng(seed)
        self.history = History(self.config, n_workers)
        self.now = np.zeros(n_workers, dtype=np.int64)
        self.played = 0
        # Of the latest rollout, (W, T, …)
        self.step = np.zeros((n_workers, worker_steps), dtype=np.int64)
        self.observations = torch.zeros(n_workers, worker_steps, task.vector)
        self.values = torch.zeros(n_workers, worker_steps)

    def play(self, check: bool = True, change: tuple[int, int] | None = None) -> None:
        """Plays one rollout under new weights; every prediction is compared with the textbook's.

        Args:
            check: whether to.
            change: worker and t whose observation is another than it would have been.
        """
        self.timeline.roll(self.worker_steps)
        self.store.clear()
        self.played += 1
        unsettle(self.model, self.played)
        parameters = canonical.parameters(self.model)
        half = (self.n_workers + 1) // 2
        for t in range(self.worker_steps):
            shown = self.generator.standard_normal((self.n_workers, *self.observations.shape[2:])).astype(np.float32)
            if change is not None and change[1] == t:
                shown[change[0]] += 1
            for worker, observation in enumerate(shown):
                self.arrays.show(worker, observation)
            self.observations[:, t], self.step[:, t] = torch.from_numpy(shown), self.now
            predictions = []
            self.timeline.in_place = self.in_place and t % 2 == 0  # both ways of attending write the same memory
            for rows in (slice(0, half), slice(half, self.n_workers)):
                if rows.start < rows.stop:
                    step = self.now[rows].copy()
                    prediction, *_ = policy_step(
                        self.model, self.model, self.timeline, self.store, self.arrays, rows, t, step
                    )
                    self.values[rows, t] = prediction.value
                    predictions.append((rows, prediction))
            if check:
                expected = self.history.take(parameters, self.observations[:, t], self.now == 0)
                for rows, prediction in predictions:
                    compare(prediction, _rows(expected, rows), f"rollout {self.played}, step {t}")
            ended = self.generator.random(self.n_workers) < self.ends
            ended |= self.now + 1 == self.config["max_episode_steps"]
            self.now = np.where(ended, 0, self.now + 1)

    def predict(self, samples: np.ndarray, per_group: int | None) -> Prediction:
        """Returns what training predicts for samples w·T + t, in groups or, with None, from windows in place."""
        self.timeline.in_place = per_group is None
        worker, t = np.divmod(samples, self.worker_steps)
        view = self.timeline.view(self.timeline.group(worker, t, self.step[worker, t], per_group))
        embedded, step = self.model.embed(self.observations[worker, t]), torch.from_numpy(self.step[worker, t])
        return self.model(self.model.complete(embedded, None, step), view)

    def check_training(self, samples: np.ndarray, per_groups: tuple[int, ...] = (1, 3, 8)) -> None:
        """Requires that training's outputs and gradients are the textbook's, for samples w·T + t of the rollout."""
        worker, t = np.divmod(samples, self.worker_steps)
        parameters = canonical.parameters(self.model)
        first = len(self.history.starts[0]) - self.worker_steps
        windows = self.history.windows(list(zip(worker.tolist(), (first + t).tolist(), strict=True)))
        expected = self.history.predict(parameters, self.observations[worker, t], windows)
        weights = torch.Generator().manual_seed(len(samples))
        shapes = [branch.shape for branch in expected.log_softmaxes] + [expected.value.shape]
        weights = [torch.randn(shape, generator=weights) for shape in shapes]
        _weighted([*expected.log_softmaxes, expected.value], weights).backward()
        for per_group in (*per_groups, None) if self.in_place else per_groups:
            what = f"{len(samples)} samples, {per_group} per group"
            self.model.zero_grad()
            prediction = self.predict(samples, per_group)
            compare(prediction, expected, what)
            _weighted([*prediction.policy.log_probs, prediction.value], weights).backward()
            assert_gradients(self.model, parameters, what)

    def check_minibatches(self) -> None:
        """Requires the same of minibatches of one, of an odd number and of all samples."""
        order = self.generator.permutation(self.n_workers * self.worker_steps)
        for samples in (order[:1], order[1:8], np.sort(order)):
            self.check_training(samples)


def _rows(step: textbook.Step, rows: slice) -> textbook.Step:
    return textbook.Step([branch[rows] for branch in step.log_softmaxes], *(tensor[rows] for tensor in step[1:]))


def _weighted(outputs: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Returns a scalar whose gradient reaches every parameter."""
    weighted = [(output * weight).sum() for output, weight in zip(outputs, weights, strict=True)]
    return torch.stack(weighted).sum() / len(outputs[-1])


def assert_gradients(model: nn.Module, parameters: dict, what: object = "") -> None:
    """Requires that the product's gradients are those of the textbook's parameters."""
    found = canonical.gradients(model)
    assert found.keys() == parameters.keys()
    for name, gradient in found.items():
        assert canonical.excess(gradient, parameters[name].grad, **GRADIENT_TOLERANCE) <= 1, (name, what)


# ------------------------------------------------------------------------------------------------------- rollouts


@pytest.mark.parametrize("changes", VARIANTS)
def test_rollouts_with_short_memory(changes):
    """Memory shorter than rollouts and episodes, which end anywhere; weights change between rollouts."""
    rollouts = Rollouts(changes)
    for _ in range(2):
        rollouts.play()
        rollouts.check_minibatches()


@pytest.mark.parametrize("layer_norm", ("pre", "post", ""))
@every_encoding
def test_rollouts_with_long_memory(encoding, layer_norm):
    """Memory longer than a rollout and than some episodes: windows reach two rollouts back."""
    changes = {"positional_encoding": encoding, "layer_norm": layer_norm, "memory_slots": 17, "num_blocks": 3}
    rollouts = Rollouts(changes, n_workers=4, worker_steps=7, ends=0.03, seed=1)
    for _ in range(4):
        rollouts.play()
    assert rollouts.step[:, 0].max() > 2 * rollouts.worker_steps
    rollouts.check_minibatches()


@every_encoding
def test_memory_longer_than_any_episode(encoding):
    changes = {"positional_encoding": encoding, "memory_slots": 40, "max_episode_steps": 9}
    rollouts = Rollouts(changes, worker_steps=11, ends=0.05, seed=2)
    for _ in range(2):
        rollouts.play()
    rollouts.check_minibatches()


@pytest.mark.parametrize("gtrxl", (False, True))
@pytest.mark.parametrize("encoding", ("absolute", "learned", "relative"))
def test_rollouts_with_the_position_of_the_query(encoding, gtrxl):
    """The query's own position counts in what is predicted, remembered and, where it is learned, differentiated."""
    changes = {"positional_encoding": encoding, "query_position": True, "gtrxl": gtrxl, "max_episode_steps": 9}
    rollouts = Rollouts(changes, ends=0.05, seed=6)
    for _ in range(2):
        rollouts.play()
        rollouts.check_minibatches()
    shown = torch.randn(1, 5).expand(2, 5)
    first, second = rollouts.model.complete(rollouts.model.embed(shown), None, torch.tensor([0, 8]))
    assert (first - second).abs().max() > 1e-2


@every_encoding
def test_groups_along_a_long_rollout(encoding):
    """A rollout so long that each group sees only a stretch of the worker's columns."""
    changes = {"positional_encoding": encoding, "memory_slots": 6, "max_episode_steps": 70, "num_blocks": 1}
    rollouts = Rollouts(changes, n_workers=2, worker_steps=2 * STRETCH + 30, ends=0.03, seed=3)
    rollouts.play()
    samples = np.arange(rollouts.step.size)
    rollouts.timeline.in_place = False
    groups = rollouts.timeline.group(*np.divmod(samples, rollouts.worker_steps), rollouts.step.ravel(), 8)
    view = rollouts.timeline.view(groups)
    assert view.mask.shape[2] < rollouts.worker_steps
    rollouts.check_training(samples, (1, 8, 64))
    rollouts.check_training(rollouts.generator.permutation(samples)[:31])


@pytest.mark.parametrize("changes", [variant for variant in VARIANTS if "gtrxl-pre" in variant.id])
def test_rollouts_by_onednn(changes, monkeypatch):
    """All matrix products and gates through the kernels that otherwise only large ones take."""
    monkeypatch.setattr(products, "PRODUCT_WORTH", 0)
    monkeypatch.setattr(products, "GRADIENT_WORTH", 0)
    monkeypatch.setattr(gating, "TANH_WORTH", 0)
    rollouts = Rollouts(changes, seed=4)
    rollouts.play()
    rollouts.check_minibatches()


@pytest.mark.parametrize("groups", (1, 4))
@pytest.mark.parametrize("has_bias", (False, True))
@pytest.mark.parametrize("rows", (3, 2048))
def test_linear(rows, has_bias, groups):
    """Both kernels compute the plain product in every group of channels, and its gradients."""
    inputs, outputs = 16 * groups, 256
    assert (rows == 2048) == (rows * 16 * outputs >= products.PRODUCT_WORTH)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((rows, inputs), (outputs, 16), (outputs,))]
    upstream = torch.randn(rows, outputs, generator=generator)
    found, plain = (
        [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors] for dtype in (torch.float32, torch.float64)
    )
    result = products.linear(found[0], found[1], found[2] if has_bias else None, groups)
    blocks = zip(plain[0].chunk(groups, dim=1), plain[1].chunk(groups), strict=True)
    expected = torch.cat([x @ weight.T for x, weight in blocks], dim=1) + (plain[2] if has_bias else 0)
    assert_close(result, expected, tolerance=3e-5)
    (result * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for one, other in zip(found[: 2 + has_bias], plain, strict=False):
        assert canonical.excess(one.grad, other.grad, relative=1e-5, floor=0) <= 1


@given(st.integers(1, 5), st.integers(1, 40), st.lists(st.integers(0, 11), min_size=1, max_size=9), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_windows_in_place(heads, width, lengths, seed):
    """The loops over windows compute the plain products, for any number of heads and items, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.randn(3, 15, width, generator=generator)
    end = np.random.default_rng(seed).integers(max(lengths), 16, len(lengths))
    first, owner = end - lengths, np.arange(len(lengths)) % 3
    windows = Windows(items[None], owner, first, end)
    questions, weights = (
        torch.randn(len(lengths), heads, size, generator=generator, requires_grad=True)
        for size in (width, windows.width)
    )
    scores, mixture = windows.scores(items, questions), windows.mixture(items, weights)
    expected_scores, expected_mixture = torch.full_like(scores, MASKED), torch.zeros_like(mixture)
    for n, (low, high) in enumerate(zip(first, end, strict=True)):
        window, columns = items[owner[n], low:high], slice(windows.width - (high - low), None)
        expected_scores[n, :, columns] = questions[n] @ window.T
        expected_mixture[n] = weights[n, :, columns] @ window
    assert_close(scores.clamp(min=-1e9), expected_scores.clamp(min=-1e9))
    assert_close(mixture, expected_mixture)
    visible = expected_scores > MASKED / 2
    upstream = torch.randn(scores.shape, generator=generator) * visible, torch.randn(mixture.shape, generator=generator)
    found, expected = (
        torch.autograd.grad(results, (questions, weights), upstream)
        for results in ((scores, mixture), (expected_scores, expected_mixture))
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    items[0] = torch.nan
    assert torch.isfinite(windows.mixture(items, weights)).all(dim=(1, 2)).tolist() == [
        size == 0 or index % 3 > 0 for index, size in enumerate(lengths)
    ]


# ------------------------------------------------------------------------------------------------ groups of queries


@st.composite
def queries(draw):
    """Windows as a rollout has them, empty ones and equal ones included, with sizes of groups."""
    length, steps = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    query = st.tuples(st.integers(0, 3), st.integers(0, steps), st.integers(0, length))
    worker, t, valid = np.array(draw(st.lists(query, min_size=1, max_size=60))).T
    columns = min(valid.max() + draw(st.integers(0, 20)), length + steps)
    return worker, t + length - valid, t + length, draw(st.integers(1, 9)), max(int(columns), 1)


@given(queries())
@settings(max_examples=200, deadline=None)
def test_group_queries(arguments):
    """Every query has a place of its own, in a group of its worker whose columns hold its window."""
    worker, first, end, per_group, columns = arguments
    owner, start, slot = group_queries(worker, first, end, per_group, columns)
    group = slot // per_group
    assert len(set(slot.tolist())) == len(worker)
    assert set(group.tolist()) == set(range(len(start)))
    assert (start[group] <= first).all()
    assert (end <= start[group] + columns).all()
    for index in range(len(start)):
        assert set(worker[group == index].tolist()) == {owner[index]}


@given(queries(), st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_view_shows_exactly_the_windows(arguments, seed):
    """A query's columns are its worker's last min(step, L) before it, by item and distance: in any group and part."""
    worker, first, end, per_group, _ = arguments
    length = int((end - first).max()) or 1
    t = end - end.min()
    steps = int(t.max()) + 1
    changes = {"memory_slots": length, "positional_encoding": "relative", "layer_norm": ""}
    timeline = Timeline(
        canonical.build(BASE | changes, (5,)), canonical.product_config(BASE | changes).transformer, 4, steps, CPU
    )
    timeline.in_place = False
    timeline.items.copy_(torch.arange(timeline.items[0, :, :, 0].numel()).view(1, 4, -1, 1))  # items tell their place
    step = (end - first) + np.random.default_rng(seed).integers(0, 5, len(t)) * (end - first == length)
    groups = timeline.group(worker, t, step, per_group)
    parts = groups.split(min(3, len(t)))
    assert sorted(np.concatenate([queries for queries, _ in parts]).tolist()) == [*range(len(t))]
    widths = []
    for queries, some in [(np.arange(len(t)), groups), *parts]:
        view = timeline.view(some)
        visible, distance = view.mask.flatten(0, 1), view.distance.flatten(0, 1)
        for number, (query, slot) in enumerate(zip(queries, view.slot.tolist(), strict=True)):
            assert view.source[slot] == number
            seen = view.items[0, slot // per_group, :, 0][visible[slot]].tolist()
            now = worker[query] * (length + steps) + length + t[query]
            valid = min(step[query], length)
            assert seen == list(range(now - valid, now))
            assert distance[slot][visible[slot]].tolist() == list(range(valid, 0, -1))
            assert view.nonempty[number].item() == (valid > 0)
        widths.append(view.mask.shape[2])
    assert max(widths) == widths[0]


# --------------------------------------------------------------------------------------------------- real training runs

RUN = {
    "gamma": 0.95,
    "lamda": 0.9,
    "updates": 3,
    "epochs": 2,
    "n_workers": 5,
    "worker_steps": 12,
    "n_mini_batch": 4,
    "value_loss_coefficient": 0.5,
    "hidden_layer_size": 10,
    "max_grad_norm": 0.5,
    **{
        f"{name}_schedule": {"initial": value, "final": value, "power": 1.0, "max_decay_steps": 10}
        for name, value in (("learning_rate", 3e-3), ("beta", 0.01), ("clip_range", 0.1))
    },
}
# Environment, transformer, and the auxiliary losses' coefficients
RUNS = {
    "PocMemoryEnv": (
        {"type": "PocMemoryEnv"},
        {
            "memory_length": 5,
            "positional_encoding": "learned",
            "query_position": True,
            "layer_norm": "pre",
            "gtrxl": True,
            "gtrxl_bias": 1,
        },
        {
            "prediction_coefficient": 0.3,
            "gamma_schedule": {"initial": 0.9, "final": 0.98, "max_decay_steps": 2},
            "lamda_schedule": {"initial": 0.7, "final": 0.9, "max_decay_steps": 2},
        },
    ),
    # Some episodes fall over, the others are cut off.
    "CartPole": (
        {"type": "Gymnasium", "name": "CartPole-v1", "max_episode_steps": 12},
        {
            "memory_length": 14,
            "positional_encoding": "relative",
            "query_position": True,
            "layer_norm": "pre",
            "gtrxl": False,
        },
        {"prediction_coefficient": 0.5, "advantage_floor": 10.0},  # more than their standard deviation
    ),
    "Minigrid": (
        {
            "type": "Minigrid",
            "name": "MiniGrid-MemoryS9-v0",
            "tile_size": 12,
            "view_size": 3,
            "max_episode_steps": 24,
        },
        {
            "memory_length": 20,
            "positional_encoding": "absolute",
            "query_position": True,
            "layer_norm": "post",
            "gtrxl": False,
        },
        {"reconstruction_coefficient": 0.5, "prediction_coefficient": 0.5},
    ),
}


class CheckedTrainer(PPOTrainer):
    """A trainer that checks every rollout before the first optimiser step, and then the loss of that step."""

    def start(self) -> None:
        """Starts the environments, and the history that their steps are compared with."""
        unsettle(self.model, 0)
        unsettle(self.auxiliary, 1)
        plain = self.config.model_dump()
        self.settings = plain | plain["transformer"] | vars(self.task) | {"visual": self.task.frame is not None}
        self.settings |= {"memory_slots": self.settings["memory_length"]}
        self.settings |= {name: plain[f"{name}_schedule"]["initial"] for name in ("clip_range", "beta")}
        self.history = History(self.settings, self.config.n_workers)
        self.before = np.zeros(self.config.n_workers, dtype=np.int64)  # episode steps at the start of the rollout
        self.covered = {
            "terminated": 0,
            "truncated": 0,
            "first steps": 0,
            "windows across a boundary": 0,
            "cut by both": 0,
        }
        self.replayed = [create_env(self.config.environment) for _ in self.before]
        self.episode = [-1] * len(self.replayed)
        self.shown = [self.reset(worker) for worker in range(len(self.replayed))]
        self.start_workers()

    def reset(self, worker: int) -> np.ndarray:
        """Begins the next episode of a replayed environment."""
        self.episode[worker] += 1
        seed = training_seed(self.seed, self.config.environment, worker, self.episode[worker])
        return self.replayed[worker].reset(seed=seed)[0]

    def optimise(self) -> Tensor:
        buffer = self.buffer
        observations, _, which, _ = buffer.observe(np.arange(self.samples))
        self.observations = observations[which]  # (W·T, …)
        self.parameters = canonical.parameters(self.model)
        self.check_steps()
        self.check_environments()
        self.check_sampling()
        self.check_recomputed()
        self.check_advantages()
        self.auxiliary_before = copy.deepcopy(self.auxiliary).double()
        self.gradients: dict[str, Tensor] = {}
        batches, minibatches = [], buffer.minibatches

        def listed(generator: np.random.Generator) -> Iterator[np.ndarray]:
            for batch in minibatches(generator):
                batches.append(batch)
                yield batch

        buffer.minibatches = listed
        statistics = super().optimise()
        del buffer.minibatches
        self.check_loss(statistics[0], batches[0])
        epochs = np.split(np.concatenate(batches), self.config.epochs)
        assert all(sorted(epoch.tolist()) == [*range(self.samples)] for epoch in epochs)
        assert any((one != other).any() for one, other in zip(epochs, epochs[1:], strict=False))
        return statistics

    def _accumulate_gradient(self, *arguments) -> Tensor:
        losses = super()._accumulate_gradient(*arguments)
        if not self.gradients:  # of the first minibatch, before they are clipped
            found = canonical.gradients(self.model) | {n: p.grad for n, p in self.auxiliary.named_parameters()}
            self.gradients = {name: gradient.clone() for name, gradient in found.items()}
        return losses

    def check_steps(self) -> None:
        """Episode steps count up, also across rollouts, and begin again behind every end."""
        buffer, expected = self.buffer, self.before
        for t in range(buffer.worker_steps):
            assert (buffer.step[:, t] == expected).all()
            expected = np.where(buffer.terminated[:, t] | buffer.truncated[:, t], 0, expected + 1)
        assert (self.step == expected).all()
        self.before = expected
        assert set(buffer.final_index) == set(zip(*map(np.ndarray.tolist, np.nonzero(buffer.truncated)), strict=True))
        self.covered["terminated"] += buffer.terminated.sum()
        self.covered["truncated"] += buffer.truncated.sum()
        self.covered["cut by both"] += buffer.truncated[:, -1].sum()  # the time limit, and the end of the rollout
        self.covered["first steps"] += (buffer.step == 0).sum()
        self.covered["windows across a boundary"] += (buffer.step > np.arange(buffer.worker_steps)).sum()

    def check_environments(self) -> None:
        """Observations, rewards and ends are those of the environments, stepped here with the stored actions."""
        buffer, observations = self.buffer, self.observations.unflatten(0, self.buffer.step.shape).numpy()
        for worker, t in np.ndindex(buffer.step.shape):
            assert (observations[worker, t] == self.shown[worker]).all()
            shown, reward, *ends, _ = self.replayed[worker].step(buffer.actions[worker, t].numpy())
            assert buffer.rewards[worker, t] == np.float32(reward)
            assert [buffer.terminated[worker, t], buffer.truncated[worker, t]] == [ends[0], ends[1] and not ends[0]]
            if (worker, t) in buffer.final_index:
                index = np.array([buffer.final_index[worker, t]])
                assert (buffer.observations.gather(index)[0][0].numpy() == shown).all()
            self.shown[worker] = self.reset(worker) if any(ends) else shown

    def check_sampling(self) -> None:
        """What was sampled is what the textbook predicts with the history of all rollouts."""
        buffer = self.buffer
        per_step = self.observations.unflatten(0, buffer.step.shape)
        for t in range(buffer.worker_steps):
            taken = self.history.take(self.parameters, per_step[:, t], buffer.step[:, t] == 0)
            log_probs = Categorical(taken.log_softmaxes).log_prob(buffer.actions[:, t])
            assert_close(buffer.log_probs[:, t], log_probs, t)
            assert_close(buffer.values[:, t], taken.value, t)

    @torch.no_grad()
    def check_recomputed(self) -> None:
        """What training computes before its first step is what was sampled: every ratio is 1."""
        buffer = self.buffer
        order = np.random.default_rng(self.update).permutation(self.samples)
        for samples in (np.arange(self.samples), order, *np.array_split(order, 7), order[:1]):
            memory = buffer.timeline.view(buffer.group(samples))
            observations, _, which, _ = buffer.observe(samples)
            worker, t = np.divmod(samples, buffer.worker_steps)
            embedded = canonical.embed(self.model, observations, which)
            step = torch.from_numpy(buffer.step[worker, t])
            prediction = self.model(self.model.complete(embedded, None, step), memory)
            assert_close(prediction.policy.log_prob(buffer.actions[worker, t]), buffer.log_probs[worker, t])
            assert_close(prediction.value, buffer.values[worker, t])

    @torch.no_grad()
    def check_advantages(self) -> None:
        """Advantages come of the values of what followed, from windows with the newest item."""
        buffer, history = self.buffer, self.history
        arrays = self.workers.arrays
        shown = torch.tensor(arrays.vectors if arrays.frames is None else arrays.frames.transpose(0, 3, 1, 2))
        last = history.predict(self.parameters, shown, history.windows(history.begin(self.step == 0)))
        final_values = torch.full(buffer.step.shape, torch.nan, dtype=torch.float64)
        first = len(history.items[0]) - buffer.worker_steps
        for (worker, t), index in buffer.final_index.items():
            final = history.windows([(worker, first + t)], final=True)
            observation = buffer.observations.gather(np.array([index]))[0]
            final_values[worker, t] = history.predict(self.parameters, observation, final).value
        happened = [torch.tensor(array) for array in (buffer.rewards, buffer.terminated, buffer.truncated)]
        gamma = self.config.gamma if self.config.gamma_schedule is None else (0.9, 0.94, 0.98)[self.update]
        lamda = self.config.lamda if self.config.lamda_schedule is None else (0.7, 0.8, 0.9)[self.update]
        expected = textbook.gae_truncation(*happened, buffer.values.double(), final_values, last.value, gamma, lamda)
        assert_close(buffer.advantages, expected)

    def check_loss(self, statistics: Tensor, samples: np.ndarray) -> None:
        """The first minibatch's losses and all gradients are the textbook's."""
        buffer, history = self.buffer, self.history
        worker, t = np.divmod(samples, buffer.worker_steps)
        first = len(history.items[0]) - buffer.worker_steps
        windows = history.windows(list(zip(worker.tolist(), (first + t).tolist(), strict=True)))
        step = history.predict(self.parameters, self.observations[samples], windows)
        batch = [tensor[worker, t] for tensor in (buffer.actions, buffer.log_probs, buffer.advantages, buffer.values)]
        batch = [tensor.double() if tensor.is_floating_point() else tensor for tensor in batch]
        expected = textbook.loss(self.settings, step.log_softmaxes, step.value, *batch)
        expected |= self.expected_auxiliary(step.output, samples)
        total = expected["loss"]
        for name in self.auxiliary:
            total = total + getattr(self.config, f"{name}_coefficient") * expected[name]
        total.backward()
        found = dict(zip(self.reports, statistics, strict=False))
        parts = canonical.LOSS_PARTS | {name: name for task in self.auxiliary.values() for name in task.reports}
        for name, part in parts.items():
            assert_close(found[name], torch.as_tensor(expected[part]).detach(), name)
        assert_close(found["total"], total.detach(), "total")
        leaves = self.parameters | dict(self.auxiliary_before.named_parameters())
        assert leaves.keys() == self.gradients.keys()
        for name, gradient in self.gradients.items():
            plain = torch.zeros_like(leaves[name]) if leaves[name].grad is None else leaves[name].grad
            assert canonical.excess(gradient, plain, **GRADIENT_TOLERANCE) <= 1, name
        norm = torch.stack([leaf.grad.norm() for leaf in leaves.values() if leaf.grad is not None]).norm()
        assert canonical.excess(statistics[-1], norm, relative=1e-4, floor=0) <= 1

    def expected_auxiliary(self, output: Tensor, samples: np.ndarray) -> dict[str, Tensor | float]:
        """Returns the textbook's auxiliary losses of samples by their outputs (N, D), and what is reported of them."""
        seen, expected = self.observations[samples].double(), {}
        if "reconstruction" in self.auxiliary:
            logits, frames = self.auxiliary_before["reconstruction"](output), seen / 255
            likelihood = frames * logits.sigmoid().log() + (1 - frames) * (-logits).sigmoid().log()
            expected["reconstruction"] = -likelihood.mean()
        if "prediction" in self.auxiliary:
            own = dict(self.auxiliary_before["prediction"].named_parameters())
            actions, following = self.buffer.actions.flatten(0, 1)[samples], self.following(samples)
            questions = textbook.question(own, False, output, actions)
            if self.task.frame is None:
                expected["prediction"] = textbook.vector_prediction(own, questions, following)
            else:
                distinct = torch.unique(self.observations[samples], dim=0)
                candidates = textbook.encode(self.parameters, self.settings, distinct)
                frames = [frame.numpy().tobytes() for frame in distinct]
                shown = [None if frame is None else frame.numpy().tobytes() for frame in following]
                loss, told, possible = textbook.frame_prediction(own, questions, candidates, frames, shown)
                expected["prediction"] = loss
                expected["predicted"], expected["predictable"] = told / len(samples), possible / len(samples)
        return expected

    def following(self, samples: np.ndarray) -> list[Tensor | None]:
        """Returns the observation behind each of `samples`, None where the episode ended there."""
        shown, ended = self.observations.unflatten(0, self.buffer.step.shape), self.buffer.terminated
        last = torch.from_numpy(np.stack(self.shown))
        behind = torch.cat((shown, last[:, None]), dim=1)[:, 1:].flatten(0, 1)
        ended = (ended | self.buffer.truncated).flat[samples]
        return [None if end else observation for end, observation in zip(ended, behind[samples], strict=True)]


@pytest.mark.parametrize("name", RUNS)
def test_training_run(name, tmp_path, monkeypatch):
    """Three updates on real environments in processes of their own, every one checked from the outside."""
    if name != "PocMemoryEnv":
        monkeypatch.setattr("kernels.threads.PART_ROWS", 5)  # minibatches of 15 in three parts
    environment, transformer_config, coefficients = RUNS[name]
    config = RUN | {"environment": environment} | coefficients
    config["transformer"] = {"num_blocks": 2, "embed_dim": 12, "num_heads": 3, **transformer_config}
    options = Options(CPU, processes=2, overlap=name != "PocMemoryEnv", folder=tmp_path)
    trainer = CheckedTrainer(check_config(config, name), "exact", 3, options)
    try:
        trainer.start()
        for _ in range(trainer.config.updates):
            trainer.train_update()
    finally:
        trainer.workers.close()
    missing = {what for what, count in trainer.covered.items() if not count}
    assert missing <= ({"truncated", "cut by both"} if name == "PocMemoryEnv" else set())


@pytest.mark.parametrize("seed", range(5))
def test_advantages(seed):
    """Ends of both kinds anywhere, at both ends of the rollout and on the same step."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, final_values = torch.randn(3, 4, 9, generator=generator)
    terminated, truncated = torch.rand(2, 4, 9, generator=generator) < 0.25
    last_value, gamma, lamda = torch.randn(4, generator=generator), 0.9, 0.8
    following = torch.cat((values[:, 1:], last_value[:, None]), dim=1)
    following = torch.where(truncated, final_values, following)
    found = generalised_advantages(rewards, terminated, truncated, values, following, gamma, lamda)
    doubles = [tensor.double() for tensor in (values, final_values, last_value)]
    assert_close(found, textbook.gae_truncation(rewards, terminated, truncated, *doubles, gamma, lamda))


# --------------------------------------------------------------------------------------------- what memory may not do


def played(changes: dict, change: tuple[int, int] | None) -> tuple[Rollouts, Tensor, Tensor, np.ndarray]:
    """Plays three rollouts, the second with a changed observation.

    Returns:
        The rollouts, the values (W, 3·T) when sampled, the outputs of training (W, 3·T, D), and the number of the
        episode (W, 3·T) in which that was.
    """
    rollouts = Rollouts(changes, ends=0.1, seed=5)
    values, outputs, steps = [], [], []
    for number in range(3):
        rollouts.play(check=False, change=change if number == 1 else None)
        values.append(rollouts.values.detach().clone())
        output = rollouts.predict(np.arange(rollouts.step.size), 4).output
        outputs.append(output.detach().unflatten(0, rollouts.step.shape))
        steps.append(rollouts.step.copy())
    episode = (np.concatenate(steps, axis=1) == 0).cumsum(axis=1)
    return rollouts, torch.cat(values, dim=1), torch.cat(outputs, dim=1), episode


@every_encoding
def test_episodes_do_not_leak(encoding):
    """One changed observation changes later steps of its episode, in the next rollout too, and nothing else."""
    changes = {"positional_encoding": encoding, "memory_slots": 8}
    rollouts, values, outputs, episode = played(changes, None)
    steps = rollouts.worker_steps
    # A step whose episode, not the worker's first, goes on in the third rollout
    worker, t = next(
        (w, t) for w in range(3) for t in range(2, 9) if 1 < episode[w, steps + t] == episode[w, 2 * steps]
    )
    _, changed_values, changed_outputs, _ = played(changes, (worker, t))
    now = steps + t
    index = np.arange(3 * steps)
    own = np.zeros(episode.shape, dtype=bool)
    own[worker] = (episode[worker] == episode[worker, now]) & (index >= now)
    reached = own & (index <= now + rollouts.timeline.length)
    assert reached[worker, 2 * steps] and (~own[worker, now:]).any() and not own[worker, :now].any()
    for one, other in ((values[..., None], changed_values[..., None]), (outputs, changed_outputs)):
        difference = (one - other).abs().amax(dim=2).numpy()
        assert difference[~own].max() <= 1e-7
        assert difference[reached].min() > 1e-5


@every_encoding
def test_shift_of_the_episode_clock(encoding):
    """Only distances count for the relative encoding, and nothing without one; the others tell the time."""
    rollouts = Rollouts({"positional_encoding": encoding}, worker_steps=8)
    model, timeline, worker = rollouts.model, rollouts.timeline, np.arange(3)
    unsettle(model, 0)
    inputs = torch.randn(8, rollouts.config["num_blocks"], 3, model.transformer.embed_dim)
    now, embedded = np.full(3, 7), model.embed(torch.randn(3, 5))
    outputs = []
    for shift in (0, 5):
        for t, received in enumerate(inputs):
            timeline.write(slice(0, 3), t, received, np.full(3, t + shift))
        view = timeline.view(timeline.group(worker, now, now + shift, 2))
        trained = model(embedded, view).output
        sampled = model(embedded, timeline.window(slice(0, 3), 7, now + shift)).output
        assert_close(trained, sampled)
        outputs.append(sampled)
    difference = (outputs[0] - outputs[1]).abs().max()
    assert difference < 1e-6 if encoding in ("", "relative") else difference > 1e-2


@pytest.mark.parametrize("changes", VARIANTS)
def test_empty_memory(changes):
    """Where nothing is remembered the attention is its output bias, whatever the timeline holds."""
    rollouts = Rollouts(changes)
    model, timeline = rollouts.model, rollouts.timeline
    unsettle(model, 0)
    timeline.items.normal_(std=100)
    contexts = []
    for block in model.transformer.blocks:
        block.attention.register_forward_hook(lambda module, _, result: contexts.append(result[0] - module.out.bias))
    step = np.array([0, 2, 0, 0, 7])
    groups = timeline.group(np.array([0, 0, 1, 1, 2]), np.array([1, 4, 0, 9, 11]), step, 2)
    view = timeline.view(groups)
    model(model.embed(torch.randn(5, 5)), view)
    empty = torch.from_numpy(step == 0)
    for context in contexts:
        assert not context[empty].any()
        assert context[~empty].all(dim=1).all()
    contexts.clear()
    for step in ([0, 0, 0], [0, 3, 0]):
        model(model.embed(torch.randn(3, 5)), timeline.window(slice(0, 3), 2, np.array(step)))
    for context in contexts:
        assert not context[[0, 2]].any()


# ------------------------------------------------------------------------------------------------------------ frames


def visual_model(shape: tuple[int, ...], **changes) -> tuple[nn.Module, dict]:
    config = BASE | {"visual": True, "reconstruction_coefficient": 0.0} | changes
    model = canonical.build(config, shape)
    unsettle(model, 0)
    return model, config


def digests(frames: np.ndarray) -> np.ndarray:
    return np.stack([np.frombuffer(xxhash.xxh3_128_digest(frame.tobytes()), np.uint8) for frame in frames])


def test_frame_store(monkeypatch):
    """Repeated frames, within one call and between calls, are stored and encoded once, also where the store grows."""
    model, _ = visual_model((3, 36, 36))
    store, generator = FrameStore((3, 36, 36), 12, CPU), np.random.default_rng(0)
    frames = generator.integers(0, 256, (700, 36, 36, 3), dtype=np.uint8)
    for _ in range(2):  # after `clear` as before
        shown, given, features = [], [], []
        for count, known in ((1, 1), (5, 3), (290, 280), (7, 290), (400, 700)):
            shown.append(np.concatenate((generator.integers(0, known, count), generator.integers(0, known, 3))))
            given.append(store.add(frames[shown[-1]], digests(frames[shown[-1]])))
            with torch.no_grad():
                features.append(store.embed(model.embed, given[-1]).clone())
        shown, given = np.concatenate(shown), np.concatenate(given)
        assert len(store) == len(set(shown.tolist())) == len(set(given.tolist())) > 256
        distinct, count, which = store.gather(given)
        assert len(distinct) == count == len(store)
        plain = torch.from_numpy(frames[shown]).permute(0, 3, 1, 2)
        assert (distinct[which] == plain).all()
        with torch.no_grad():
            assert_close(torch.cat(features), model.embed(plain))
        with monkeypatch.context() as patch:
            patch.setattr("kernels.store.MANY_FRAMES", 100)
            filled, count, which = store.gather(given)
            assert count == len(distinct)
            assert len(filled) % 16 == 0 <= len(filled) - len(distinct) < 16
            assert (filled[which] == plain).all()
        store.clear()


def test_training_on_repeated_frames():
    """Frames encoded once give the outputs and the gradients of every sample's frame encoded."""
    model, config = visual_model((3, 40, 52))
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (4, 40, 52, 3), dtype=np.uint8)
    store, shown = FrameStore((3, 40, 52), 12, CPU), generator.integers(0, 4, 25)
    index = store.add(frames[shown], digests(frames[shown]))
    distinct, _, which = store.gather(index)
    embedded = canonical.embed(model, distinct, which)
    parameters = canonical.parameters(model)
    expected = textbook.encode(parameters, config, torch.from_numpy(frames[shown]).permute(0, 3, 1, 2))
    assert canonical.excess(embedded, expected, relative=1e-5, floor=TOLERANCE) <= 1
    weights = torch.randn(expected.shape)
    (embedded * weights).sum().backward()
    (expected * weights).sum().backward()
    found = {name: gradient for name, gradient in canonical.gradients(model).items() if gradient.any()}
    assert found.keys() == {name for name, leaf in parameters.items() if leaf.grad is not None}
    for name, gradient in found.items():
        assert canonical.excess(gradient, parameters[name].grad, **GRADIENT_TOLERANCE) <= 1, name


@pytest.mark.parametrize("size", ((84, 84), (36, 36), (40, 64), (37, 51)))
def test_reconstruction_is_that_of_transposed_convolutions(size):
    """The decoder and its loss, both rearranged, against PyTorch's own: loss and gradients."""
    model, _ = visual_model((3, *size), reconstruction_coefficient=0.1)
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
    loss = FrameCrossEntropy.apply(decoder(output), frames, which)
    (3 * expected).backward()
    (3 * loss).backward()
    assert canonical.excess(loss, expected, relative=1e-5, floor=TOLERANCE) <= 1
    for (name, parameter), other in zip(decoder.named_parameters(), plain.parameters(), strict=True):
        assert canonical.excess(parameter.grad, other.grad, **GRADIENT_TOLERANCE) <= 1, name


def test_reconstruction_can_be_left_out():
    """There is no decoder where its loss has no weight, and none for vectors, which say so."""
    model, config = visual_model((3, 36, 36))
    assert "reconstruction" not in auxiliary_tasks(canonical.product_config(config), model)
    config |= {"reconstruction_coefficient": 0.1}
    assert set(auxiliary_tasks(canonical.product_config(config), model)) == {"reconstruction"}
    with pytest.raises(UserError, match="needs frames"):
        auxiliary_tasks(canonical.product_config(config), canonical.build(BASE, (5,)))
