"""Episodic memory over rollout time, the stores of observations, and the step that all who act with memory take."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from environments.contract import Task
from kernels.groups import MemoryView, QueryGroups, group_queries
from kernels.store import FrameStore
from kernels.transfer import to_device
from kernels.windows import Windows
from model import ActorCriticModel, Prediction
from worker import SharedArrays

if TYPE_CHECKING:
    from run.config import TransformerConfig

# How many columns beyond the longest window a group of training queries may stretch over: more columns serve more
# queries with one product, but each query pays for all of them.
STRETCH = 64


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

    def __init__(
        self, model: ActorCriticModel, config: "TransformerConfig", n_workers: int, steps: int, device: torch.device
    ) -> None:
        self.transformer, self.length, self.device = model.transformer, config.memory_length, device
        columns = self.length + steps
        self.items = torch.zeros(config.num_blocks, n_workers, columns, config.embed_dim, device=device)
        self.item_step = torch.zeros(n_workers, columns, dtype=torch.int64, device=device)
        self.offsets = torch.arange(columns, device=device)
        self.stretch = STRETCH
        # A GPU wants equal shapes at every step; elsewhere columns that nobody may look at are left out.
        self.narrow = device.type != "cuda"
        # Whether attention reads windows where they lie, or copies of stretches. Learned positions have a gradient.
        self.in_place = device.type == "cpu" and self.transformer.encoding != "learned"

    def to_device(self, array: np.ndarray) -> Tensor:
        """Copy a NumPy array to the timeline's device without waiting for it."""
        return to_device(array, self.device)

    def window(self, workers: slice, t: int, step: np.ndarray) -> Windows | MemoryView:
        """Return what the step at column L + t of some environments may look at: a plain slice of the timeline.

        For sampling; `group` and `view` say the same of any samples of a rollout, for training.

        Args:
            workers: n neighbouring environments.
            t: rollout time.
            step: (n,) episode step of each.
        """
        # An episode's first step has number 0: so many steps back, and no further, its memory goes.
        valid = np.minimum(step, self.length)
        # The loops over windows run in one thread. Where products have several, these would have to be woken up again
        # after each loop: there a slice with a mask is read by products, too.
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
        steps = self.to_device(step)
        self.items[:, workers, self.length + t] = self.transformer.to_items(inputs, steps).float()
        self.item_step[workers, self.length + t] = steps

    def roll(self, steps: int) -> None:
        """Move the last L of the first L + `steps` columns to the front, where a new rollout starts."""
        self.items[:, :, : self.length] = self.items[:, :, steps : steps + self.length].clone()
        self.item_step[:, : self.length] = self.item_step[:, steps : steps + self.length].clone()

    def group(self, worker: np.ndarray, t: np.ndarray, step: np.ndarray, per_group: int) -> Windows | QueryGroups:
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
        longest = int(valid.max(initial=0)) if self.narrow else self.length
        columns = min(longest + self.stretch, self.items.shape[2])
        owner, start, slot = group_queries(worker, end - valid, end, per_group, columns)
        return QueryGroups(end - valid, end, slot, owner, start, per_group, columns)

    def view(self, groups: Windows | QueryGroups) -> Windows | MemoryView:
        """Return what the queries that `group` got may look at."""
        if isinstance(groups, Windows):
            return groups
        learned, relative = self.transformer.encoding == "learned", self.transformer.encoding == "relative"
        item_step, longest = self.item_step if learned else None, self.length if relative else None
        return groups.view(self.items, item_step, longest, self.narrow)


