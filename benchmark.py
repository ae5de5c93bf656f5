"""Measure how fast agents sample and learn here, and compare configs or versions of the code.

Usage:
    benchmark.py [--config=<file>]... [--against=<version>]... [--set=<key>]... [options]

Each config and each version has a process of its own. They take turns, an update
each, lest what else the machine does looks like a difference. Under torchrun one
config and this version are measured on all ranks; CPU and memory are the first's.
Options:
    --config=<file>      Measured; any number [default: configs/mortar_mayhem_grid.yaml].
    --against=<version>  A git revision, or a folder with another checkout.
    --set=<key>          Change a key of all configs, key=value.
    --updates=<n>        Of each, after one to warm up; shown are medians [default: 3].
    --profile            Also say which operators take the time of an update.
    --environments       Measure the environments alone instead, by random actions.
    --output=<file>      Write what each update took, too, as .json.
    --device=<name>      cpu, cuda or cuda:N; by default cuda if there is one.
    --cpu                The same as --device=cpu.
    --processes=<n>      Processes for environments, by default one per core.
    --threads=<n>        Of PyTorch on the CPU, by default one per core.
    --precision=<name>   float32, or bf16 products [default: float32].
    --compile            Compile the model first (torch.compile).
    -h --help            Show this.
Example: python benchmark.py --config=configs/minigrid.yaml --against=HEAD~1 --updates=5
"""

import io
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch

from run.checkpoint import write_file
from run.cli import Computing, Count, Precision, Processes, arguments_of, command_line, cores, to_file, use_cores
from run.config import load_config
from run.distributed import together
from run.start import Options
from trainer import PPOTrainer
from utils import UserError
from worker import inspect_environment

ROOT = Path(__file__).resolve().parent


class Arguments(Computing):
    """What the docstring says."""

    config: list[str]
    against: list[str]
    set: list[str]
    updates: Count
    profile: bool
    environments: bool
    output: Annotated[Path, to_file(".json")] | None
    processes: Processes | None
    threads: Processes | None
    precision: Precision
    compile: bool


def main() -> None:
    """Parse the command line, measure, print a table."""
    arguments = arguments_of(__doc__, Arguments)
    measure, first = stepped if arguments.environments else measured, os.environ.get("RANK", "0") == "0"
    with ExitStack() as stack:
        sides = started(arguments, stack)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for turn, name in itertools.product(range(arguments.updates + 1), sides):
            if first:
                print(f"turn {turn} of {name}" if turn else f"warming up {name}", file=sys.stderr)
            found[name].append(sides[name](measure))
        profiles = [ask(profiled) for ask in sides.values() if arguments.profile]
    if first:
        found = {name: rows[1:] for name, rows in found.items()}
        print("\n".join([*profiles, *table(found)]))
        if arguments.output:
            write_file(arguments.output, json.dumps(found, indent=2).encode())


def started(arguments: Arguments, stack: ExitStack) -> dict[str, Callable[[Callable], Any]]:
    """Return what lets the process of each config and version measure, by their names; `stack` ends it."""
    roots = {"": ROOT} | {version: checkout(version, stack) for version in arguments.against}
    if len(arguments.config) * len(roots) > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("torchrun: one config and this version alone can be measured")
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    sides: dict[str, Callable[[Callable], Any]] = {}
    for config, (version, root) in itertools.product(arguments.config, roots.items()):
        ours, theirs = multiprocessing.Pipe()
        target = partial(command_line, partial(serve, theirs, config, arguments))
        process = multiprocessing.get_context("spawn").Process(target=target)
        sys.path.insert(0, str(root))  # what is spawned imports from where this would
        process.start()
        sys.path.pop(0)
        theirs.close()
        sides[f"{Path(config).stem} {version}".strip()] = partial(answer, process, stack.enter_context(ours))
    return sides


def answer(process, connection: Connection, measure: Callable) -> Any:
    """Let a process measure; SystemExit where it has failed, of which it has told."""
    try:
        connection.send(measure)
        return connection.recv()
    except (EOFError, OSError):
        process.join()
        sys.exit(process.exitcode)


