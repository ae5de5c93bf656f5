"""Queries that share columns of memory: what attention to windows is made of where PyTorch's batched products do it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.transfer import to_device
from kernels.windows import MASKED


@dataclass
class MemoryView:
    """What `Windows` says, by batched products that run on every device and let items have a gradient.

    The N queries come in groups of Q that share one stretch of K memory columns, since the windows of nearby steps
    overlap. The P = groups·Q places are filled up with queries that see nothing and whose context is dropped. A step of
    the policy has one query per group, and every place is taken.

    Attributes:
        items: (blocks, groups, K, D) stored items, a view of the timeline or one copy per group.
        mask: (groups, Q, K) bool, True where the query may attend to the column.
        nonempty: (N, 1) float, 0 where the sample's memory is empty, else 1.
        distance: (groups, Q, K) int64 steps between query and column, from 0 to L; for the relative encoding only.
        item_step: (groups, K) int64 episode step at which the column was written; for the learned encoding only.
        source: (P,) int64 which of the N samples each place holds, the first where none; None where P = N, in order.
        slot: (N,) int64 the place of each sample; None where P = N, in order.
        bias: (groups, Q·heads, K) of `prepare`.
    """

    items: Tensor
    mask: Tensor
    nonempty: Tensor
    distance: Tensor | None = None
    item_step: Tensor | None = None
    source: Tensor | None = None
    slot: Tensor | None = None
    bias: Tensor | None = None

    def prepare(self, heads: int) -> None:
        """Derive once what all blocks add to their scores: MASKED where a query must not look, else 0."""
        groups, _, columns = self.mask.shape
        bias = self.nonempty.new_full((), MASKED).where(~self.mask, 0.0)[:, :, None]  # (groups, Q, 1, K)
        self.bias = bias.expand(-1, -1, heads, -1).reshape(groups, -1, columns)

    def to_places(self, queries: Tensor) -> Tensor:
        """Return (P, width): what belongs to the queries (N, width) in their places."""
        return queries if self.source is None else F.embedding(self.source, queries)

    def scores(self, items: Tensor, questions: Tensor) -> Tensor:
        """Return (groups, Q·heads, K) question·item, MASKED outside of a window, for questions (N, heads, D)."""
        questions = self.to_places(questions.flatten(1)).view(*self.bias.shape[:2], -1)  # (groups, Q·heads, D)
        return torch.baddbmm(self.bias.to(questions.dtype), questions, items.transpose(1, 2))

    def mixture(self, items: Tensor, weights: Tensor) -> Tensor:
        """Return (N, heads, D): the mean of the items by the weights (groups, Q·heads, K)."""
        heads = weights.shape[1] // self.mask.shape[1]
        mixture = torch.bmm(weights.to(items.dtype), items).view(-1, heads * items.shape[2])  # (P, heads·D)
        mixture = mixture if self.slot is None else F.embedding(self.slot, mixture)
        return mixture.unflatten(1, (heads, -1))

    def by_column(self, by_distance: Tensor) -> Tensor:
        """Return (groups, Q·heads, K) of each column, from (N, heads, L+1) of each distance, the largest first."""
        heads, length = by_distance.shape[1], by_distance.shape[2] - 1
        by_distance = self.to_places(by_distance.flatten(1)).unflatten(1, (heads, -1))  # (P, heads, L+1)
        index = (length - self.distance).flatten(0, 1)[:, None].expand(-1, heads, -1)  # (P, heads, K)
        return by_distance.gather(2, index).view(self.mask.shape[0], -1, index.shape[2])


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

    def view(self, items: Tensor, item_step: Tensor | None, longest: int | None, narrow: bool) -> MemoryView:
        """Return what the queries may look at.

        Args:
            items: (blocks, environments, columns, D) the timeline.
            item_step: (environments, columns) episode step at which each was written, where that is asked for.
            longest: L, up to which distances are asked for, or None where they are not.
            narrow: whether columns that no query of these looks at are left out.
        """
        per_group, slot, total, device = self.per_group, self.slot, items.shape[2], items.device
        columns = max(1, int(self.widths().max())) if narrow else self.columns  # K
        start, count = np.minimum(self.start, total - columns), len(self.start)
        places = count * per_group
        source = np.zeros(places, dtype=np.int64)
        source[slot] = np.arange(len(slot))
        # Places that only fill up a group keep end = first = 0 and so see nothing.
        place_first, place_end = np.zeros((2, places), dtype=np.int64)
        place_first[slot] = self.first - start[slot // per_group]
        place_end[slot] = self.end - start[slot // per_group]
        ends = to_device(place_end, device).view(count, per_group, 1)
        firsts = to_device(place_first, device).view(count, per_group, 1)
        offsets = torch.arange(columns, device=device)
        rows = (to_device(self.owner * total + start, device)[:, None] + offsets).flatten()  # (groups·K,)
        return MemoryView(
            items=items.flatten(1, 2).index_select(1, rows).unflatten(1, (count, columns)),
            mask=(offsets < ends) & (offsets >= firsts),
            nonempty=to_device(self.end > self.first, device).float()[:, None],
            distance=None if longest is None else (ends - offsets).clamp(0, longest),
            item_step=None if item_step is None else item_step.flatten()[rows].view(count, columns),
            source=to_device(source, device),
            slot=to_device(slot, device),
        )


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
