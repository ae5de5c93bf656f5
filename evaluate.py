"""Evaluate models on episodes that training has not seen.

Usage:
    evaluate.py <models>... [--reference=<curves>]... [options]

Models are files or folders of them. Those whose configs agree are runs of one
group; those of one run with different steps form its learning curve.
Options:
    --seeds=<n>           Environment seeds that each model plays [default: 50].
    --repetitions=<n>     How often it plays each of them [default: 5].
    --seed=<n>            Skip n unseen seeds; seeds actions [default: 0].
    --deterministic       Take the most probable actions, draw none.
    --max-steps=<n>       Cut episodes; at 10,000 where the task has no limit.
    --aggregate=<what>    runs: average each first; episodes [default: runs].
    --metric=<name>       What is plotted: reward, success, … [default: reward].
    --plot=<file>         Learning curves as .png, .pdf or .svg.
    --reference=<curves>  Published ones beside them: <file>.csv:<task>/<run>,…
    --output=<file>       Write <file>.json with everything and <file>.csv.
    --processes=<n>       Step the environments; by default half the cores.
    --device=<name>       cpu, cuda or cuda:N; by default cuda if there is one.
    --cpu                 The same as --device=cpu.
    -h --help             Show this.
Example: python evaluate.py models/*.nn --output=results --plot=curves.pdf
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from run.cli import Computing, Count, Processes, arguments_of, command_line, cores, step_limit, to_file
from utils import UserError


class Arguments(Computing):
    """What the docstring says."""

    models: list[str] = Field(alias="<models>")
    seeds: Annotated[int, Field(ge=1, le=10**6)]
    repetitions: Annotated[int, Field(ge=1, le=10**6)]
    seed: Annotated[int, Field(ge=0, le=2**30)]
    deterministic: bool
    max_steps: Count | None
    aggregate: Literal["runs", "episodes"]
    metric: str
    plot: Annotated[Path, to_file(".png", ".pdf", ".svg")] | None
    reference: list[str]
    output: Annotated[Path, to_file("")] | None
    processes: Processes | None


def main() -> None:
    """Parse the command line and evaluate, together with the other processes that torchrun started."""
    arguments = arguments_of(__doc__, Arguments)
    from run.distributed import check_alike, together

    with together(arguments) as (world, device):
        with world.agree_on(UserError):
            protocol, references = checked(arguments, device)
        check_alike(world, None, arguments.model_dump(by_alias=True))
        with world.agree_on(UserError):
            models = find_and_load(arguments.models, device)
        evaluated = play(models, protocol, arguments, world)
        with world.agree_on(UserError, OSError):
            if world.first:
                report(evaluated, protocol, arguments, references)


def checked(arguments: Arguments, device) -> tuple[dict, list]:
    """Return how is evaluated, and published curves; UserError where the command line is wrong."""
    from evaluation.published import read_references
    from run.checkpoint import provenance

    if arguments.reference and arguments.plot is None:
        raise UserError("--reference: is for a figure; name one with --plot=<file>")
    references = read_references(arguments.reference, arguments.metric)
    return {
        "command": ["python", *sys.argv],
        "seeds": arguments.seeds,
        "repetitions": arguments.repetitions,
        "seed": arguments.seed,
        "deterministic": arguments.deterministic,
        "versions": provenance(device),
    }, references


def find_and_load(paths: list[str], device) -> list[tuple]:
    """Return path, model, config, task and run of all models; UserError where there are none to be played."""
    from evaluation.agent import load_for_play
    from evaluation.statistics import find_models

    return [(path, *load_for_play(path, device)) for path in find_models(paths)]


def play(models: list[tuple], protocol: dict, arguments: Arguments, world) -> list:
    """Let all models play the same seeds, which `protocol` then names; return what they did."""
    import torch

    from evaluation.agent import first_unseen_seed, play_episodes, task_name
    from evaluation.statistics import Evaluated

    mine = max(1, cores() // world.local_size)
    # The environments need the other cores. Must not depend on --processes: it decides how sums are rounded.
    torch.set_num_threads(max(1, mine // 2))
    processes = arguments.processes or mine - max(1, mine // 2) or 1
    first = protocol["seed"] + max(first_unseen_seed(config.environment) for _, _, config, _, _ in models)
    total, repetitions = protocol["seeds"] * protocol["repetitions"], protocol["repetitions"]
    protocol["seeds"] = list(range(first, first + protocol["seeds"]))
    evaluated = []
    for number, (path, model, config, task, run) in enumerate(models, start=1):
        limit = step_limit(arguments.max_steps, task)
        with Progress(f"{number}/{len(models)} {path.name}", total, world) as progress:
            episodes = play_episodes(
                model, config, task, protocol["seeds"], repetitions, action_seed=protocol["seed"],
                deterministic=protocol["deterministic"], processes=processes, progress=progress.count,
                max_steps=limit, world=world,
            )  # fmt: skip
        evaluated.append(Evaluated(str(path), task_name(config.environment), config.model_dump(), run, episodes, limit))
    return evaluated


def report(evaluated: list, protocol: dict, arguments: Arguments, references: list) -> None:
    """Print the table and write the files that were asked for."""
    from evaluation import statistics as results

    groups = results.group_runs(evaluated, arguments.aggregate)
    print("\n".join(results.table(groups)), flush=True)
    write_results(groups, protocol, arguments.output, arguments.plot, arguments.metric, references)


class Progress:
    """A bar over the episodes of one model, or one line at its end where there is no terminal.

    Args:
        name: what is under way.
        total: number of episodes.
        world: all processes; the first one shows how far it is itself.
    """

    def __init__(self, name: str, total: int, world) -> None:
        self.name, self.total, self.world = name, total, world
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        self.started = time.perf_counter()
        if sys.stderr.isatty() and self.world.first:
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.total // self.world.size, desc=self.name[-30:], unit="episode", dynamic_ncols=True
            )
        return self

    def count(self, episodes: int) -> None:
        """Add episodes that have ended."""
        if self.bar is not None:
            self.bar.update(episodes)

    def __exit__(self, *failure: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif failure == (None, None, None) and self.world.first:
            seconds = time.perf_counter() - self.started
            print(f"{self.name}: {self.total:,} episodes in {seconds:.1f} s", file=sys.stderr, flush=True)


def write_results(
    groups: list, protocol: dict, output: Path | None, figure: Path | None, metric: str, references: list
) -> None:
    """Write the files that were asked for and name them.

    Args:
        groups: of `results.group_runs`.
        protocol: how they were evaluated.
        output: .json and .csv, without suffix, or None.
        figure: or None.
        metric: what the figure shows; UserError where no group reports it.
        references: published curves that it shows too.
    """
    from evaluation.statistics import plot, to_csv, to_json
    from run.checkpoint import write_file

    files = {}
    if output is not None:
        files[output.with_name(output.name + ".json")] = to_json(groups, protocol)
        files[output.with_name(output.name + ".csv")] = to_csv(groups)
    for path, data in files.items():
        write_file(path, data)
    if figure is not None:
        known = list(dict.fromkeys(name for group in groups for point in group.points for name in point.statistics))
        if metric not in known:
            raise UserError(f"--metric: {metric!r} is not reported; allowed here are {', '.join(known)}")
        write_file(figure, plot(groups, metric, figure.suffix, references))
        files[figure] = None
    if files:
        print(f"wrote {', '.join(map(str, files))}", file=sys.stderr)


if __name__ == "__main__":
    command_line(main)
