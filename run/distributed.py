"""The ranks of a run, the processes that torchrun starts: how they meet, what they tell each other, how they leave."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

# Once imported, and optimisers do, it keeps the process group that there is for a default, and its threads until Python
# has ended, which may abort the process: so it has to come first.
import torch.distributed.nn
from torch import Tensor

from run.checkpoint import compact, provenance
from run.cli import Computing, choose_device
from utils import EnvironmentFailure, UserError

# How long a rank waits for the others to arrive, and to do their share. That one has died is noticed at once, as its
# connections close; only one that hangs, or whose cable is cut, is waited for. Slow environments may take their time.
JOIN, PATIENCE = timedelta(seconds=60), timedelta(minutes=30)
# By these torchrun, or whoever else starts several processes, says who is who.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What may differ: it changes nothing of what is computed.
OWN = {"processes", "device", "cpu"}


class Interrupted(Exception):
    """Somebody asked the run to stop."""


class Ranks:
    """The processes that train together; one that is alone is the first of one, without a process group.

    `local_rank` and `local_size` count those of this machine; `restarts`, how often torchrun has started all anew.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self.backend, self.how_to_go_on = "gloo", ""

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of `count` environments belong to this rank."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def join_rows(self, rows: Tensor) -> Tensor:
        """Return the rows (n, …) of all ranks, in the order of their environments (W, …)."""
        return rows if self.size == 1 else torch.cat(self.gather(compact(rows))).to(rows.device)

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)

    def sum_with_gradient(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks; its gradient is the sum of what all of them do with it."""
        return tensor if self.size == 1 else torch.distributed.nn.functional.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank."""
        flags = torch.tensor([float(flag)])
        self.add(flags)
        return flags.item() > 0

    def gather(self, item: Any) -> list[Any]:
        """Return the plain data of each rank, in their order."""
        items: list[Any] = [item] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(items, item)
        return items

    def from_first(self, item: Any) -> Any:
        """Return the plain data that rank 0 has."""
        items = [item if self.first else None]
        if self.size > 1:
            torch.distributed.broadcast_object_list(items)
        return items[0]

    @contextmanager
    def agree_on(self, *kinds: type[BaseException]) -> Iterator[None]:
        """Let all ranks fail where one does: an exception of these kinds is raised on all of them after the block.

        All have to come by, and must not wait for each other within. That somebody stopped counts less than a failure.
        """
        error = None
        try:
            yield
        except kinds as caught:
            error = caught
        errors = [found for found in self.gather(error) if found is not None]
        if errors:
            raise next((found for found in errors if not isinstance(found, Interrupted)), errors[0])


@contextmanager
def together(arguments: Computing) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that were started together, and leave when all do: torchrun ends all once one has failed."""
    ranks, device = describe(arguments)
    if ranks.size == 1:
        yield ranks, device
        return
    store, *_ = next(torch.distributed.rendezvous("env://", timeout=JOIN))
    # torchrun keeps its store when it starts all anew, and in it the addresses of those that are gone.
    store = torch.distributed.PrefixStore(f"start {ranks.restarts}", store)
    torch.distributed.init_process_group(
        ranks.backend, timeout=PATIENCE, rank=ranks.rank, world_size=ranks.size, store=store
    )
    leaving: BaseException | None = None
    try:
        with ranks.agree_on(UserError, EnvironmentFailure, SystemExit):
            check_alike(ranks, provenance(device) | arguments.model_dump() | {"backend": ranks.backend})
            yield ranks, device
    except (UserError, EnvironmentFailure, SystemExit) as error:
        leaving = error
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        print(f"rank {ranks.rank}: another rank of the run is gone{ranks.how_to_go_on}", file=sys.stderr, flush=True)
        leaving = SystemExit(1)
    torch.distributed.destroy_process_group()  # otherwise its threads may abort the process at its end
    if leaving is not None:
        raise leaving


def check_alike(ranks: Ranks, own: dict[str, Any]) -> None:
    """Raise UserError on all ranks where one has another commit, package, backend or flag than the others."""
    everyone = ranks.gather(own)
    for name in sorted({name for each in everyone for name in each} - OWN):
        found = [str(each.get(name)) for each in everyone]
        if len(set(found)) > 1:
            raise UserError(f"the ranks differ in {name}: {', '.join(found)}")


def describe(arguments: Computing) -> tuple[Ranks, torch.device]:
    """Return the ranks by what torchrun tells in the environment, and the device of this one.

    A rank has a GPU to itself by its local rank, and NCCL; where there are fewer GPUs than ranks, or all were given the
    same one, and on CPUs it is Gloo.
    """
    device = choose_device(arguments)
    if not all(name in os.environ for name in VARIABLES):
        return Ranks(), device
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    ranks = Ranks(*(int(os.environ.get(name, alone)) for name, alone in names))
    if device.type == "cuda":
        if device.index is None:
            count = torch.cuda.device_count()
            ranks.backend = "cpu:gloo,cuda:nccl" if ranks.local_size <= count else "gloo"
            device = torch.device("cuda", ranks.local_rank % count)
        torch.cuda.set_device(device)
    return ranks, device
