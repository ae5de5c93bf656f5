"""What memory keeps over rollout time, the stores of observations, and the step that all who act with memory take."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from environments.contract import Task
from kernels.groups import group_queries
from kernels.store import FrameStore
from kernels.transfer import to_device
from model import ActorCriticModel, Output
from recurrence import Fragments, Memoryless, Recurrence
from transformer import MemoryView, Transformer
from worker import SharedArrays

# How many columns beyond the longest window a group of training queries may stretch over: more columns serve more
# queries with one product, but each query pays for all of them.
STRETCH = 64


class Timeline:
    """A transformer's memory: the items of all environments over rollout time.

    Column L + t holds what step t of this rollout wrote, the first L columns the last L of the previous rollout. What a
    step may look at are the last min(step, L) columns before its own, so that nothing depends on the number or the
    length of episodes. A rollout has `steps` steps. Where products are in bfloat16, so are stored items: they are read
    far more often than written, and to cast them for every step took as long as all else that the policy does.
    """

    def __init__(
        self, transformer: Transformer, n_workers: int, steps: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.transformer, self.length, self.device = transformer, transformer.memory_length, device
        columns, blocks = self.length + steps, len(transformer.blocks)
        self.items = torch.zeros(blocks, n_workers, columns, transformer.embed_dim, dtype=dtype, device=device)
        self.item_step = torch.zeros(n_workers, columns, dtype=torch.int64, device=device)
        # A GPU wants equal shapes at every step; elsewhere columns that nobody may look at are left out.
        self.narrow = device.type != "cuda"

    def past(self, workers: slice, t: int, step: np.ndarray) -> MemoryView:
        """Return what n neighbouring environments may look at in rollout step t: a plain slice of the timeline.

        `step` (n,) are their episode steps. For sampling; `past_of` says the same of any steps, for training.
        """
        # An episode's first step has number 0: so many steps back, and no further, its memory goes.
        valid = np.minimum(step, self.length)
        width = max(1, int(valid.max())) if self.narrow else self.length
        columns = slice(self.length + t - width, self.length + t)
        seen = to_device(valid, self.device)[:, None]  # (n, 1)
        return MemoryView(
            items=self.items[:, workers, columns],
            distance=torch.full_like(seen, width),
            valid=seen,
            nonempty=(seen > 0).float(),
            item_step=self.item_step[workers, columns],
        )

    def past_of(self, worker: np.ndarray, start: np.ndarray, step: np.ndarray) -> MemoryView:
        """Return what the steps of G segments, each of S consecutive steps, may look at.

        A segment is of environment `worker` (G,) and starts in rollout step `start` (G,); `step` (G, S) are episode
        steps. Segments of one step share columns with their neighbours; longer ones see what they write themselves.
        """
        if step.shape[1] == 1:
            return self._grouped(worker, start, step[:, 0])
        own, valid = np.arange(step.shape[1]), np.minimum(step, self.length)
        # Before a segment lie the columns that its steps look at and do not write themselves.
        width = max(1, int((valid - own).max(initial=0))) if self.narrow else self.length
        return MemoryView(
            distance=to_device(np.broadcast_to(width + own, step.shape).copy(), self.device),
            valid=to_device(valid, self.device),
            nonempty=to_device(valid.reshape(-1, 1) > 0, self.device).float(),
            own=len(own),
            step=to_device(step.flatten(), self.device),
            **self._columns(worker, start + self.length - width, width),
        )

    def _grouped(self, worker: np.ndarray, t: np.ndarray, step: np.ndarray) -> MemoryView:
        """Return what any N steps may look at, in groups that share columns; worker, t and step are (N,)."""
        valid, end = np.minimum(step, self.length), t + self.length  # `end` is the query's own column
        total = self.items.shape[2]
        # As many queries to a group as a stretch has on average.
        per_group = max(1, STRETCH * len(t) // max(1, len(np.unique(worker)) * (total - self.length)))
        longest = int(valid.max(initial=0)) if self.narrow else self.length
        columns = min(longest + STRETCH, total)
        owner, first, slot = group_queries(worker, end - valid, end, per_group, columns)
        if self.narrow:  # no wider than the widest group
            columns = max(1, int((end - first[slot // per_group]).max(initial=0)))
        first = np.minimum(first, total - columns)
        source = np.zeros(len(owner) * per_group, dtype=np.int64)
        # Places that only fill up a group keep a valid of 0 and so see nothing.
        distance, seen = np.zeros((2, *source.shape), dtype=np.int64)
        source[slot], distance[slot], seen[slot] = np.arange(len(slot)), end - first[slot // per_group], valid
        return MemoryView(
            distance=to_device(distance.reshape(-1, per_group), self.device),
            valid=to_device(seen.reshape(-1, per_group), self.device),
            nonempty=to_device(valid[:, None] > 0, self.device).float(),
            source=to_device(source, self.device),
            slot=to_device(slot, self.device),
            **self._columns(owner, first, columns),
        )

    def _columns(self, worker: np.ndarray, first: np.ndarray, width: int) -> dict[str, Any]:
        """Return what a view says of groups with `width` columns of an environment each, from `first` (groups,) on."""
        rows = to_device(worker * self.items.shape[2] + first, self.device)[:, None]
        rows = rows + torch.arange(width, device=self.device)
        steps = self.item_step.flatten()[rows] if self.transformer.encoding == "learned" else None
        return {"items": self.items.flatten(1, 2), "rows": rows, "item_step": steps}

    def write(self, workers: slice, t: int, kept: Tensor, step: np.ndarray) -> None:
        """Store what the blocks received (blocks, n, D) at episode step `step` (n,) in column L + t."""
        steps = to_device(step, self.device)
        self.items[:, workers, self.length + t] = self.transformer.to_items(kept, steps)
        self.item_step[workers, self.length + t] = steps

    def roll(self, steps: int) -> None:
        """Move the last L of the first L + `steps` columns to the front, where a new rollout starts."""
        self.items[:, :, : self.length] = self.items[:, :, steps : steps + self.length].clone()
        self.item_step[:, : self.length] = self.item_step[:, steps : steps + self.length].clone()

    def replay(self, workers: slice, x: Tensor, step: np.ndarray) -> Tensor:
        """Return the outputs (n·T, D) of whole rollouts with the memory that the current weights would have written.

        There is no loop over time: the input of a block at all steps gives all items that the block reads. Older
        rollouts' items stay as they are. x (n·T, D) are embedded observations, `step` (n, T) their episode steps.
        """
        n, steps = step.shape
        worker, t = np.divmod(np.arange(step.size), steps)
        view = self._grouped(worker + workers.start, t, step.flatten())
        view.rows -= workers.start * self.items.shape[2]
        bias, item_steps = view.bias(self.transformer.num_heads), to_device(step.flatten(), self.device)
        for index, block in enumerate(self.transformer.blocks):
            items = self.items[index, workers].clone()
            items[:, self.length :] = self.transformer.to_items(x, item_steps).view(n, steps, -1)
            own = replace(view, items=items.flatten(0, 1)[None])
            x, _ = block(x, self.transformer.columns(own, 0, x), own, bias)
        return x

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the next rollout remembers, by environment."""
        items = self.items[:, :, : self.length].transpose(0, 1)
        return {"items": items.clone(), "item_step": self.item_step[:, : self.length].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        self.items[:, :, : self.length] = state["items"].transpose(0, 1).to(self.device)
        self.item_step[:, : self.length] = state["item_step"].to(self.device)


class States:
    """A recurrent cell's memory: its state before every step of a rollout; without memory, one of width 0."""

    def __init__(self, core: Recurrence | Memoryless, n_workers: int, steps: int, device: torch.device) -> None:
        self.core, self.device = core, device
        self.states = torch.zeros(n_workers, steps + 1, core.state_size, device=device)

    def past(self, workers: slice, t: int, step: np.ndarray) -> Fragments:
        """Return the state before step t of some environments; arguments as for `Timeline.past`."""
        return self.past_of(np.arange(workers.start, workers.stop), np.full(len(step), t), step[:, None])

    def past_of(self, worker: np.ndarray, start: np.ndarray, step: np.ndarray) -> Fragments:
        """Return the fragments that G segments consist of; arguments as for `Timeline.past_of`.

        A segment's first fragment continues from the stored state. Where an episode begins, one begins from zero.
        """
        begins = step == 0
        begins[:, 0] = True
        first = np.flatnonzero(begins)
        length = np.diff(np.append(first, step.size))
        longest_first = np.argsort(-length, kind="stable")
        first, length = first[longest_first], length[longest_first]
        within = np.arange(length.max(initial=0))[:, None]
        there = within < length  # (longest, F): first steps of all fragments, then second ones, …
        group, place = np.divmod(first, step.shape[1])
        state = self.states[to_device(worker[group], self.device), to_device(start[group] + place, self.device)]
        continued = to_device(step.flat[first] > 0, self.device)[:, None]
        order, sizes = to_device((first + within)[there], self.device), torch.from_numpy(there.sum(axis=1))
        return Fragments(state * continued, order, sizes)

    def write(self, workers: slice, t: int, kept: Tensor, step: np.ndarray) -> None:
        """Store the state (n, state_size) after step t, which is that before the next one."""
        self.states[workers, t + 1] = kept

    def roll(self, steps: int) -> None:
        """Let a new rollout start with the state after `steps` steps."""
        self.states[:, 0] = self.states[:, steps]

    def replay(self, workers: slice, x: Tensor, step: np.ndarray) -> Tensor:
        """Return the outputs (n·T, D) of whole rollouts, unrolled from their start; arguments as `Timeline.replay`."""
        worker = np.arange(workers.start, workers.stop)
        return self.core(x, self.past_of(worker, np.zeros_like(worker), step))[0]

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the next rollout starts with, by environment."""
        return {"states": self.states[:, 0].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        self.states[:, 0] = state["states"].to(self.device)


def make_memory(
    model: ActorCriticModel, n_workers: int, steps: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Timeline | States:
    """Return the memory of a model's core for rollouts of so many environments and steps, and products of this type."""
    if isinstance(model.core, Transformer):
        return Timeline(model.core, n_workers, steps, device, dtype)
    return States(model.core, n_workers, steps, device)


class ObservationStore:
    """The observations of a rollout, at most `capacity`: distinct frames, or vectors as they come, or both."""

    def __init__(self, task: Task, embed_dim: int, capacity: int, device: torch.device) -> None:
        self.device, self.count = device, 0
        self.frames = None if task.frame is None else FrameStore(task.frame, embed_dim, device)
        self.vectors = torch.empty(capacity, task.vector, device=device) if task.vector else None
        self.frame_of = np.zeros(capacity, dtype=np.int64)  # where there are both: the frame of each vector

    def clear(self) -> None:
        """Forget all observations."""
        self.count = 0
        if self.frames is not None:
            self.frames.clear()

    def forget_features(self) -> None:
        """Let frames be encoded anew: the weights have changed."""
        if self.frames is not None:
            self.frames.encoded = 0

    def __len__(self) -> int:
        """Return the number of distinct observations: of frames, where there are any."""
        return self.count if self.frames is None else len(self.frames)

    def add(self, arrays: SharedArrays, rows: slice) -> np.ndarray:
        """Store what n environments show; return the index (n,) of each."""
        index = np.zeros(0, dtype=np.int64)
        if self.frames is not None:
            index = self.frames.add(arrays.frames[rows], arrays.frame_digests[rows])
        if self.vectors is not None:
            vectors = arrays.vectors[rows]
            places = np.arange(self.count, self.count + len(vectors))
            self.count += len(vectors)
            self.vectors[places[0] : self.count] = to_device(vectors.copy(), self.device)  # workers write over theirs
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

    def gather(self, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what observations `index` (N,) share, for `ActorCriticModel.embed` and `complete`.

        These are the distinct frames (M, C, H, W), or the vectors (N, n) where there are no frames; which of these each
        observation is (N,); and the vectors (N, n) beside frames, else None.
        """
        vectors = self.vectors_of(index)
        if self.frames is None:
            return vectors, torch.arange(len(index), device=self.device), None
        return *self.frames.gather(self.frame_index(index)), vectors

    def moments(self) -> Tensor:
        """Return what `RunningMoments.update` takes of all vectors stored so far."""
        vectors = self.vectors[: self.count].double()
        count = torch.tensor([float(self.count)], dtype=torch.float64, device=self.device)
        return torch.cat((count, vectors.sum(dim=0), (vectors**2).sum(dim=0)))


def policy_step(
    model: ActorCriticModel, forward: Callable[..., Output], memory: Timeline | States, store: ObservationStore,
    arrays: SharedArrays, rows: slice, t: int, step: np.ndarray,
) -> tuple[Output, np.ndarray, Tensor | None]:  # fmt: skip
    """Let the model see what n neighbouring environments show, at episode steps `step` (n,), and remember.

    Training, evaluation and watching all act through this function. `forward` is the model's, perhaps compiled; memory
    is read before rollout step t and written after it.

    Returns:
        The model's output, the index (n,) of the observations in the store, and the mask (n, sum of actions) of what
        was allowed, None where everything is.
    """
    index = store.add(arrays, rows)
    mask = None if arrays.masks is None else to_device(arrays.masks[rows].copy(), memory.device)
    # Inference mode is a little faster, but in it autocast would cast all weights at every step.
    with torch.no_grad() if torch.is_autocast_enabled(memory.device.type) else torch.inference_mode():
        output = forward(store.embed(model, index, step), memory.past(rows, t, step), mask)
        memory.write(rows, t, output.kept, step)
    return output, index, mask
