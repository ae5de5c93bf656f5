"""The rollout: observations stored once, the memory timeline, what was done and what came of it, advantages."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import ActorCriticModel, Prediction
from transformer import MemoryView
from utils import Task
from windows import Windows
from worker import SharedArrays

# How many columns beyond the longest window a group of training queries may stretch over: more columns serve more
# queries with one product, but each query pays for all of them.
STRETCH = 64
# A minibatch of many distinct frames is filled up to a multiple: oneDNN takes five times as long for the gradient of a
# layer's weights where it cannot divide the rows evenly.
MANY_FRAMES, FRAMES_MULTIPLE = 512, 16


class Timeline:
    """Episodic memory of all environments over rollout time.

    Column L + t holds what step t of this rollout wrote, the first L columns the last L of the previous rollout. What a
    step may look at are the last min(step, L) columns in front of it, so that nothing depends on the number or the
    length of episodes.

    Args:
        model: whose memory it is.
        config: the `transformer` section of a config.
        n_workers: number of environments.
        steps: number of columns beyond the first L.
        device: where it lives.
    """

    def __init__(self, model: ActorCriticModel, config: dict, n_workers: int, steps: int, device: torch.device) -> None:
        self.transformer, self.length, self.device = model.transformer, config["memory_length"], device
        columns = self.length + steps
        self.items = torch.zeros(config["num_blocks"], n_workers, columns, config["embed_dim"], device=device)
        self.item_step = torch.zeros(n_workers, columns, dtype=torch.int64, device=device)
        self.offsets = torch.arange(columns, device=device)
        self.stretch = STRETCH
        # A GPU wants equal shapes at every step; elsewhere columns that nobody may look at are left out.
        self.narrow = device.type != "cuda"
        # Whether attention reads windows where they lie, or copies of stretches. Learned positions have a gradient.
        self.in_place = device.type == "cpu" and self.transformer.encoding != "learned"

    def to_device(self, array: np.ndarray) -> Tensor:
        """Copy a NumPy array to the timeline's device without waiting for it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def window(self, workers: slice, t: int, step: np.ndarray) -> Windows | MemoryView:
        """Return what the step at column L + t of some environments may look at: a plain slice of the timeline.

        Args:
            workers: n neighbouring environments.
            t: rollout time.
            step: (n,) episode step of each.
        """
        valid = np.minimum(step, self.length)
        # The loops over windows run in one thread: the others would have to be woken up again behind each of them.
        if self.in_place and torch.get_num_threads() == 1:
            end = np.full(len(step), self.length + t)
            return Windows(self.items, np.arange(workers.start, workers.stop), end - valid, end)
        width = max(1, int(valid.max())) if self.narrow else self.length
        columns = slice(self.length + t - width, self.length + t)
        valid = self.to_device(valid)[:, None]  # (n, 1)
        return MemoryView(
            items=self.items[:, workers, columns],
            mask=(self.offsets[:width] >= width - valid)[:, None],  # (n, 1, width)
            nonempty=(valid > 0).float(),
            distance=(width - self.offsets[:width]).expand(len(step), 1, width),
            item_step=self.item_step[workers, columns],
        )

    def write(self, workers: slice, t: int, inputs: Tensor, step: np.ndarray) -> None:
        """Store what the blocks received (blocks, n, D) at episode step `step` (n,) in column L + t."""
        step = self.to_device(step)
        self.items[:, workers, self.length + t] = self.transformer.to_items(inputs, step).float()
        self.item_step[workers, self.length + t] = step

    def roll(self, steps: int) -> None:
        """Move the last L of the first L + `steps` columns to the front, where a new rollout starts."""
        self.items[:, :, : self.length] = self.items[:, :, steps : steps + self.length].clone()
        self.item_step[:, : self.length] = self.item_step[:, steps : steps + self.length].clone()

    def group(self, worker: np.ndarray, t: np.ndarray, step: np.ndarray, per_group: int) -> "Windows | QueryGroups":
        """Return what any samples of the rollout may look at, or how they are to share columns for it.

        Args:
            worker: (N,) environment of each sample.
            t: (N,) rollout time of each.
            step: (N,) episode step of each.
            per_group: Q, the most samples of a group.
        """
        valid, end = np.minimum(step, self.length), t + self.length
        if self.in_place:
            return Windows(self.items, worker, end - valid, end)
        longest = int(valid.max()) if self.narrow else self.length
        columns = min(longest + self.stretch, self.items.shape[2])
        owner, start, slot = group_queries(worker, end - valid, end, per_group, columns)
        return QueryGroups(end - valid, end, slot, owner, start, per_group, columns)

    def view(self, groups: "Windows | QueryGroups") -> Windows | MemoryView:
        """Return what the queries that `group` got may look at."""
        if isinstance(groups, Windows):
            return groups
        relative, learned = self.transformer.encoding == "relative", self.transformer.encoding == "learned"
        per_group, slot, total = groups.per_group, groups.slot, self.items.shape[2]
        columns = max(1, int(groups.widths().max())) if self.narrow else groups.columns  # K
        start, count = np.minimum(groups.start, total - columns), len(groups.start)
        places = count * per_group
        source = np.zeros(places, dtype=np.int64)
        source[slot] = np.arange(len(slot))
        # Places that only fill up a group keep end = first = 0 and so see nothing.
        place_first, place_end = np.zeros((2, places), dtype=np.int64)
        place_first[slot] = groups.first - start[slot // per_group]
        place_end[slot] = groups.end - start[slot // per_group]
        ends = self.to_device(place_end).view(count, per_group, 1)
        firsts = self.to_device(place_first).view(count, per_group, 1)
        offsets = self.offsets[:columns]
        rows = (self.to_device(groups.owner * total + start)[:, None] + offsets).flatten()  # (groups·K,)
        items = self.items.flatten(1, 2).index_select(1, rows)
        return MemoryView(
            items=items.unflatten(1, (count, columns)),
            mask=(offsets < ends) & (offsets >= firsts),
            nonempty=self.to_device(groups.end > groups.first).float()[:, None],
            distance=(ends - offsets).clamp(0, self.length) if relative else None,
            item_step=self.item_step.flatten()[rows].view(count, columns) if learned else None,
            source=self.to_device(source),
            slot=self.to_device(slot),
        )


@dataclass
class QueryGroups:
    """Which of N queries share which columns of the timeline.

    Attributes:
        first: (N,) first column that a query may look at.
        end: (N,) column behind the last one.
        slot: (N,) the place of each query, group·Q + number within the group.
        owner: (groups,) environment of each group.
        start: (groups,) first column of each group.
        per_group: Q.
        columns: the most columns of a group.
    """

    first: np.ndarray
    end: np.ndarray
    slot: np.ndarray
    owner: np.ndarray
    start: np.ndarray
    per_group: int
    columns: int

    def widths(self) -> np.ndarray:
        """Return (groups,): how many columns each group stretches over."""
        ends = self.start.copy()
        np.maximum.at(ends, self.slot // self.per_group, self.end)
        return ends - self.start

    def split(self, parts: int) -> list[tuple[np.ndarray, "QueryGroups"]]:
        """Divide the queries into equal parts, wide groups first: every query pays for the widest group of its part.

        Returns:
            Of each part the queries (n,), and how they share columns.
        """
        group, place = np.divmod(self.slot, self.per_group)
        divided = []
        for queries in np.array_split(np.lexsort((self.slot, -self.widths()[group])), parts):
            kept, number = np.unique(group[queries], return_inverse=True)
            slot = number * self.per_group + place[queries]
            where = self.first[queries], self.end[queries], slot, self.owner[kept], self.start[kept]
            divided.append((queries, QueryGroups(*where, self.per_group, self.columns)))
        return divided


def group_queries(
    worker: np.ndarray, first: np.ndarray, end: np.ndarray, per_group: int, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put queries whose windows lie close together into groups.

    Args:
        worker: (N,) environment of each query.
        first: (N,) first column that it may look at.
        end: (N,) column behind the last one.
        per_group: Q, the most queries of a group.
        columns: K, the most columns from the first to the last of a group; at least as long as any window.

    Returns:
        The environment and the first column of each group, and the place (N,) of each query, group·Q + number within
        the group.
    """
    owners, starts, slot = [], [], np.empty(len(worker), dtype=np.int64)
    owner, count, limit = -1, per_group, 0
    order = np.lexsort((end, first, worker))
    for query, w, low, high in zip(
        order.tolist(), worker[order].tolist(), first[order].tolist(), end[order].tolist(), strict=True
    ):
        if w != owner or count == per_group or high > limit:
            owner, count, limit = w, 0, low + columns
            owners.append(owner)
            starts.append(low)
        slot[query] = (len(starts) - 1) * per_group + count
        count += 1
    return np.array(owners, dtype=np.int64), np.array(starts, dtype=np.int64), slot


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


class FrameStore:
    """The distinct uint8 frames of a rollout, with their features under the weights that sample it.

    Grid worlds show the same frames over and over. Each is stored, sent to the device and encoded once.

    Args:
        shape: (C, H, W) of a frame.
        embed_dim: D.
        device: where it lives.
    """

    def __init__(self, shape: tuple[int, ...], embed_dim: int, device: torch.device) -> None:
        channels, height, width = shape
        self.frames = torch.empty(0, height, width, channels, dtype=torch.uint8, device=device)
        self.features = torch.empty(0, embed_dim, device=device)
        self.clear()

    def clear(self) -> None:
        """Forget everything: a new rollout starts, under new weights."""
        self.known: dict[bytes, int] = {}
        self.encoded = 0

    def __len__(self) -> int:
        return len(self.known)

    def add(self, frames: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Store the frames (n, H, W, C) whose digests (n, 16) are new; return the index (n,) of all."""
        count = len(self.known)
        keys = [digest.tobytes() for digest in digests]
        index = np.array([self.known.setdefault(key, len(self.known)) for key in keys], dtype=np.int64)
        added = len(self.known) - count
        if added:
            _, first = np.unique(index, return_index=True)  # of frames that are new twice, the first
            new = torch.from_numpy(frames[first[-added:]])  # a copy: the workers will write over theirs
            self._reserve(count + added)
            on_gpu = self.frames.is_cuda
            self.frames[count : count + added].copy_(new.pin_memory() if on_gpu else new, non_blocking=on_gpu)
        return index

    def _reserve(self, count: int) -> None:
        """Make room for `count` frames, at least twice as many as before."""
        capacity = self.frames.shape[0]
        if count > capacity:
            capacity = max(count, 2 * capacity, 256)
            for name in ("frames", "features"):
                old = getattr(self, name)
                new = old.new_empty(capacity, *old.shape[1:])
                new[: len(old)] = old
                setattr(self, name, new)

    def embed(self, model: ActorCriticModel, index: np.ndarray) -> Tensor:
        """Return (n, D) embedded frames while sampling; only those not seen before in this rollout are encoded."""
        count = len(self.known)
        if count > self.encoded:
            new = slice(self.encoded, count)
            self.features[new] = model.embed(self.frames[new].permute(0, 3, 1, 2)).float()
            self.encoded = count
        return self.features[self._index(index)]

    def gather(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the distinct frames (M, C, H, W) among `index` (N,) and the place (N,) of each sample among them.

        Many frames are filled up with copies of the last one to a multiple of `FRAMES_MULTIPLE`.
        """
        distinct, inverse = np.unique(index, return_inverse=True)
        if len(distinct) > MANY_FRAMES:
            distinct = np.pad(distinct, (0, -len(distinct) % FRAMES_MULTIPLE), mode="edge")
        frames = self.frames.index_select(0, self._index(distinct)).permute(0, 3, 1, 2)
        return frames, self._index(inverse)

    def _index(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(index).to(self.frames.device, non_blocking=True)


class VectorStore:
    """The observation vectors of a rollout; the interface is that of `FrameStore`.

    Args:
        shape: (n,) of an observation.
        capacity: how many there can be at most.
        device: where it lives.
    """

    def __init__(self, shape: tuple[int, ...], capacity: int, device: torch.device) -> None:
        self.vectors = torch.empty(capacity, *shape, device=device)
        self.clear()

    def clear(self) -> None:
        """Forget everything: a new rollout starts."""
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def add(self, vectors: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Store vectors (n, size) and return the index (n,) of each; `digests` are not needed."""
        index = np.arange(self.count, self.count + len(vectors))
        self.count += len(vectors)
        self.vectors[self.count - len(vectors) : self.count] = torch.from_numpy(vectors)
        return index

    def embed(self, model: ActorCriticModel, index: np.ndarray) -> Tensor:
        """Return (n, D) embedded vectors."""
        return model.embed(self.gather(index)[0])

    def gather(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the vectors (N, size) of `index` (N,), and that each sample saw its own."""
        device = self.vectors.device
        vectors = self.vectors[torch.from_numpy(index).to(device, non_blocking=True)]
        return vectors, torch.arange(len(index), device=device)


def policy_step(
    model: ActorCriticModel,
    timeline: Timeline,
    store: FrameStore | VectorStore,
    arrays: SharedArrays,
    rows: slice,
    t: int,
    step: np.ndarray,
) -> tuple[Prediction, np.ndarray]:
    """Let the model see what some environments show, predict, and remember.

    Training, evaluation and watching all act through this function.

    Args:
        model: the actor-critic.
        timeline: the memory, read in front of and written to column L + t.
        store: takes the observations.
        arrays: of the workers.
        rows: n neighbouring environments.
        t: rollout time.
        step: (n,) episode step of each.

    Returns:
        The prediction and the index (n,) of the observations in the store.
    """
    index = store.add(arrays.observations[rows], arrays.digests[rows])
    with torch.inference_mode():
        prediction = model(store.embed(model, index), timeline.window(rows, t, step))
        timeline.write(rows, t, prediction.inputs, step)
    return prediction, index


def make_store(task: Task, embed_dim: int, capacity: int, device: torch.device) -> FrameStore | VectorStore:
    """Return the store for a task's observations, of which there are at most `capacity` before it is cleared."""
    if task.visual:
        return FrameStore(task.observation_shape, embed_dim, device)
    return VectorStore(task.observation_shape, capacity, device)


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
