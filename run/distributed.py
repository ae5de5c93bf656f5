"""The ranks of a run, the processes that torchrun starts: how they meet, what they tell each other, how they leave."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# Once imported, and optimisers do, it keeps the process group that there is for a default, and its threads until Python
# has ended, which may abort the process: so it has to come first.
import torch.distributed.nn
import xxhash
from torch import Tensor

from run.checkpoint import package_versions
from run.cli import Computing, choose_device
from run.config import Config
from utils import EnvironmentFailure, UserError

# How long a rank waits for the others to arrive, and to do their share. That one has died is noticed at once, as its
# connections close; only one that hangs, or whose cable is cut, is waited for. Slow environments may take their time.
JOIN, PATIENCE = timedelta(seconds=60), timedelta(minutes=30)
# By these torchrun, or whoever else starts several processes, says who is who.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Flags that may differ: they change nothing of what is computed.
OWN_FLAGS = ("--processes", "--device", "--cpu")


class Interrupted(Exception):
    """Somebody asked the run to stop."""


class Sum(torch.autograd.Function):
    """The sum of a tensor over all ranks; its gradient is the sum of what all of them do with it."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        """Return the sum of the gradients of all ranks."""
        return Sum.forward(context, gradient)


class Ranks:
    """The processes that train together; one that is alone is the first of one, without a process group.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number of this process among those of its machine.
        local_size: number of processes on this machine.
        restarts: how often torchrun has started all of them anew.
        backend: how they communicate.
        how_to_go_on: what is said where another rank is gone.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self.backend, self.how_to_go_on = "gloo", ""
        self.store: Any = None

    def join(self) -> None:
        """Meet the others and form a process group; UserError where not all arrive."""
        try:
            self.store, *_ = next(torch.distributed.rendezvous("env://", timeout=JOIN))
            own = {"rank": self.rank, "world_size": self.size, "store": self.store}
            torch.distributed.init_process_group(self.backend, timeout=PATIENCE, **own)
        except RuntimeError as error:
            place = ":".join(os.environ[name] for name in VARIABLES[2:])
            raise UserError(f"rank {self.rank}: not all of the {self.size} ranks came to {place}") from error

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0

    @property
    def stopping(self) -> bool:
        """Whether any rank wants all to stop; a question to the store, so not to be asked at every step."""
        return self.store is not None and self.store.check(["stop"])

    def share(self, count: int) -> range:
        """Return which of `count` environments belong to this rank."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def join_rows(self, rows: Tensor) -> Tensor:
        """Return the rows (n, …) of all ranks, in the order of their environments (W, …)."""
        if self.size == 1:
            return rows
        own = rows.cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(parts, own)
        return torch.cat(parts).to(rows.device)

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)

    def sum_with_gradient(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks; its gradient is the sum of what all of them do with it."""
        return tensor if self.size == 1 else Sum.apply(tensor)

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
    def agree_on(self, *kinds: type[Exception]) -> Iterator[None]:
        """Let all ranks fail where one does: an exception of these kinds is raised on all of them after the block.

        All have to come by, and must not wait for each other within. That somebody stopped counts less than a failure.
        """
        error = None
        try:
            yield
        except kinds as caught:
            error = caught
            if self.store is not None:
                self.store.set("stop", "")
        errors = [found for found in self.gather(error) if found is not None]
        if errors:
            raise next((found for found in errors if not isinstance(found, Interrupted)), errors[0])

    def tell_loss(self) -> None:
        """Say that another rank is gone, unless one has said so before."""
        with suppress(RuntimeError):  # the store is gone, too
            if self.store.add("told", 1) > 1:
                return
        print(f"rank {self.rank}: another rank of the run is gone{self.how_to_go_on}", file=sys.stderr, flush=True)


@contextmanager
def together(arguments: Computing) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that were started together, and leave when all do: torchrun ends all once one has failed.

    A UserError, or an exit, has to be that of all ranks: see `Ranks.agree_on`.

    Args:
        arguments: of the command line, for the device.

    Yields:
        The ranks, and the device to compute on.
    """
    ranks, device = describe(arguments)
    if ranks.size == 1:
        yield ranks, device
        return
    ranks.join()
    code: Any = 0
    try:
        try:
            yield ranks, device
        except (UserError, EnvironmentFailure) as error:
            code = 2 if isinstance(error, UserError) else 1
            if ranks.local_rank == 0:  # a line on each machine
                print(error, file=sys.stderr)
        except SystemExit as leaving:
            code = leaving.code
        ranks.gather(None)
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        ranks.tell_loss()
        code = 1
    torch.distributed.destroy_process_group()  # otherwise its threads may abort the process at its end
    sys.exit(code)


def describe(arguments: Computing) -> tuple[Ranks, torch.device]:
    """Return the ranks by what torchrun tells in the environment, and the device of this one.

    A rank has a GPU to itself by its local rank, and NCCL; where there are fewer GPUs than ranks, or all were given the
    same one, and on CPUs it is Gloo.
    """
    device = choose_device(arguments)
    if not all(name in os.environ for name in VARIABLES):
        return Ranks(), device
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in names))
    if device.type == "cuda":
        if device.index is None:
            count = torch.cuda.device_count()
            ranks.backend = "cpu:gloo,cuda:nccl" if ranks.local_size <= count else "gloo"
            device = torch.device("cuda", ranks.local_rank % count)
        torch.cuda.set_device(device)
    return ranks, device


def check_alike(ranks: Ranks, config: Config | None, arguments: dict) -> None:
    """Raise UserError on all ranks where one has another config, flag, package, backend or code than rank 0.

    Args:
        ranks: all of them.
        config: of the run, None where it comes from a file that rank 0 reads.
        arguments: of the command line.
    """
    if ranks.size == 1:
        return
    own = {f"flag {name}": value for name, value in arguments.items() if name not in OWN_FLAGS}
    own |= leaves({} if config is None else config.model_dump(), "config ") | package_versions()
    described = ranks.gather(own | {"backend": ranks.backend, "code": code_digest()})
    for rank, other in enumerate(described):
        for name in {**described[0], **other}:
            values = [str(found.get(name, "missing")) for found in (described[0], other)]
            if values[0] != values[1]:
                raise UserError(f"ranks 0 and {rank} differ in {name}: {values[0]}, {values[1]}")


def check_divisible(ranks: Ranks, config: Config) -> None:
    """Raise UserError where a config's environments cannot be shared out evenly."""
    if config.n_workers % ranks.size:
        fitting = ", ".join(str(size) for size in range(1, config.n_workers + 1) if config.n_workers % size == 0)
        raise UserError(f"n_workers: {config.n_workers} environments cannot be divided among {ranks.size} ranks; "
                        f"allowed numbers of ranks are {fitting}")  # fmt: skip


def leaves(section: dict, prefix: str) -> dict[str, str]:
    """Return the values of a nested config by dotted keys after a prefix."""
    found: dict[str, str] = {}
    for key, value in section.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: repr(value)}
    return found


def code_digest() -> str:
    """Return a digest of this program's files."""
    digest, root = xxhash.xxh3_128(), Path(__file__).parents[1]
    for path in sorted([*root.glob("*.py"), *root.glob("[!.]*/*.py")]):
        if path.parent.name != "tests":
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
