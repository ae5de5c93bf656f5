"""The two products of attention over windows of the timeline, compiled for the CPU.

These loops read each window where it lies: nothing is copied, masked or filled up. PyTorch's batched products need
windows of equal length, so that queries of nearby steps have to share stretches of columns, most of which each query
must not look at.
"""

from collections.abc import Callable

import numpy as np
from numba import njit


def compiled(function: Callable) -> Callable:
    """Compile a function at its first call, or read it from the cache where that can be written.

    Sums may be reordered, so that they can be vectorised; not-a-number stays not-a-number.
    """
    options = {"nogil": True, "fastmath": {"reassoc", "contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder for a cache
        return njit(**options)(function)


@compiled
def window_scores(
    questions: np.ndarray,
    items: np.ndarray,
    owner: np.ndarray,
    first: np.ndarray,
    end: np.ndarray,
    outside: np.float32,
    scores: np.ndarray,
) -> None:
    """Fill scores[n, h, k] with question·item for the items of each query's window, the newest in the last column.

    Args:
        questions: (N, heads, D).
        items: (W, columns, D).
        owner: (N,) environment of each query.
        first: (N,) first column of its window.
        end: (N,) column behind the last one.
        outside: score of columns that the window does not reach.
        scores: (N, heads, K), K at least as long as any window.
    """
    count, heads, width = questions.shape
    for n in range(count):
        window = items[owner[n], first[n] : end[n]]
        skipped = scores.shape[2] - len(window)
        scores[n, :, :skipped] = outside
        fours = len(window) // 4 * 4
        # Four items by two heads at a time: eight sums for six numbers read.
        for j in range(0, fours, 4):
            item0, item1, item2, item3 = window[j], window[j + 1], window[j + 2], window[j + 3]
            for h in range(0, heads, 2):
                other = min(h + 1, heads - 1)  # the last of an odd number of heads is its own partner
                p, q = questions[n, h], questions[n, other]
                p0 = p1 = p2 = p3 = q0 = q1 = q2 = q3 = np.float32(0)
                for d in range(width):
                    p0 += p[d] * item0[d]
                    p1 += p[d] * item1[d]
                    p2 += p[d] * item2[d]
                    p3 += p[d] * item3[d]
                    q0 += q[d] * item0[d]
                    q1 += q[d] * item1[d]
                    q2 += q[d] * item2[d]
                    q3 += q[d] * item3[d]
                row, k = scores[n, h], skipped + j
                row[k], row[k + 1], row[k + 2], row[k + 3] = p0, p1, p2, p3
                row = scores[n, other]
                row[k], row[k + 1], row[k + 2], row[k + 3] = q0, q1, q2, q3
        for j in range(fours, len(window)):
            item0 = window[j]
            for h in range(heads):
                p, p0 = questions[n, h], np.float32(0)
                for d in range(width):
                    p0 += p[d] * item0[d]
                scores[n, h, skipped + j] = p0


@compiled
def window_mixture(
    weights: np.ndarray, items: np.ndarray, owner: np.ndarray, first: np.ndarray, end: np.ndarray, mixture: np.ndarray
) -> None:
    """Fill mixture[n, h] with the sum of weight·item over the items of each query's window, 0 where it is empty.

    Args:
        weights: (N, heads, K), the newest item's in the last column.
        items: (W, columns, D).
        owner: (N,) environment of each query.
        first: (N,) first column of its window.
        end: (N,) column behind the last one.
        mixture: (N, heads, D).
    """
    count, heads, width = mixture.shape
    for n in range(count):
        window = items[owner[n], first[n] : end[n]]
        skipped = weights.shape[2] - len(window)
        mixture[n] = 0
        fours = len(window) // 4 * 4
        for j in range(0, fours, 4):
            item0, item1, item2, item3 = window[j], window[j + 1], window[j + 2], window[j + 3]
            for h in range(heads):
                row, total, k = weights[n, h], mixture[n, h], skipped + j
                weight0, weight1, weight2, weight3 = row[k], row[k + 1], row[k + 2], row[k + 3]
                for d in range(width):
                    total[d] += weight0 * item0[d] + weight1 * item1[d] + weight2 * item2[d] + weight3 * item3[d]
        for j in range(fours, len(window)):
            item0 = window[j]
            for h in range(heads):
                weight0, total = weights[n, h, skipped + j], mixture[n, h]
                for d in range(width):
                    total[d] += weight0 * item0[d]
