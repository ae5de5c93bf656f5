"""The rollout: what was observed and done, and what came of it; advantages; minibatches."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kernels.groups import QueryGroups
from kernels.windows import Windows
from memory import STRETCH, ObservationStore, Timeline
from model import ActorCriticModel
from run.distributed import Ranks

if TYPE_CHECKING:
    from run.config import Config


@dataclass
class Minibatch:
    """What one optimiser step, or a part of it, learns from: N samples that saw M distinct observations.

    Attributes:
        samples: (N,) flat indices w·T + t over the environments of this process.
        observations: (M, C, H, W) frames, perhaps followed by some that no sample saw, or (N, n) vectors.
        distinct: M, over all processes that share the minibatch.
        which: (N,) int64 the observation that each sample saw.
        vectors: (N, n) observed beside frames, None without.
        windows: what the samples may look at, or how they share memory columns for it.
        step: (N,) int64 episode step.
        actions: (N, branches) int64, or (N, entries) float32.
        masks: (N, sum of actions) bool, which actions were allowed; None if all always are.
        log_probs: (N, branches) when they were sampled; (N, 1) of continuous actions.
        values: (N,) when they were sampled.
        returns: (N,).
        advantages: (N,), normalised over the whole minibatch where the config says so.
        targets: of each auxiliary task, by name: a tensor (N, …) each.
        candidates: (M,) numbers of the distinct frames, None where no auxiliary task needs them.
        own: (m,) places among the candidates that this process embeds for all.
        rows: (m,) which of its observations those are.
    """

    samples: np.ndarray
    observations: Tensor
    distinct: int
    which: Tensor
    vectors: Tensor | None
    windows: Windows | QueryGroups
    step: Tensor
    actions: Tensor
    masks: Tensor | None
    log_probs: Tensor
    values: Tensor
    returns: Tensor
    advantages: Tensor
    targets: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    candidates: np.ndarray | None = None
    own: Tensor | None = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.which)

    def split(self, parts: int) -> list["Minibatch"]:
        """Divide the samples into equal parts."""
        if parts == 1:
            return [self]
        return [self._part(torch.from_numpy(samples), windows) for samples, windows in self.windows.split(parts)]

    def _part(self, samples: Tensor, windows: Windows | QueryGroups) -> "Minibatch":
        shared: dict[str, Any] = {"observations": self.observations, "distinct": self.distinct, "windows": windows}
        shared |= {"candidates": self.candidates, "own": self.own, "rows": self.rows}
        own = {f.name: chosen(getattr(self, f.name), samples) for f in fields(self) if f.name not in shared}
        return Minibatch(**shared | own)


def chosen(value: Any, samples: Tensor) -> Any:
    """Return the rows `samples` of a tensor, of all tensors in nested dicts, or of None."""
    if isinstance(value, dict):
        return {name: chosen(part, samples) for name, part in value.items()}
    return None if value is None else value[samples]


class Buffer:
    """One rollout of this process's environments: W environments × T steps.

    What the host decides on (rewards, ends, episode steps, indices of observations) are NumPy arrays, what only the
    model needs lives on the training device.

    Args:
        config: of the run.
        model: the model that samples.
        device: the training device.
        world: all processes of the run; samples are numbered w·T + t over the environments of all of them.
    """

    def __init__(self, config: "Config", model: ActorCriticModel, device: torch.device, world: Ranks) -> None:
        task, own = model.task, world.share(config.n_workers)
        self.world, self.n_workers, self.worker_steps = world, len(own), config.worker_steps
        shape = (self.n_workers, self.worker_steps)
        self.all_samples = config.n_workers * self.worker_steps
        self.own_samples = range(own.start * self.worker_steps, own.stop * self.worker_steps)
        self.normalize_advantages, self.advantage_floor = config.normalize_advantages, config.advantage_floor
        self.minibatch_size = self.all_samples // config.n_mini_batch
        # As many queries per group as a minibatch has on average in a stretch.
        self.per_group = max(1, STRETCH // config.n_mini_batch)
        self.timeline = Timeline(model, config.transformer, *shape, device)
        # Every step can be the last of an episode and leave a final observation.
        capacity = self.n_workers * (2 * self.worker_steps + 1)
        self.observations = ObservationStore(task, config.transformer.embed_dim, capacity, device)
        kind = torch.float32 if task.continuous else torch.int64
        self.actions = torch.zeros(*shape, task.action_size, dtype=kind, device=device)
        allowed = (*shape, sum(task.branches))
        self.masks = torch.ones(allowed, dtype=torch.bool, device=device) if task.masked else None
        self.log_probs = torch.zeros(*shape, len(task.branches) or 1, device=device)
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
        self.frame_number = np.zeros(0, dtype=np.int64)  # of each of this process's distinct frames
        self.all_frames = np.zeros(0, dtype=np.int64)  # the number of the frame of every sample
        self.frame_count = 0

    def begin(self) -> None:
        """Start a new rollout: the newest L memory columns stay, everything else is forgotten."""
        self.observations.clear()
        self.final_index.clear()

    def frame_index(self) -> np.ndarray:
        """Return (W, T): which distinct frame each sample saw."""
        return self.observations.frame_index(self.observation_index)

    def number_frames(self) -> None:
        """Give the distinct frames of all processes numbers, in the order in which they turned up."""
        if self.observations.frames is None:
            return
        numbers: dict[bytes, int] = {}
        found = []
        for known, index in self.world.gather((list(self.observations.frames.known), self.frame_index())):
            number = np.array([numbers.setdefault(digest, len(numbers)) for digest in known])
            found.append(number[index])
            if len(found) == self.world.rank + 1:
                self.frame_number = number
        self.all_frames, self.frame_count = np.concatenate(found).flatten(), len(numbers)

    def bootstrap(self, model: ActorCriticModel, last_step: np.ndarray) -> Tensor:
        """Return (W, T) on the CPU: the value of what followed each step, where an episode did not terminate there.

        Args:
            model: the model that sampled.
            last_step: (W,) episode step of the observations after the last step.
        """
        cut = list(self.final_index)
        worker = np.array([*range(self.n_workers), *(w for w, _ in cut)])
        t = np.array([self.worker_steps] * self.n_workers + [t + 1 for _, t in cut])
        step = np.concatenate((last_step, [self.step[w, t] + 1 for w, t in cut])).astype(np.int64)
        index = np.concatenate((self.last_index, list(self.final_index.values()))).astype(np.int64)
        memory = self.timeline.view(self.timeline.group(worker, t, step, self.per_group))
        following = model(self.observations.embed(model, index, step), memory).value.cpu()
        values = self.values.cpu()
        next_values = torch.cat((values[:, 1:], following[: self.n_workers, None]), dim=1)
        for place, value in zip(cut, following[self.n_workers :], strict=True):
            next_values[place] = value
        return next_values

    def compute_advantages(self, next_values: Tensor, gamma: float, lamda: float) -> None:
        """Fill `advantages` by generalised advantage estimation (Schulman et al. 2016, eq. 16).

        Args:
            next_values: (W, T) of `bootstrap`; where an episode was truncated, the value of its final observation.
            gamma: γ of this rollout.
            lamda: λ of this rollout.
        """
        advantages = generalised_advantages(
            torch.from_numpy(self.rewards),
            torch.from_numpy(self.terminated),
            torch.from_numpy(self.truncated),
            self.values.cpu(),
            next_values,
            gamma,
            lamda,
        )
        self.advantages.copy_(advantages)
        self.all_advantages = self.world.join_rows(self.advantages).flatten()

    def minibatches(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the samples of one epoch, fully shuffled, as flat indices w·T + t of equally large minibatches."""
        order = generator.permutation(self.all_samples)
        for start in range(0, len(order), self.minibatch_size):
            yield np.sort(order[start : start + self.minibatch_size])

    def minibatch(self, samples: np.ndarray) -> Minibatch:
        """Return what this process learns from in one optimiser step: its own share of `samples`.

        Args:
            samples: (N,) flat indices w·T + t over all environments; advantages are normalised over all of them.
        """
        advantages = self.all_advantages[self.timeline.to_device(samples)]
        if self.normalize_advantages:
            advantages = normalised(advantages, self.advantage_floor)
        first, end = np.searchsorted(samples, (self.own_samples.start, self.own_samples.stop))
        whole, samples, advantages = samples, samples[first:end] - self.own_samples.start, advantages[first:end]
        index = self.timeline.to_device(samples)
        masks = None if self.masks is None else self.masks.flatten(0, 1)[index]
        rollout = (self.actions, self.log_probs, self.values, self.advantages)
        actions, log_probs, values, plain = (tensor.flatten(0, 1)[index] for tensor in rollout)
        groups, step = self.group(samples), self.timeline.to_device(self.step.flat[samples])
        minibatch = Minibatch(
            samples, *self.observe(samples), groups, step, actions, masks, log_probs, values, values + plain, advantages
        )
        if len(self.all_frames):
            minibatch.candidates, shown = np.unique(self.all_frames[whole], return_index=True)
            own = np.flatnonzero((shown >= first) & (shown < end))
            minibatch.distinct = len(minibatch.candidates)
            minibatch.own = self.timeline.to_device(own)
            minibatch.rows = minibatch.which[self.timeline.to_device(shown[own] - first)]
        return minibatch

    def observe(self, samples: np.ndarray) -> tuple[Tensor, int, Tensor, Tensor | None]:
        """Return what `samples` (N,) of this process observed, as `ObservationStore.gather` does."""
        return self.observations.gather(self.observation_index.flat[samples])

    def group(self, samples: np.ndarray) -> Windows | QueryGroups:
        """Return what `samples` (N,) may look at, or how they share memory columns for it."""
        worker, t = np.divmod(samples, self.worker_steps)
        return self.timeline.group(worker, t, self.step[worker, t], self.per_group)


def normalised(advantages: Tensor, floor: float = 0.0) -> Tensor:
    """Return advantages (N,) with mean 0 and standard deviation 1, or less where theirs is below `floor`."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8).clamp(min=floor)


def generalised_advantages(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    values: Tensor,
    next_values: Tensor,
    gamma: float,
    lamda: float,
) -> Tensor:
    """Return the advantages (W, T); all tensors are (W, T), `next_values` of the observation behind each step."""
    targets = rewards + gamma * next_values * ~terminated
    decay = gamma * lamda * ~(terminated | truncated)
    advantages = torch.empty_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = targets[:, t] - values[:, t] + decay[:, t] * running
        advantages[:, t] = running
    return advantages