class ObservationStore:
    """The observations of a rollout: distinct frames, or vectors as they come, or both.

    Args:
        task: what is observed.
        embed_dim: D.
        capacity: how many observations there can be at most before the store is cleared.
        device: where it lives.
    """

    def __init__(self, task: Task, embed_dim: int, capacity: int, device: torch.device) -> None:
        self.device, self.count = device, 0
        self.frames = None if task.frame is None else FrameStore(task.frame, embed_dim, device)
        self.vectors = torch.empty(capacity, task.vector, device=device) if task.vector else None
        self.frame_of = np.zeros(capacity, dtype=np.int64)  # where there are both: the frame of each vector

    def clear(self) -> None:
        """Forget everything: a new rollout starts, under new weights."""
        self.count = 0
        if self.frames is not None:
            self.frames.clear()

    def __len__(self) -> int:
        """Return the number of distinct observations: of frames, where there are any."""
        return self.count if self.frames is None else len(self.frames)

    def add(self, arrays: SharedArrays, rows: slice, final: bool = False) -> np.ndarray:
        """Store what n environments show, or what they showed behind a time limit; return the index (n,) of each."""
        index = np.zeros(0, dtype=np.int64)
        if self.frames is not None:
            frames = arrays.final_frames if final else arrays.frames
            digests = arrays.final_frame_digests if final else arrays.frame_digests
            index = self.frames.add(frames[rows], digests[rows])
        if self.vectors is not None:
            vectors = (arrays.final_vectors if final else arrays.vectors)[rows]
            places = np.arange(self.count, self.count + len(vectors))
            self.count += len(vectors)
            self.vectors[self.count - len(vectors) : self.count] = torch.from_numpy(vectors)
            if self.frames is not None:
                self.frame_of[places] = index
            index = places
        return index

    def frame_index(self, index: np.ndarray) -> np.ndarray:
        """Return which distinct frame belongs to each observation of `index`, of any shape."""
        return index if self.vectors is None else self.frame_of[index]

    def vectors_of(self, index: np.ndarray) -> Tensor | None:
        """Return the vectors (N, n) of `index` (N,), None where there are none."""
        return None if self.vectors is None else self.vectors[to_device(index, self.device)]

    def embed(self, model: ActorCriticModel, index: np.ndarray, step: np.ndarray) -> Tensor:
        """Return h⁰ (N, D) of observations `index` (N,) at episode steps `step` (N,), under constant weights."""
        vectors, steps = self.vectors_of(index), to_device(step, self.device)
        if self.frames is None:
            return model.complete(model.embed(vectors), None, steps)
        return model.complete(self.frames.embed(model.embed, self.frame_index(index)), vectors, steps)

    def gather(self, index: np.ndarray) -> tuple[Tensor, int, Tensor, Tensor | None]:
        """Return what observations `index` (N,) share, for `ActorCriticModel.embed` and `complete`.

        Returns:
            The distinct frames (M, C, H, W), or the vectors (N, n) where there are no frames, perhaps followed by some
            that fill up; M; which of these each observation is (N,); and the vectors (N, n) beside frames, else None.
        """
        vectors = self.vectors_of(index)
        if self.frames is None:
            return vectors, len(index), torch.arange(len(index), device=self.device), None
        return *self.frames.gather(self.frame_index(index)), vectors

    def moments(self) -> Tensor:
        """Return what `RunningMoments.update` takes of all vectors stored so far."""
        vectors = self.vectors[: self.count].double()
        count = torch.tensor([float(self.count)], dtype=torch.float64, device=self.device)
        return torch.cat((count, vectors.sum(dim=0), (vectors**2).sum(dim=0)))


def policy_step(
    model: ActorCriticModel,
    forward: Callable[..., Prediction],
    timeline: Timeline,
    store: ObservationStore,
    arrays: SharedArrays,
    rows: slice,
    t: int,
    step: np.ndarray,
) -> tuple[Prediction, np.ndarray, Tensor | None]:
    """Let the model see what some environments show, predict, and remember.

    Training, evaluation and watching all act through this function.

    Args:
        model: the actor-critic.
        forward: its forward pass, perhaps compiled.
        timeline: the memory, read in front of and written to column L + t.
        store: takes the observations.
        arrays: of the workers.
        rows: n neighbouring environments.
        t: rollout time.
        step: (n,) episode step of each.

    Returns:
        The prediction, the index (n,) of the observations in the store, and the mask (n, sum of actions) of what was
        allowed, None where everything is.
    """
    index = store.add(arrays, rows)
    mask = None if arrays.masks is None else to_device(arrays.masks[rows].copy(), timeline.device)
    with torch.inference_mode():
        prediction = forward(store.embed(model, index, step), timeline.window(rows, t, step), mask)
        timeline.write(rows, t, prediction.inputs, step)
    return prediction, index, mask
