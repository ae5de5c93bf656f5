"""Queries that share columns of memory."""

import numpy as np


def group_queries(
    worker: np.ndarray, first: np.ndarray, end: np.ndarray, per_group: int, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put N queries whose windows lie close together into groups of at most Q, `per_group`, over at most K `columns`.

    A query is of environment `worker` (N,), and may look at the columns from `first` (N,) to before `end` (N,), which
    are no more than K.

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
