"""How the processes that torchrun starts come together, make sure that they are alike, and leave together."""

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

from run.checkpoint import package_versions
from run.cli import choose_device
from run.config import Config
from run.pulse import Pulse
from run.world import Lost, World
from utils import EnvironmentFailure, UserError

# How long a process waits for the others to arrive.
JOIN_SECONDS = 30
# By these torchrun, or whoever else starts several processes, says who is who.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Flags that may differ: they change nothing of what is computed.
OWN_FLAGS = ("--processes", "--device", "--cpu")


@contextmanager
def together(arguments: dict) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that were started together, and leave when all do: torchrun ends all once one has failed.

    A UserError, or an exit, has to be that of all processes: see `World.agree_on`.

    Args:
        arguments: of the command line, for the device.

    Yields:
        The world, of one where this process is alone, and the device to compute on.
    """
    world, device, backend = describe(arguments)
    if world.size == 1:
        yield world, device
        return
    code: Any = 0
    try:
        try:
            join(world, backend)
            yield world, device
        except (UserError, EnvironmentFailure) as error:
            code = 2 if isinstance(error, UserError) else 1
            if world.local_rank == 0:  # a line on each machine
                print(error, file=sys.stderr)
        except SystemExit as leaving:
            code = leaving.code
        except Lost:
            world.pulse.tell_loss()
            sys.exit(1)
        with suppress(Lost):
            world.gather(None)  # nobody works any more, or will miss a sign of life soon
            world.pulse.fall_silent()
            world.gather(None)
    finally:
        if torch.distributed.is_initialized():  # otherwise its threads may abort the process at its end
            torch.distributed.destroy_process_group()
        if world.pulse is not None:  # last: it ends what hangs
            world.pulse.end()
    sys.exit(code)


def describe(arguments: dict) -> tuple[World, torch.device, str]:
    """Return the world by what torchrun tells in the environment, the device of this process, and how it communicates.

    A process has a GPU to itself by its local rank, and NCCL; where there are fewer GPUs than processes, or all were
    given the same one, and on CPUs it is Gloo.
    """
    device = choose_device(arguments)
    if not all(name in os.environ for name in VARIABLES):
        return World(), device, ""
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    backend = "gloo"
    if device.type == "cuda":
        if device.index is None:
            count = torch.cuda.device_count()
            backend = "cpu:gloo,cuda:nccl" if local_size <= count else "gloo"
            device = torch.device("cuda", local_rank % count)
        torch.cuda.set_device(device)
    return World(rank, size, local_rank, local_size), device, backend


def join(world: World, backend: str) -> None:
    """Meet the other processes and form a process group.

    Raises:
        UserError: if they compute on different kinds of devices.
        SystemExit: if not all arrive.
    """
    patience, keys = timedelta(seconds=JOIN_SECONDS), [f"here/{rank}" for rank in range(world.size)]
    try:
        store, *_ = next(torch.distributed.rendezvous("env://", timeout=patience))
        store = torch.distributed.PrefixStore(f"attempt/{world.restarts}", store)
        store.set(keys[world.rank], backend)
        store.wait(keys, patience)
        found = [entry.decode() for entry in store.multi_get(keys)]
    except RuntimeError:
        place = ":".join(os.environ[name] for name in VARIABLES[2:])
        print(f"process {world.rank}: not all of the {world.size} processes came to {place} within {JOIN_SECONDS} s",
              file=sys.stderr)  # fmt: skip
        os._exit(1)  # nobody is there to leave with
    # From here on it notices who is gone, so that nothing else has to: waiting for slow ones may take its time.
    world.pulse = Pulse(store, world.rank, world.size)
    try:
        torch.distributed.init_process_group(
            "gloo" if len({*found}) > 1 else backend,
            store=store, rank=world.rank, world_size=world.size, timeout=timedelta(days=1),
        )  # fmt: skip
    except RuntimeError as error:
        raise Lost from error
    differing = next((rank for rank, other in enumerate(found) if other != found[0]), None)
    if differing is not None:
        raise UserError(f"processes 0 and {differing} differ in how they communicate: {found[0]}, {found[differing]}")


def check_alike(world: World, config: Config | None, arguments: dict) -> None:
    """Raise UserError on all processes where one has another config, flag, package or code than process 0.

    Args:
        world: all processes.
        config: of the run, None where it comes from a file that process 0 reads.
        arguments: of the command line.
    """
    if world.size == 1:
        return
    flags = {f"flag {name}": value for name, value in arguments.items() if name not in OWN_FLAGS}
    settings = leaves({} if config is None else config.model_dump(), "config ")
    described = world.gather(flags | settings | package_versions() | {"code": code_digest()})
    for rank, other in enumerate(described):
        for name in {**described[0], **other}:
            values = [str(found.get(name, "missing")) for found in (described[0], other)]
            if values[0] != values[1]:
                raise UserError(f"processes 0 and {rank} differ in {name}: {values[0]}, {values[1]}")


def check_divisible(world: World, config: Config) -> None:
    """Raise UserError where a config's environments cannot be shared out evenly."""
    if config.n_workers % world.size:
        fitting = ", ".join(str(size) for size in range(1, config.n_workers + 1) if config.n_workers % size == 0)
        raise UserError(f"n_workers: {config.n_workers} environments cannot be divided among {world.size} processes; "
                        f"allowed numbers of processes are {fitting}")  # fmt: skip


def leaves(section: dict, prefix: str) -> dict[str, str]:
    """Return the values of a nested config by dotted keys behind a prefix."""
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
