"""All processes of a run, one or many: who steps which environments, and what they tell each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from run.pulse import Pulse


class Interrupted(Exception):
    """Somebody asked the run to stop."""


class Lost(Exception):
    """Another process of the run is gone."""


class World:
    """The processes that train together; a process that is alone is a world of one, without a process group.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number of this process among those of its machine.
        local_size: number of processes on this machine.
        restarts: how often torchrun has started all of them anew.
        pulse: says whether the others are alive and whether one of them wants all to stop, None in a world of one.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self.pulse: Pulse | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0

    @property
    def stopping(self) -> bool:
        """Whether any process wants all to stop; becomes known to the others within seconds."""
        return self.pulse is not None and self.pulse.stopping

    def share(self, count: int) -> range:
        """Return which of `count` environments belong to this process."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def join_rows(self, rows: Tensor) -> Tensor:
        """Return the rows (n, …) of all processes, in the order of their environments (W, …)."""
        if self.size == 1:
            return rows
        own = rows.cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self._connected():
            torch.distributed.all_gather(parts, own)
        return torch.cat(parts).to(rows.device)

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.size > 1:
            with self._connected():
                torch.distributed.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor([float(flag)])
        self.add(flags)
        return flags.item() > 0

    def gather(self, item: Any) -> list[Any]:
        """Return the plain data of each process, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with self._connected():
            torch.distributed.all_gather_object(items, item)
        return items

    def from_first(self, item: Any) -> Any:
        """Return the plain data that process 0 has."""
        if self.size == 1:
            return item
        items = [item if self.first else None]
        with self._connected():
            torch.distributed.broadcast_object_list(items)
        return items[0]

    @contextmanager
    def agree_on(self, *kinds: type[Exception]) -> Iterator[None]:
        """Let all processes fail where one does: an exception of these kinds is raised on all of them behind the block.

        All have to come by, and must not wait for each other within. That somebody stopped counts less than a failure.
        """
        error = None
        try:
            yield
        except kinds as caught:
            error = caught
            if self.pulse is not None:
                self.pulse.call_off()
        errors = [found for found in self.gather(error) if found is not None]
        if errors:
            raise next((found for found in errors if not isinstance(found, Interrupted)), errors[0])

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Turn what PyTorch raises where a process is gone into `Lost`."""
        try:
            yield
        except RuntimeError as error:
            raise Lost from error