def checkout(version: str, stack: ExitStack) -> Path:
    """Return the folder of another version: its own, or a temporary one for a git revision, which `stack` removes."""
    if Path(version, "trainer.py").is_file():
        return Path(version).resolve()
    done = subprocess.run(["git", "-C", ROOT, "archive", version], capture_output=True)
    if done.returncode:
        raise UserError(f"--against: {version} is no checkout of this project, and git says {done.stderr.decode()!r}")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    tarfile.open(fileobj=io.BytesIO(done.stdout)).extractall(folder, filter="data")
    return folder


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return the lines of a table of medians, a column per side, with seconds in proportion to the first side's."""
    figures, first = {}, next(iter(found.values()))
    for key in first[0]:
        figures[key] = [statistics.median(row[key] for row in rows) for rows in found.values()]
        if len(found) > 1 and key.endswith("seconds"):
            turns = [zip(rows, first, strict=True) for rows in found.values()]
            ratios = [statistics.median(own[key] / other[key] for own, other in pairs) for pairs in turns]
            figures[f"{key}, to the first's"] = ratios
    width = max(14, *map(len, found))
    lines = [" " * 34 + "".join(f"  {name:>{width}}" for name in found)]
    return lines + [f"{key:<34}" + "".join(f"  {number:>{width}.4g}" for number in row) for key, row in figures.items()]


def serve(connection: Connection, path: str, arguments: Arguments) -> None:
    """In the process of a config and a version: make a trainer, and measure until nobody asks any more."""
    with together(arguments) as (ranks, device):
        config = load_config(path, arguments.set)
        use_cores(device, ranks.local_size)
        processes = arguments.processes or max(1, cores() // ranks.local_size)
        options = Options(device, processes, precision=arguments.precision, compile=arguments.compile, ranks=ranks)
        trainer = PPOTrainer(config, inspect_environment(config.environment)[0], 1, options)
        with closing(trainer.workers), suppress(EOFError):
            trainer.start_workers()
            while True:
                connection.send(connection.recv()(trainer))


def measured(trainer: PPOTrainer) -> dict[str, float]:
    """Carry out one update; return seconds, rates, and memory in GB."""
    before, scalars = cpu_seconds(), trainer.train_update()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    found = {
        "steps/s": scalars["performance/update_steps_per_second"],
        "steps/s, sampling": scalars["performance/sampling_steps_per_second"],
        "steps/s, optimisation": scalars["performance/optimisation_steps_per_second"],
        "seconds": trainer.samples / scalars["performance/update_steps_per_second"],
        "CPU seconds": cpu_seconds() - before,
        "GB, trainer at most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
        "GB, workers": sum(child.memory_info().rss for child in psutil.Process().children(recursive=True)) / 1e9,
    }
    if trainer.device.type == "cuda":
        found["GB, GPU at most"] = torch.cuda.max_memory_allocated(trainer.device) / 1e9
    return found


def cpu_seconds() -> float:
    """Return what this process and those that step its environments have used so far."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


def stepped(trainer: PPOTrainer) -> dict[str, float]:
    """Let the environments alone make the steps of an update, by random actions that are allowed."""
    workers, task, generator, started = trainer.workers, trainer.task, np.random.default_rng(1), time.perf_counter()
    draw = generator.standard_normal if task.continuous else generator.random
    for _, group in itertools.product(range(trainer.config.worker_steps), workers.groups):
        actions = draw((len(group), task.continuous or sum(task.branches)), dtype=np.float32)
        if not task.continuous:
            allowed = 1 if workers.arrays.masks is None else workers.arrays.masks[group.start : group.stop]
            branches = np.split(actions * allowed, np.cumsum(task.branches)[:-1], axis=1)
            actions = np.stack([branch.argmax(axis=1) for branch in branches], axis=1)
        workers.send(group, actions)
        workers.receive(group)
    return {"steps/s": trainer.samples / (time.perf_counter() - started)}


def profiled(trainer: PPOTrainer) -> str:
    """Carry out one update under PyTorch's profiler; return a table of its operators."""
    with torch.profiler.profile() as profiler:
        trainer.train_update()
    by = "self_cuda_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=40)


if __name__ == "__main__":
    command_line(main)
