"""Queries that share columns of memory."""

import numpy as np


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
