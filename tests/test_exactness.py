"""The product's rearranged mathematics against the plain formulation of `textbook.py`, over whole rollouts.

A `History` keeps every step that every environment ever took and computes each from its own window in float64. The
product keeps a timeline, folds projections into queries, lets queries share columns and stores frames once. Both must
agree in what they return while sampling, in what training recomputes, and in every gradient.
"""

import contextlib
import copy

import canonical
import numpy as np
import pytest
import textbook
import torch
import xxhash
from canonical import BASE, GRADIENT_TOLERANCE, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from buffer import generalised_advantages
from kernels.attention import columns_of
from kernels.store import FrameStore
from memory import STRETCH, ObservationStore, Timeline, make_memory, policy_step
from model import Categorical, Output
from run.config import check_config
from run.start import Options
from tests.walk import constant, task_of, tiny
from trainer import PPOTrainer
from utils import create_env, training_seed
from worker import SharedArrays

CPU = torch.device("cpu")
# Absolute positions are a table, as learned ones are: `test_rollouts` has both
both_encodings = pytest.mark.parametrize("encoding", ("learned", "relative"))


def unsettle(model: nn.Module, seed: int) -> None:
    """Moves every weight, so that biases and norms, which start as zeros and ones, count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class History:
    """Every step that every environment ever took, remembered and computed the textbook's way; its config is flat."""

    def __init__(self, config: dict, n_workers: int) -> None:
        self.config = config
        nothing = torch.zeros(0, config["num_blocks"], config["embed_dim"], dtype=torch.float64)
        self.items = [nothing] * n_workers
        self.starts: list[list[bool]] = [[] for _ in range(n_workers)]

    def windows(self, worker: np.ndarray, index: np.ndarray, final: bool = False) -> textbook.Windows:
        """Returns the windows of steps `index` (N,) of environments `worker`; with `final`, of what followed them."""
        parts = [
            textbook.window_from_history(self.items[w], self.starts[w], self.config["memory_slots"], i, final)
            for w, i in zip(worker.tolist(), index.tolist(), strict=True)
        ]
        return textbook.Windows(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def compute(self, parameters: dict, observations: Tensor, windows: textbook.Windows) -> textbook.Step:
        embedded = textbook.encode(parameters, self.config, observations)
        return textbook.forward(parameters, self.config, embedded, windows)

    def begin(self, starts: np.ndarray) -> textbook.Windows:
        """Begins one step of every environment where none has begun; returns its windows."""
        for own, items, starting in zip(self.starts, self.items, starts.tolist(), strict=True):
            if len(own) == len(items):
                own.append(starting)
            assert own[-1] == starting
        return self.windows(np.arange(len(starts)), np.array([len(own) - 1 for own in self.starts]))

    @torch.no_grad()
    def take(self, parameters: dict, observations: Tensor, starts: np.ndarray) -> textbook.Step:
        """Takes one step in every environment, from observations (W, …), and remembers it."""
        taken = self.compute(parameters, observations, self.begin(starts))
        self.items = [torch.cat((items, new[None])) for items, new in zip(self.items, taken.memory, strict=True)]
        return taken

    def again(self, parameters: dict, observations: Tensor, worker: np.ndarray, index: np.ndarray) -> textbook.Step:
        """Returns the steps of G segments, worker and index (G, S), one after another, with their gradients.

        Each segment has a history of its own: its later steps see what its earlier ones write.
        """
        own, taken = copy.copy(self), []
        own.items, own.starts = ([history[w] for w in worker[:, 0]] for history in (self.items, self.starts))
        for place, now in enumerate(index.T):
            windows = own.windows(np.arange(len(now)), now)
            taken.append(self.compute(parameters, observations.unflatten(0, index.shape)[:, place], windows))
            for segment, (i, new) in enumerate(zip(now.tolist(), taken[-1].memory, strict=True)):
                items = own.items[segment]
                own.items[segment] = torch.cat((items[:i], new[None], items[i + 1 :]))
        return joined(taken)


def joined(taken: list[textbook.Step]) -> textbook.Step:
    """Returns S steps of G segments in the order of segments: (G·S, …) of S times (G, …)."""
    branches, *parts = zip(*taken, strict=True)

    def in_order(tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.stack(tensors, dim=1).flatten(0, 1)

    return textbook.Step([in_order(branch) for branch in zip(*branches, strict=True)], *map(in_order, parts))


class Rollouts:
    """A model and its memory, driven as the trainer drives them, and the plain history of the same steps.

    Its config is BASE with `changes`. An episode ends at a step with the probability `ends`, and after
    `max_episode_steps`. With `narrow`, columns that nobody may look at are left out.
    """

    def __init__(
        self,
        changes: dict,
        n_workers: int = 3,
        worker_steps: int = 12,
        ends: float = 0.12,
        seed: int = 0,
        history: type = History,
        narrow: bool = True,
    ) -> None:
        self.config = BASE | changes
        self.n_workers, self.worker_steps, self.ends = n_workers, worker_steps, ends
        torch.manual_seed(seed)
        self.model = canonical.build(self.config, (5,))
        task = self.model.task
        with torch.no_grad():
            for block in getattr(self.model.core, "blocks", ()):  # so that attention is far from uniform
                block.attention.query.weight.mul_(3)
                block.attention.key.weight.mul_(3)
        self.memory = make_memory(self.model, n_workers, worker_steps, CPU)
        self.memory.narrow = narrow
        self.store = ObservationStore(task, self.config["embed_dim"], n_workers * worker_steps, CPU)
        self.arrays = SharedArrays(n_workers, task)
        self.generator = np.random.default_rng(seed)
        self.history = history(self.config, n_workers)
        self.now = np.zeros(n_workers, dtype=np.int64)
        self.played = 0
        # Of the latest rollout, (W, T, …)
        self.step = np.zeros((n_workers, worker_steps), dtype=np.int64)
        self.observations = torch.zeros(n_workers, worker_steps, task.vector)
        self.values = torch.zeros(n_workers, worker_steps)

    def play(self, check: bool = True) -> None:
        """Plays one rollout under new weights; with `check`, every step is compared with the textbook's."""
        self.memory.roll(self.worker_steps)
        self.store.clear()
        self.played += 1
        unsettle(self.model, self.played)
        parameters = canonical.parameters(self.model)
        half = (self.n_workers + 1) // 2
        for t in range(self.worker_steps):
            shown = self.generator.standard_normal((self.n_workers, *self.observations.shape[2:])).astype(np.float32)
            for worker, observation in enumerate(shown):
                self.arrays.show(worker, observation)
            self.observations[:, t], self.step[:, t] = torch.from_numpy(shown), self.now
            expected = self.history.take(parameters, self.observations[:, t], self.now == 0) if check else None
            for rows in (slice(0, half), slice(half, self.n_workers)):
                step = self.now[rows].copy()
                output, *_ = policy_step(self.model, self.model, self.memory, self.store, self.arrays, rows, t, step)
                self.values[rows, t] = output.value
                if check:
                    self.compare(output, expected, f"rollout {self.played}, step {t}", rows)
            ended = self.generator.random(self.n_workers) < self.ends
            ended |= self.now + 1 == self.config["max_episode_steps"]
            self.now = np.where(ended, 0, self.now + 1)

    def compare(self, output: Output, expected: textbook.Step, what: object, rows: slice = slice(None)) -> None:
        """Requires that what the product returns for some samples is the textbook's."""
        for found, branch in zip(output.policy.log_probs, expected.log_softmaxes, strict=True):
            assert_close(found, branch[rows], what)
        assert_close(output.value, expected.value[rows], what)
        assert_close(output.output, expected.output[rows], what)
        if isinstance(self.memory, Timeline):
            assert_close(output.kept.transpose(0, 1), expected.memory[rows], what)

    def train(self, samples: np.ndarray, length: int = 1) -> Output:
        """Returns what training computes for samples w·T + t, in segments of so many consecutive steps."""
        worker, t = np.divmod(samples.reshape(-1, length), self.worker_steps)
        past = self.memory.past_of(worker[:, 0], t[:, 0], self.step[worker, t])
        embedded = self.model.embed(self.observations.flatten(0, 1)[samples])
        return self.model(self.model.complete(embedded, None, torch.from_numpy(self.step.flat[samples])), past)

    def check_training(self, samples: np.ndarray, length: int = 1) -> None:
        """Requires that training's outputs and gradients are the textbook's, for samples w·T + t of the rollout."""
        parameters = canonical.parameters(self.model)
        worker, t = np.divmod(samples.reshape(-1, length), self.worker_steps)
        index = (self.played - 1) * self.worker_steps + t
        expected = self.history.again(parameters, self.observations.flatten(0, 1)[samples], worker, index)
        generator = torch.Generator().manual_seed(len(samples))
        shapes = [branch.shape for branch in expected.log_softmaxes] + [expected.value.shape]
        weights = [torch.randn(shape, generator=generator) for shape in shapes]
        _weighted([*expected.log_softmaxes, expected.value], weights).backward()
        self.model.zero_grad()
        output = self.train(samples, length)
        what = f"{len(samples)} samples in segments of {length}"
        self.compare(output, expected, what)
        _weighted([*output.policy.log_probs, output.value], weights).backward()
        found = canonical.gradients(self.model)
        assert found.keys() == parameters.keys()
        for name, gradient in found.items():
            assert canonical.excess(gradient, parameters[name].grad, **GRADIENT_TOLERANCE) <= 1, (name, what)

    def check_segments(self, length: int) -> None:
        """Requires the same of segments of the rollout: of all but one, in any order."""
        segments = self.generator.permutation(self.step.size // length)[1:]
        self.check_training((segments[:, None] * length + np.arange(length)).flatten(), length)


def _weighted(outputs: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Returns a scalar whose gradient reaches every parameter."""
    weighted = [(output * weight).sum() for output, weight in zip(outputs, weights, strict=True)]
    return torch.stack(weighted).sum() / len(outputs[-1])


# ------------------------------------------------------------------------------------------------------- rollouts


def checked_rollouts(changes: dict, lengths: tuple[int, ...] = (1, 4), count: int = 2, **size) -> Rollouts:
    """Plays rollouts and checks training on the last one in segments of some lengths; returns all of it."""
    rollouts = Rollouts(changes, **size)
    for _ in range(count):
        rollouts.play()
    for length in lengths:
        rollouts.check_segments(length)
    return rollouts


@pytest.mark.parametrize("gtrxl", (False, True), ids=("trxl", "gtrxl"))
@pytest.mark.parametrize("norm", ("pre", "post", ""))
@pytest.mark.parametrize("encoding", ("", "absolute", "learned", "relative"))
def test_rollouts(gtrxl, norm, encoding):
    """Sampling, minibatches of single steps, and gradients through segments in which episodes end and begin.

    Weights change between rollouts. Memory is longer than the short segments and shorter than the long ones.
    """
    changes = {"gtrxl": gtrxl, "layer_norm": norm, "positional_encoding": encoding}
    rollouts = checked_rollouts(changes, (1, 3, 12), ends=0.15)
    assert (rollouts.step[:, 1:] == 0).any() and rollouts.step.max() > rollouts.memory.length


@pytest.mark.parametrize(("encoding", "layer_norm"), [("learned", "pre"), ("relative", "post")])
@pytest.mark.parametrize("narrow", (True, False))
def test_long_memory(encoding, layer_norm, narrow):
    """Memory longer than a rollout and than some episodes: windows reach two rollouts back.

    On a GPU columns have equal shape: they are wider than what anybody may look at, and nothing changes.
    """
    changes = {"positional_encoding": encoding, "layer_norm": layer_norm, "memory_slots": 17, "num_blocks": 3}
    rollouts = checked_rollouts(changes, (1, 7), 4, n_workers=4, worker_steps=7, ends=0.03, seed=1, narrow=narrow)
    assert rollouts.step[:, 0].max() > 2 * rollouts.worker_steps


@pytest.mark.parametrize("encoding", ("absolute", "learned", "relative"))
def test_the_position_of_the_query(encoding):
    """It counts in what is returned, remembered and differentiated; memory may be longer than any episode."""
    changes = {"positional_encoding": encoding, "query_position": True, "max_episode_steps": 9, "memory_slots": 40}
    rollouts = checked_rollouts(changes, ends=0.05, seed=6)
    shown = torch.randn(1, 5).expand(2, 5)
    first, second = rollouts.model.complete(rollouts.model.embed(shown), None, torch.tensor([0, 8]))
    assert (first - second).abs().max() > 1e-2


@both_encodings
def test_groups_along_a_long_rollout(encoding):
    """A rollout so long that each group sees only a stretch of the environment's columns."""
    changes = {"positional_encoding": encoding, "memory_slots": 6, "max_episode_steps": 70, "num_blocks": 1}
    rollouts = checked_rollouts(changes, (1,), 1, n_workers=2, worker_steps=2 * STRETCH + 30, ends=0.03, seed=3)
    samples = np.arange(rollouts.step.size)
    view = rollouts.memory.past_of(*np.divmod(samples, rollouts.worker_steps), rollouts.step.reshape(-1, 1))
    assert view.distance.shape[1] > 1 and view.columns < rollouts.worker_steps


@both_encodings
def test_acting_again(encoding):
    """A rollout's outputs under new weights, with the memory that these write: as if they had acted from its start."""
    rollouts = Rollouts({"positional_encoding": encoding}, ends=0.15, seed=8)
    for _ in range(2):
        rollouts.play(check=False)
    unsettle(rollouts.model, 99)
    steps, whole = rollouts.worker_steps, np.arange(rollouts.step.size)
    embedded = rollouts.model.embed(rollouts.observations.flatten(0, 1))
    x = rollouts.model.complete(embedded, None, torch.from_numpy(rollouts.step.flatten()))
    with torch.no_grad():
        expected = rollouts.train(whole, steps).output
        for rows in (slice(0, 3), slice(1, 2)):
            own = slice(rows.start * steps, rows.stop * steps)
            assert_close(rollouts.memory.replay(rows, x[own], rollouts.step[rows]), expected[own])
        stale = rollouts.train(whole).output
    assert (stale - expected).abs().max() > 1e-2  # what PPO's ratio sees is something else


@st.composite
def queries(draw):
    """Draws steps of a rollout, empty windows and equal ones included: environment, t, episode step; and L."""
    length, steps = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    query = st.tuples(st.integers(0, 3), st.integers(0, steps - 1), st.integers(0, 2 * length))
    return *np.array(draw(st.lists(query, min_size=1, max_size=60))).T, length, steps


@given(queries(), st.sampled_from((1, 3, STRETCH)), st.booleans())
@settings(max_examples=60)
def test_view_shows_exactly_the_windows(arguments, stretch, narrow):
    """A query's columns are its environment's last min(step, L) before it, by item and distance, in any group."""
    worker, t, step, length, steps = arguments
    model = canonical.build(BASE | {"memory_slots": length, "positional_encoding": "relative", "layer_norm": ""}, (5,))
    timeline = Timeline(model.transformer, 4, steps, CPU, torch.float32)
    timeline.items.copy_(torch.arange(timeline.items[0, :, :, 0].numel()).view(1, 4, -1, 1))  # items tell their place
    timeline.narrow = narrow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memory.STRETCH", stretch)
        view = timeline.past_of(worker, t, step[:, None])
    items, distance, valid = columns_of(view.items[0], view.rows, None), view.distance.flatten(), view.valid.flatten()
    visible = view.bias(1).flatten(0, 1) == 0
    assert len(set(view.slot.tolist())) == len(worker)
    for query, slot in enumerate(view.slot.tolist()):
        assert view.source[slot] == query
        seen = items[slot // view.distance.shape[1], :, 0][visible[slot]].tolist()
        now = worker[query] * (length + steps) + length + t[query]
        assert seen == list(range(now - min(step[query], length), now))
        assert (distance[slot] - torch.arange(view.columns))[visible[slot]].tolist() == list(range(valid[slot], 0, -1))
        assert view.nonempty[query].item() == (step[query] > 0)


# --------------------------------------------------------------------------------------------------- real training runs

CONSTANT = {"learning_rate": 3e-3, "beta": 0.01, "clip_range": 0.1}
RUN = {f"{name}_schedule": constant(value) for name, value in CONSTANT.items()} | {
    "gamma": 0.95, "lamda": 0.9, "updates": 3, "epochs": 2, "n_workers": 5, "worker_steps": 12, "hidden_layer_size": 10,
    "max_grad_norm": 1e6,  # the gradient stays as it is
}  # fmt: skip
# Environment, transformer, and what else differs
RUNS = {
    "PocMemoryEnv": (
        {"type": "PocMemoryEnv"},
        {"memory_length": 5, "positional_encoding": "learned", "layer_norm": "pre", "gtrxl": True, "gtrxl_bias": 1},
        {
            "prediction_coefficient": 0.3,
            "gamma_schedule": {"initial": 0.9, "final": 0.98, "max_decay_steps": 2},
            "lamda_schedule": {"initial": 0.7, "final": 0.9, "max_decay_steps": 2},
        },
    ),
    # Some episodes fall over, the others are cut off.
    "CartPole": (
        {"type": "Gymnasium", "name": "CartPole-v1", "max_episode_steps": 12},
        {"memory_length": 14, "positional_encoding": "relative", "layer_norm": "pre"},
        {"prediction_coefficient": 0.5, "advantage_floor": 10.0},  # more than their standard deviation
    ),
    "Minigrid": (
        {"type": "Minigrid", "name": "MiniGrid-MemoryS9-v0", "tile_size": 12, "view_size": 3, "max_episode_steps": 24},
        {"memory_length": 20, "positional_encoding": "absolute", "layer_norm": "post"},
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
        self.settings |= {"memory_slots": self.settings["memory_length"]} | CONSTANT
        self.history = History(self.settings, self.config.n_workers)
        self.before = np.zeros(self.config.n_workers, dtype=np.int64)  # episode steps at the start of the rollout
        self.covered: set[str] = set()
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
        observations, which, _ = buffer.observations.gather(buffer.observation_index.flatten())
        self.observations = observations[which]  # (W·T, …)
        self.parameters = canonical.parameters(self.model)
        self.check_steps()
        self.check_environments()
        self.check_sampling()
        self.check_advantages()
        self.auxiliary_before = copy.deepcopy(self.auxiliary).double()
        self.batches: list[np.ndarray] = []
        statistics = super().optimise()
        epochs = np.split(np.concatenate(self.batches), self.config.epochs)
        assert all(sorted(epoch.tolist()) == [*range(self.config.samples)] for epoch in epochs)
        assert (epochs[0] != epochs[1]).any()
        return statistics

    def _train_minibatch(self, samples: np.ndarray) -> Tensor:
        statistics = super()._train_minibatch(samples)
        if not self.batches:
            self.check_loss(statistics, samples)
        self.batches.append(samples)
        return statistics

    def check_steps(self) -> None:
        """Episode steps count up, also across rollouts, and begin again after every end."""
        buffer, expected = self.buffer, self.before
        for t in range(buffer.worker_steps):
            assert (buffer.step[:, t] == expected).all()
            expected = np.where(buffer.terminated[:, t] | buffer.truncated[:, t], 0, expected + 1)
        assert (self.step == expected).all()
        self.before = expected
        assert set(buffer.final_index) == set(zip(*map(np.ndarray.tolist, np.nonzero(buffer.truncated)), strict=True))
        happened = {
            "terminated": buffer.terminated,
            "truncated": buffer.truncated,
            "cut by both": buffer.truncated[:, -1],  # the time limit, and the end of the rollout
            "windows across a boundary": buffer.step > np.arange(buffer.worker_steps),
        }
        self.covered |= {what for what, places in happened.items() if places.any()}

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
    def check_advantages(self) -> None:
        """Advantages come of the values of what followed, from windows with the newest item."""
        buffer, history = self.buffer, self.history
        arrays = self.workers.arrays
        shown = torch.tensor(arrays.vectors if arrays.frames is None else arrays.frames.transpose(0, 3, 1, 2))
        last = history.compute(self.parameters, shown, history.begin(self.step == 0))
        final_values = torch.full(buffer.step.shape, torch.nan, dtype=torch.float64)
        first = len(history.items[0]) - buffer.worker_steps
        for (worker, t), index in buffer.final_index.items():
            final = history.windows(np.array([worker]), np.array([first + t]), final=True)
            observation = buffer.observations.gather(np.array([index]))[0]
            final_values[worker, t] = history.compute(self.parameters, observation, final).value
        happened = [torch.tensor(array) for array in (buffer.rewards, buffer.terminated, buffer.truncated)]
        gamma = self.config.gamma if self.config.gamma_schedule is None else (0.9, 0.94, 0.98)[self.update]
        lamda = self.config.lamda if self.config.lamda_schedule is None else (0.7, 0.8, 0.9)[self.update]
        expected = textbook.gae_truncation(*happened, buffer.values.double(), final_values, last.value, gamma, lamda)
        assert_close(buffer.advantages, expected)

    def check_loss(self, statistics: Tensor, samples: np.ndarray) -> None:
        """The first minibatch's losses and all gradients are the textbook's."""
        buffer, history = self.buffer, self.history
        worker, t = np.divmod(samples, buffer.worker_steps)
        windows = history.windows(worker, len(history.items[0]) - buffer.worker_steps + t)
        step = history.compute(self.parameters, self.observations[samples], windows)
        batch = [tensor[worker, t] for tensor in (buffer.actions, buffer.log_probs, buffer.advantages, buffer.values)]
        batch = [tensor.double() if tensor.is_floating_point() else tensor for tensor in batch]
        expected = textbook.loss(self.settings, step.log_softmaxes, step.value, *batch)
        expected |= self.expected_auxiliary(step.output, samples)
        weighted = [getattr(self.config, f"{name}_coefficient") * expected[name] for name in self.auxiliary]
        expected["total"] = expected["loss"] + sum(weighted)
        expected["total"].backward()
        losses = [tag.removeprefix("losses/") for tag in self.tags if tag.startswith("losses/")]
        for name, found in zip(losses, statistics, strict=False):
            plain = expected[canonical.LOSS_PARTS.get(name, name)]
            assert_close(found, torch.as_tensor(plain).detach(), name)
        leaves = self.parameters | dict(self.auxiliary_before.named_parameters())
        gradients = canonical.gradients(self.model) | {n: p.grad for n, p in self.auxiliary.named_parameters()}
        assert leaves.keys() == gradients.keys()
        for name, gradient in gradients.items():
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
        own = dict(self.auxiliary_before["prediction"].named_parameters())
        actions, following = self.buffer.actions.flatten(0, 1)[samples], self.following(samples)
        questions = textbook.question(own, False, output, actions)
        if self.task.frame is None:
            return expected | {"prediction": textbook.vector_prediction(own, questions, following)}
        distinct = torch.unique(self.observations[samples], dim=0)
        candidates = textbook.encode(self.parameters, self.settings, distinct)
        frames = [frame.numpy().tobytes() for frame in distinct]
        shown = [None if frame is None else frame.numpy().tobytes() for frame in following]
        loss, told, possible = textbook.frame_prediction(own, questions, candidates, frames, shown)
        shares = {"predicted": told / len(samples), "predictable": possible / len(samples)}
        return expected | {"prediction": loss} | shares

    def following(self, samples: np.ndarray) -> list[Tensor | None]:
        """Returns the observation after each of `samples`, None where the episode ended there."""
        shown, ended = self.observations.unflatten(0, self.buffer.step.shape), self.buffer.terminated
        last = torch.from_numpy(np.stack(self.shown))
        after = torch.cat((shown, last[:, None]), dim=1)[:, 1:].flatten(0, 1)
        ended = (ended | self.buffer.truncated).flat[samples]
        return [None if end else observation for end, observation in zip(ended, after[samples], strict=True)]


@pytest.mark.parametrize("name", RUNS)
def test_training_run(name):
    """Three updates on real environments in processes of their own, every one checked from the outside."""
    environment, transformer, changes = RUNS[name]
    transformer = {"embed_dim": 12, "num_heads": 3, "query_position": True} | transformer
    config = check_config(tiny(environment, transformer=transformer, **RUN | changes), name)
    options = Options(CPU, processes=2)
    options.overlaps = lambda task, n_workers: name != "PocMemoryEnv"
    trainer = CheckedTrainer(config, task_of(config.environment), 3, options)
    with contextlib.closing(trainer.workers):
        trainer.start()
        for _ in range(config.updates):
            trainer.train_update()
    cut = {"truncated", "cut by both"} if name != "PocMemoryEnv" else set()
    assert trainer.covered >= {"terminated", "windows across a boundary"} | cut


def test_advantages():
    """Ends of both kinds anywhere, at both ends of the rollout and on the same step."""
    generator = torch.Generator().manual_seed(0)
    rewards, values, final_values = torch.randn(3, 20, 9, generator=generator)
    terminated, truncated = torch.rand(2, 20, 9, generator=generator) < 0.25
    last_value, gamma, lamda = torch.randn(20, generator=generator), 0.9, 0.8
    following = torch.cat((values[:, 1:], last_value[:, None]), dim=1)
    following = torch.where(truncated, final_values, following)
    found = generalised_advantages(rewards, terminated, terminated | truncated, values, following, gamma, lamda)
    doubles = [tensor.double() for tensor in (values, final_values, last_value)]
    assert_close(found, textbook.gae_truncation(rewards, terminated, truncated, *doubles, gamma, lamda))


# ------------------------------------------------------------------------------------------------------------ frames


def test_frame_store():
    """Repeated frames, within one call and between calls, are stored and encoded once, also where the store grows."""
    store, generator = FrameStore((3, 4, 4), 6, CPU), np.random.default_rng(0)
    frames = generator.integers(0, 256, (700, 4, 4, 3), dtype=np.uint8)
    digests = np.stack([np.frombuffer(xxhash.xxh3_128_digest(frame), np.uint8) for frame in frames])
    encoded = []

    def encode(distinct: Tensor) -> Tensor:
        encoded.append(len(distinct))
        return distinct.float().mean(dim=3).flatten(1)[:, :6]

    for _ in range(2):  # after `clear` as before
        shown = [generator.integers(0, known, count) for count, known in ((2, 1), (8, 3), (293, 280), (700, 700))]
        given = [store.add(frames[some], digests[some]) for some in shown]
        features = store.embed(encode, np.concatenate(given)).clone()
        plain = torch.from_numpy(frames[np.concatenate(shown)]).permute(0, 3, 1, 2)
        assert len(store) == len(np.unique(np.concatenate(shown))) == sum(encoded) > 256
        assert torch.equal(features, encode(plain))
        distinct, which = store.gather(given[2])
        assert torch.equal(distinct[which], plain[10:303]) and len(distinct) == len(np.unique(shown[2]))
        encoded.clear()
        store.clear()
