"""All processes of a run, one or many: who steps which environments, and what they tell each other."""

from typing import Any

import torch
from torch import Tensor


class World:
    """The processes that train together; a process that is alone is a world of one, without a process group.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def share(self, count: int) -> range:
        """Return which of `count` environments belong to this process."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def join_rows(self, rows: Tensor) -> Tensor:
        """Return the rows (n, …) of all processes, in the order of their environments (W, …)."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)

    def gather(self, item: Any) -> list[Any]:
        """Return the plain data of each process, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(items, item)
        return items
