"""The rollout: what was observed and done, and what came of it; advantages; minibatches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.transfer import to_device
from memory import ObservationStore, make_memory
from model import ActorCriticModel
from recurrence import Fragments
from run.config import Config
from run.distributed import Ranks
from transformer import MemoryView


@dataclass
class Minibatch:
    """What one optimiser step learns from: this rank's N samples, which saw M distinct observations."""

    samples: np.ndarray  # (N,) flat indices w·T + t over the environments of this rank, in whole segments
    size: int  # number of samples on all ranks
    observations: Tensor  # (M, C, H, W) frames, or (N, n) vectors
    which: Tensor  # (N,) int64 the observation that each sample saw
    vectors: Tensor | None  # (N, n) observed beside frames, None without
    past: MemoryView | Fragments  # what the samples may look at, or the states before them
    step: Tensor  # (N,) int64 episode step
    actions: Tensor  # (N, branches) int64, or (N, entries) float32
    masks: Tensor | None  # (N, sum of actions) bool, which actions were allowed; None if all always are
    log_probs: Tensor  # (N, branches) when they were sampled; (N, 1) of continuous actions
    values: Tensor  # (N,) when they were sampled
    returns: Tensor  # (N,)
    advantages: Tensor  # (N,), normalised over the whole minibatch where the config says so
    candidates: np.ndarray | None = None  # (M',) the distinct frames that all ranks saw, where a task asks for them
    own: Tensor | None = None  # (m,) places among the candidates of those that this rank embeds for all
    rows: Tensor | None = None  # (m,) which of its observations those are

    def mean(self, values: Tensor) -> Tensor:
        """Return this rank's share of the mean of values (N, …) over the samples of all ranks."""
        return values.sum() / (self.size * math.prod(values.shape[1:]))


