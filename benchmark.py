"""Measure how fast agents sample and learn here, and compare configs or versions of the code.

Usage:
    benchmark.py [--config=<file>]... [--against=<version>]... [--set=<key>]... [options]

Each config and each version has a process of its own. They take turns, an update
each, lest what else the machine does looks like a difference. Under torchrun one
config and this version are measured on all ranks; CPU and memory are the first's.
Options:
    --config=<file>      What is measured; repeatable [default: configs/mortar_mayhem_grid.yaml].
    --against=<version>  A git revision, or a folder with another checkout.
    --set=<key>          Change a key of all configs, key=value.
    --updates=<n>        Updates of each, after one to warm up; medians are shown [default: 3].
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
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

from run.cli import Computing, Count, Precision, Processes, arguments_of, command_line, to_file
from utils import UserError

ROOT = Path(__file__).resolve().parent
SERVER = ROOT / "tools" / "updates.py"


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
    what, first = "environments" if arguments.environments else "update", os.environ.get("RANK", "0") == "0"
    with ExitStack() as stack:
        sides = started(arguments, stack)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number, name in itertools.product(range(arguments.updates + 1), sides):
            if first:
                print(f"{what} {number} of {name}" if number else f"warming up {name}", file=sys.stderr)
            found[name].append(answer(sides[name], what))
        profiles = [answer(side, "profile")["profile"] for side in sides.values() if arguments.profile]
    if first:
        found = {name: rows[1:] for name, rows in found.items()}
        print("\n".join([*profiles, *table(found)]))
        if arguments.output:
            from run.checkpoint import write_file

            write_file(arguments.output, json.dumps(found, indent=2).encode())


def started(arguments: Arguments, stack: ExitStack) -> dict[str, subprocess.Popen]:
    """Return a process for each config and version, by their names; `stack` ends them."""
    roots = {"": ROOT} | {version: checkout(version, stack) for version in arguments.against}
    if len(arguments.config) * len(roots) > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("torchrun: one config and this version alone can be measured")
    processes = {}
    for config, (version, root) in itertools.product(arguments.config, roots.items()):
        given = arguments.model_dump(exclude={"output"}) | {"config": config}
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        if arguments.threads:
            environment["OMP_NUM_THREADS"] = str(arguments.threads)
        process = subprocess.Popen(
            [sys.executable, "-P", str(SERVER), json.dumps(given)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes[f"{Path(config).stem} {version}".strip()] = stack.enter_context(process)
    return processes


def answer(process: subprocess.Popen, what: str) -> dict[str, Any]:
    """Ask a process for something and return its answer; SystemExit where it has failed, of which it has told."""
    with suppress(BrokenPipeError):
        print(what, file=process.stdin, flush=True)
    line = process.stdout.readline()  # type: ignore[union-attr]
    return json.loads(line) if line else sys.exit(process.wait())


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
    columns, first = {}, next(iter(found.values()))
    for name, rows in found.items():
        columns[name] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for seconds in [key for key in ("seconds", "CPU seconds") if key in rows[0] and len(found) > 1]:
            proportions = [own[seconds] / other[seconds] for own, other in zip(rows, first, strict=True)]
            columns[name][f"{seconds}, to the first's"] = statistics.median(proportions)
    width = max(14, *map(len, columns))
    lines = [" " * 34 + "".join(f"  {name:>{width}}" for name in columns)]
    for key in next(iter(columns.values())):
        lines.append(f"{key:<34}" + "".join(f"  {column[key]:>{width}.4g}" for column in columns.values()))
    return lines


if __name__ == "__main__":
    command_line(main)
