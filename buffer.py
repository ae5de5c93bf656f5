"""The rollout: what was done and what came of it, advantages."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.groups import QueryGroups
from kernels.windows import Windows
from memory import STRETCH, Timeline, make_store
from model import ActorCriticModel
from utils import Task


@dataclass
class Minibatch:
    """What one optimiser step, or a part of it, learns from: N samples that saw M distinct observations.

    Attributes:
        observations: (M, *observation_shape), perhaps followed by some that no sample saw.
        which: (N,) int64 the observation that each sample saw.
        groups: what the samples may look at, or how they share memory columns for it.
        actions: (N, branches).
        log_probs: (N, branches) when they were sampled.
        values: (N,) when they were sampled.
        returns: (N,).
        advantages: (N,), normalised over the whole minibatch where the config says so.
        shown: (N, M) bool, whether the running episode had shown an observation; None without the recall task.
        known: (N, 1) bool, whether that is known; None without the recall task.
    """

    observations: Tensor
    which: Tensor
    groups: Windows | QueryGroups
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    returns: Tensor
    advantages: Tensor
    shown: Tensor | None = None
    known: Tensor | None = None

    def __len__(self) -> int:
        return len(self.which)

    def split(self, parts: int) -> list["Minibatch"]:
        """Divide the samples into equal parts."""
        if parts == 1:
            return [self]
        return [self._part(torch.from_numpy(samples), groups) for samples, groups in self.groups.split(parts)]

    def _part(self, samples: Tensor, groups: Windows | QueryGroups) -> "Minibatch":
        per_sample = (self.actions, self.log_probs, self.values, self.returns, self.advantages, self.shown, self.known)
        chosen = [None if tensor is None else tensor[samples] for tensor in per_sample]
        return Minibatch(self.observations, self.which[samples], groups, *chosen)


class Buffer:
    """One rollout of all environments: W environments × T steps.

    What the host decides on (rewards, ends, episode steps, indices of observations) are NumPy arrays, what only the
    model needs lives on the training device.

    Args:
        config: a checked config.
        model: the model that samples.
        task: what the environments are like.
        device: the training device.
    """

    def __init__(self, config: dict, model: ActorCriticModel, task: Task, device: torch.device) -> None:
        shape = (config["n_workers"], config["worker_steps"])
        self.n_workers, self.worker_steps = shape
        self.gamma, self.lamda = config["gamma"], config["lamda"]
        self.minibatch_size = self.n_workers * self.worker_steps // config["n_mini_batch"]
        # As many queries per group as a minibatch has on average in a stretch.
        self.per_group = max(1, STRETCH // config["n_mini_batch"])
        self.timeline = Timeline(model, config["transformer"], *shape, device)
        # Every step can be the last of an episode and leave a final observation.
        capacity = self.n_workers * (2 * self.worker_steps + 1)
        self.observations = make_store(task, config["transformer"]["embed_dim"], capacity, device)
        branches = len(model.branches)
        self.actions = torch.zeros(*shape, branches, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(*shape, branches, device=device)
        self.values = torch.zeros(shape, device=device)
        self.advantages = torch.zeros(shape, device=device)
        self.observation_index = np.zeros(shape, dtype=np.int64)
        self.step = np.zeros(shape, dtype=np.int64)
        self.rewards = np.zeros(shape, dtype=np.float32)
        self.terminated = np.zeros(shape, dtype=bool)
        self.truncated = np.zeros(shape, dtype=bool)
        self.final_index: dict[tuple[int, int], int] = {}  # observation behind the truncated step (worker, t)
        self.seen: np.ndarray | None = None  # of the recall task

    def begin(self) -> None:
        """Start a new rollout: the newest L memory columns stay, everything else is forgotten."""
        self.observations.clear()
        self.final_index.clear()

    def bootstrap(self, model: ActorCriticModel, last_index: np.ndarray, last_step: np.ndarray) -> Tensor:
        """Return (W, T) on the CPU: the value of what followed each step, where an episode did not terminate there.

        Args:
            model: the model that sampled.
            last_index: (W,) observation behind the last step.
            last_step: (W,) its episode step.
        """
        cut = list(self.final_index)
        worker = np.array([*range(self.n_workers), *(w for w, _ in cut)])
        t = np.array([self.worker_steps] * self.n_workers + [t + 1 for _, t in cut])
        step = np.concatenate((last_step, [self.step[w, t] + 1 for w, t in cut])).astype(np.int64)
        index = np.concatenate((last_index, list(self.final_index.values()))).astype(np.int64)
        memory = self.timeline.view(self.timeline.group(worker, t, step, self.per_group))
        following = model(self.observations.embed(model, index), memory).value.cpu()
        values = self.values.cpu()
        next_values = torch.cat((values[:, 1:], following[: self.n_workers, None]), dim=1)
        for (w, t), value in zip(cut, following[self.n_workers :], strict=True):
            next_values[w, t] = value
        return next_values

    def compute_advantages(self, next_values: Tensor) -> None:
        """Fill `advantages` by generalised advantage estimation (Schulman et al. 2016, eq. 16).

        Args:
            next_values: (W, T) of `bootstrap`; where an episode was truncated, the value of its final observation.
        """
        advantages = generalised_advantages(
            torch.from_numpy(self.rewards),
            torch.from_numpy(self.terminated),
            torch.from_numpy(self.truncated),
            self.values.cpu(),
            next_values,
            self.gamma,
            self.lamda,
        )
        self.advantages.copy_(advantages)

    def minibatches(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the samples of one epoch, fully shuffled, as flat indices w·T + t of equally large minibatches."""
        order = generator.permutation(self.n_workers * self.worker_steps)
        for start in range(0, len(order), self.minibatch_size):
            yield np.sort(order[start : start + self.minibatch_size])

    def minibatch(self, samples: np.ndarray, normalize: bool) -> Minibatch:
        """Return what an optimiser step needs of `samples` (N,).

        Args:
            samples: flat indices w·T + t.
            normalize: whether to bring the advantages to mean 0 and standard deviation 1.
        """
        observations, which = self.observe(samples)
        rollout = (self.actions, self.log_probs, self.values, self.advantages)
        index = self.timeline.to_device(samples)
        actions, log_probs, values, advantages = (tensor.flatten(0, 1)[index] for tensor in rollout)
        returns = values + advantages
        if normalize:
            advantages = normalised(advantages)
        minibatch = Minibatch(observations, which, self.group(samples), actions, log_probs, values, returns, advantages)
        if self.seen is not None:
            minibatch.shown, minibatch.known = self.recall_targets(samples)
        return minibatch

    def observe(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the distinct observations of `samples` (N,) and which of them each saw (N,)."""
        return self.observations.gather(self.observation_index.flat[samples])

    def group(self, samples: np.ndarray) -> Windows | QueryGroups:
        """Return what `samples` (N,) may look at, or how they share memory columns for it."""
        worker, t = np.divmod(samples, self.worker_steps)
        return self.timeline.group(worker, t, self.step[worker, t], self.per_group)

    def note_seen(self) -> None:
        """Fill `seen`: which distinct frames the running episode has shown in front of each step of this rollout."""
        shape = (self.n_workers, self.worker_steps)
        self.seen = np.zeros((*shape, len(self.observations)), dtype=bool)
        running, everyone = np.zeros((self.n_workers, len(self.observations)), dtype=bool), np.arange(self.n_workers)
        for t in range(self.worker_steps):
            running[self.step[:, t] == 0] = False
            self.seen[:, t] = running
            running[everyone, self.observation_index[:, t]] = True

    def recall_targets(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return what `samples` (N,) should recall of their minibatch's M distinct frames.

        Returns:
            Whether the episode has shown the frame (N, M), and whether that is known (N, 1): the whole episode lies in
            this rollout and in the memory window.
        """
        worker, t = np.divmod(samples, self.worker_steps)
        distinct = np.unique(self.observation_index.flat[samples])
        known = self.step[worker, t] <= np.minimum(t, self.timeline.length)
        shown = self.seen[worker, t][:, distinct]
        return self.timeline.to_device(shown), self.timeline.to_device(known)[:, None]


def normalised(advantages: Tensor) -> Tensor:
    """Return advantages (N,) with mean 0 and standard deviation 1."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


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
