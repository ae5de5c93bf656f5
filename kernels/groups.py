"""Queries that share columns of memory, and scores by distance brought to columns."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def group_queries(
    worker: np.ndarray, first: np.ndarray, end: np.ndarray, per_group: int, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put queries whose windows lie close together into groups.

    Args:
        worker: (N,) environment of each query.
        first: (N,) first column that it may look at.
        end: (N,) column after the last one.
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


def shift_rows(rows: Tensor, start: Tensor, width: int) -> Tensor:
    """Return (R, width): of each row of (R, size) what begins at its `start` (R,), which may lie outside; 0 there."""
    return ShiftRows.apply(rows, start, width)


class ShiftRows(torch.autograd.Function):
    """`shift_rows`: each row is copied as a whole, where gathering its elements takes several times as long."""

    @staticmethod
    def forward(context: Any, rows: Tensor, start: Tensor, width: int) -> Tensor:
        """Return (R, width); arguments as for `shift_rows`."""
        context.save_for_backward(start)
        context.size = rows.shape[1]
        return _shifted(rows, start, width)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient (R, size): the slopes (R, width), shifted back."""
        (start,) = context.saved_tensors
        return _shifted(slope, -start, context.size), None, None


def _shifted(rows: Tensor, start: Tensor, width: int) -> Tensor:
    count, size = rows.shape
    if not count:
        return rows.new_zeros(0, width)
    padded = F.pad(rows, (width, width))
    windows = padded.flatten().unfold(0, width, 1)  # every stretch of so many elements, as a view
    first = torch.arange(count, device=rows.device) * padded.shape[1] + width
    return windows.index_select(0, first + start.clamp(-width, size))
