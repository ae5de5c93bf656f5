"""The two products of attention over windows of the timeline, compiled for the CPU.

These loops read each window where it lies: nothing is copied, masked or filled up. PyTorch's batched products need
windows of equal length, so that queries of nearby steps have to share stretches of columns, most of which each query
must not look at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

# Score of what a query must not look at; finite, so that a row without any valid column stays finite too.
MASKED = -1e30


def compiled(function: Callable) -> Callable:
    """Compile a function at its first call, or read it from the cache where that can be written.

    Sums may be reordered, so that they can be vectorised; not-a-number stays not-a-number.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder for a cache
        return njit(**options)(function)


@compiled
def dot(p: np.ndarray, q: np.ndarray) -> np.float32:
    """Return p·q of two vectors (D,)."""
    total = np.float32(0)
    for d in range(len(p)):
        total += p[d] * q[d]
    return total


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
            for h in range(heads):
                scores[n, h, skipped + j] = dot(questions[n, h], window[j])


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


@dataclass
class Windows:
    """What the queries of one forward pass may attend to, where it lies in the timeline: for float32 items on the CPU.

    Attributes:
        items: (blocks, W, columns, D) stored items of W environments.
        owner: (N,) int64 environment of each query.
        first: (N,) int64 first column that it may look at.
        end: (N,) int64 column behind the last one.
    """

    items: Tensor
    owner: np.ndarray
    first: np.ndarray
    end: np.ndarray

    def __post_init__(self) -> None:
        self.width = max(1, int((self.end - self.first).max(initial=0)))  # K
        self.nonempty = torch.from_numpy(self.end > self.first).float()[:, None]  # (N, 1)

    def prepare(self, heads: int) -> None:
        """Do nothing: see `MemoryView.prepare`."""

    def split(self, parts: int) -> list[tuple[np.ndarray, "Windows"]]:
        """Divide the queries into equal parts of neighbours; return of each the queries (n,) and their windows."""
        rows = np.array_split(np.arange(len(self.owner)), parts)
        return [(some, Windows(self.items, self.owner[some], self.first[some], self.end[some])) for some in rows]

    def scores(self, items: Tensor, questions: Tensor) -> Tensor:
        """Return (N, heads, K) question·item, MASKED outside of a window, for one block's items and (N, heads, D)."""
        return WindowScores.apply(questions, items, self)

    def mixture(self, items: Tensor, weights: Tensor) -> Tensor:
        """Return (N, heads, D): the mean of the block's items by the weights (N, heads, K), 0 for an empty window."""
        return WindowMixture.apply(weights, items, self)

    def by_column(self, by_distance: Tensor) -> Tensor:
        """Return (N, heads, K) of each column, from (N, heads, L+1) of each distance, the largest first."""
        return by_distance[:, :, -1 - self.width : -1]

    def fill_scores(self, questions: Tensor, items: Tensor, outside: float) -> Tensor:
        """Return what `scores` does, with `outside` for MASKED, and without a gradient."""
        scores = items.new_empty(*questions.shape[:2], self.width)
        where = self.owner, self.first, self.end
        window_scores(as_array(questions), as_array(items), *where, np.float32(outside), scores.numpy())
        return scores

    def fill_mixture(self, weights: Tensor, items: Tensor) -> Tensor:
        """Return what `mixture` does, without a gradient."""
        mixture = items.new_empty(*weights.shape[:2], items.shape[2])
        window_mixture(as_array(weights), as_array(items), self.owner, self.first, self.end, mixture.numpy())
        return mixture


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a float32 NumPy array of a tensor on the CPU, a view where that is possible."""
    return tensor.detach().float().contiguous().numpy()


class WindowScores(torch.autograd.Function):
    """`Windows.scores`; its gradient with respect to the questions is a mixture of the items."""

    @staticmethod
    def forward(context: Any, questions: Tensor, items: Tensor, windows: Windows) -> Tensor:
        """Return (N, heads, K); arguments as for `Windows.scores`."""
        context.items, context.windows = items, windows
        return windows.fill_scores(questions, items, MASKED)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient (N, heads, D) for that of the scores (N, heads, K)."""
        return context.windows.fill_mixture(slope, context.items), None, None


class WindowMixture(torch.autograd.Function):
    """`Windows.mixture`; its gradient with respect to the weights are scores of the items."""

    @staticmethod
    def forward(context: Any, weights: Tensor, items: Tensor, windows: Windows) -> Tensor:
        """Return (N, heads, D); arguments as for `Windows.mixture`."""
        context.items, context.windows = items, windows
        return windows.fill_mixture(weights, items)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient (N, heads, K) for that of the mixture (N, heads, D)."""
        return context.windows.fill_scores(slope, context.items, 0.0), None, None