class Buffer:
    """One rollout of this rank's environments: W environments × T steps.

    What the host decides on (rewards, ends, episode steps, indices of observations) are NumPy arrays, what only the
    model needs lives on the training device. Samples are numbered w·T + t over the environments of all ranks.
    """

    def __init__(
        self, config: Config, model: ActorCriticModel, device: torch.device, ranks: Ranks, dtype: torch.dtype
    ) -> None:
        task, own = model.task, ranks.share(config.n_workers)
        self.ranks, self.device, self.n_workers, self.worker_steps = ranks, device, len(own), config.worker_steps
        shape = (self.n_workers, self.worker_steps)
        self.own_samples = range(own.start * self.worker_steps, own.stop * self.worker_steps)
        self.normalize_advantages, self.advantage_floor = config.normalize_advantages, config.advantage_floor
        self.all_samples, self.segment_length = config.samples, config.segment_length
        self.minibatch_size = config.samples // config.n_mini_batch
        self.memory = make_memory(model, *shape, device, dtype)
        # Every step can be the last of an episode and leave a final observation.
        capacity = self.n_workers * (2 * self.worker_steps + 1)
        self.observations = ObservationStore(task, config.core.embed_dim, capacity, device)
        kind = torch.float32 if task.continuous else torch.int64
        self.actions = torch.zeros(*shape, task.action_size, dtype=kind, device=device)
        allowed = (*shape, sum(task.branches))
        self.masks = torch.ones(allowed, dtype=torch.bool, device=device) if task.masked else None
        self.log_probs = torch.zeros(*shape, len(task.branches) or 1, device=device)
        self.policies = torch.zeros(*shape, 2 * task.continuous or sum(task.branches), device=device)
        self.values = torch.zeros(shape, device=device)
        self.advantages = torch.zeros(shape, device=device)
        self.all_advantages = self.advantages.flatten()
        self.observation_index = np.zeros(shape, dtype=np.int64)
        self.last_index = np.zeros(self.n_workers, dtype=np.int64)  # of the observations after the last step
        self.step = np.zeros(shape, dtype=np.int64)
        self.rewards = np.zeros(shape, dtype=np.float32)
        self.terminated = np.zeros(shape, dtype=bool)
        self.truncated = np.zeros(shape, dtype=bool)
        self.final_index: dict[tuple[int, int], int] = {}  # observation after the truncated step (worker, t)
        self.frame_number = np.zeros(0, dtype=np.int64)  # of each of this rank's distinct frames
        self.all_frames = np.zeros(0, dtype=np.int64)  # the number of the frame of every sample
        self.frame_count = 0

    def begin(self) -> None:
        """Start a new rollout: what is remembered stays, everything else is forgotten."""
        self.observations.clear()
        self.final_index.clear()

    def frame_index(self) -> np.ndarray:
        """Return (W, T): which distinct frame each sample saw."""
        return self.observations.frame_index(self.observation_index)

    def number_frames(self) -> None:
        """Give the distinct frames of all ranks numbers, in the order in which they turned up."""
        if self.observations.frames is None:
            return
        numbers: dict[bytes, int] = {}
        found = []
        for known, index in self.ranks.gather((list(self.observations.frames.known), self.frame_index())):
            number = np.array([numbers.setdefault(digest, len(numbers)) for digest in known])
            found.append(number[index])
            if len(found) == self.ranks.rank + 1:
                self.frame_number = number
        self.all_frames, self.frame_count = np.concatenate(found).flatten(), len(numbers)

    def bootstrap(self, model: ActorCriticModel, last_step: np.ndarray) -> Tensor:
        """Return (W, T) on the CPU: the value of what followed each step, where an episode did not terminate there.

        The observations after the last step are of the episode steps `last_step` (W,). Where an episode was truncated,
        it is the value of its final observation.
        """
        cut = list(self.final_index)
        worker = np.array([*range(self.n_workers), *(w for w, _ in cut)])
        t = np.array([self.worker_steps] * self.n_workers + [t + 1 for _, t in cut])
        step = np.concatenate((last_step, [self.step[w, t] + 1 for w, t in cut])).astype(np.int64)
        index = np.concatenate((self.last_index, list(self.final_index.values()))).astype(np.int64)
        past = self.memory.past_of(worker, t, step[:, None])
        following = model(self.observations.embed(model, index, step), past).value.cpu()
        values = self.values.cpu()
        next_values = torch.cat((values[:, 1:], following[: self.n_workers, None]), dim=1)
        for place, value in zip(cut, following[self.n_workers :], strict=True):
            next_values[place] = value
        return next_values

    def compute_advantages(self, next_values: Tensor, gamma: float, lamda: float) -> None:
        """Fill `advantages` of the rollout, with `next_values` (W, T) of `bootstrap`."""
        rewards, terminated, truncated = map(torch.from_numpy, (self.rewards, self.terminated, self.truncated))
        ended, values = terminated | truncated, self.values.cpu()
        self.advantages.copy_(generalised_advantages(rewards, terminated, ended, values, next_values, gamma, lamda))
        self.all_advantages = self.ranks.join_rows(self.advantages).flatten()

    def minibatches(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the samples of one epoch as flat indices w·T + t of equally large minibatches of shuffled segments."""
        length = self.segment_length
        order, size = generator.permutation(self.all_samples // length), self.minibatch_size // length
        for start in range(0, len(order), size):
            segments = np.sort(order[start : start + size])
            yield (segments[:, None] * length + np.arange(length)).flatten()

    def minibatch(self, samples: np.ndarray) -> Minibatch:
        """Return what this rank learns from in one optimiser step: its share of `samples` (N,) of all environments."""
        advantages = self.all_advantages[to_device(samples, self.device)]
        if self.normalize_advantages:
            advantages = normalised(advantages, self.advantage_floor)
        first, end = np.searchsorted(samples, (self.own_samples.start, self.own_samples.stop))
        own = samples[first:end] - self.own_samples.start
        index = to_device(own, self.device)
        rollout = (self.actions, self.log_probs, self.values, self.advantages)
        actions, log_probs, values, plain = (tensor.flatten(0, 1)[index] for tensor in rollout)
        observations, which, vectors = self.observations.gather(self.observation_index.flat[own])
        return Minibatch(
            samples=own,
            size=len(samples),
            observations=observations,
            which=which,
            vectors=vectors,
            past=self.past_of(own),
            step=to_device(self.step.flat[own], self.device),
            actions=actions,
            masks=None if self.masks is None else self.masks.flatten(0, 1)[index],
            log_probs=log_probs,
            values=values,
            returns=values + plain,
            advantages=advantages[first:end],
            **self._candidates(samples, first, end, which),
        )

    def _candidates(self, samples: np.ndarray, first: int, end: int, which: Tensor) -> dict:
        """Return `candidates`, `own` and `rows` of a minibatch, whose samples first…end are this rank's."""
        if not len(self.all_frames):
            return {}
        candidates, shown = np.unique(self.all_frames[samples], return_index=True)
        own = np.flatnonzero((shown >= first) & (shown < end))
        rows = which[to_device(shown[own] - first, self.device)]
        return {"candidates": candidates, "own": to_device(own, self.device), "rows": rows}

    def past_of(self, samples: np.ndarray) -> MemoryView | Fragments:
        """Return what `samples` (N,), whole segments, may look at, or the states before them."""
        worker, t = np.divmod(samples.reshape(-1, self.segment_length), self.worker_steps)
        return self.memory.past_of(worker[:, 0], t[:, 0], self.step[worker, t])


def normalised(advantages: Tensor, floor: float = 0.0) -> Tensor:
    """Return advantages (N,) with mean 0 and standard deviation 1, or less where theirs is below `floor`."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8).clamp(min=floor)


def generalised_advantages(
    rewards: Tensor, terminated: Tensor, ended: Tensor, values: Tensor, next_values: Tensor, gamma: float, lamda: float
) -> Tensor:
    """Return the advantages (W, T) of generalised advantage estimation (Schulman et al. 2016, eq. 16).

    All tensors are (W, T): whether a step terminated its episode, or ended it in whatever way; `next_values` are those
    of the observation after each step. gamma is γ, lamda λ.
    """
    targets = rewards + gamma * next_values * ~terminated
    decay = gamma * lamda * ~ended
    advantages = torch.empty_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = targets[:, t] - values[:, t] + decay[:, t] * running
        advantages[:, t] = running
    return advantages
