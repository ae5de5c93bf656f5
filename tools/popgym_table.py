"""Train all of POPGym's tasks, evaluate them, and set them beside published figures.

Usage:
    popgym_table [options]

What is there already is not done again, so it may be interrupted at any time:
finished runs are skipped, others resumed from their newest checkpoint. A run that is to be
longer than what is there, or is there with another setting, is done anew. Several of these
may write to the same files, as long as their tasks are others.

Options:
    --seeds=<n>      Runs of each task, with the seeds 1 to n; 0 writes the table only [default: 3].
    --tasks=<names>  Only these, or those whose names contain one of these, such as Easy,CountRecallHard.
    --parallel=<n>   Runs at a time, a core each; by default one per core.
    --config=<file>  Setting of all runs [default: configs/popgym.yaml].
    --updates=<n>    Updates of each run and, in proportion, of its schedules; by default the config's.
    --output=<file>  Write <file>.csv and <file>.md [default: docs/results/popgym].
    -h --help        Show this.

Example: python -m tools.popgym_table --seeds=1 --tasks=Easy
"""

import importlib.util
import json
import sys
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import Field

from run.checkpoint import write_file
from run.cli import Arguments, Count, arguments_of, command_line, cores, to_file
from run.config import Config, Schedule, load_config
from tools.runs import Failed, Job, Rows, carry_out, evaluate, read_rows, scalars
from utils import UserError

PUBLISHED = Path(__file__).resolve().parent.parent / "docs" / "published" / "popgym.csv"
COLUMNS = (
    "task", "seed", "steps", "mmer", "mmer_65536", "reward_mean", "reward_low", "reward_high", "seconds", "setting",
)  # fmt: skip
# What is set beside published figures, and by what of it a task is counted.
FIGURES = {"mmer_65536": "mean over 65,536 steps", "reward_mean": "final evaluation", "mmer": "MMER"}
COUNTED, TOLERANCE = ("mmer_65536", "reward_mean"), 0.005
# Episodes that a mean return is taken over at least, as in POPGym.
EPISODES = 100
# Steps of one of POPGym's updates: the best of many short means is larger than the best of few long ones.
PUBLISHED_UPDATE = 65_536


class Given(Arguments):
    """What the docstring says."""

    seeds: Annotated[int, Field(ge=0, le=1000)]
    tasks: str | None
    parallel: Annotated[int, Field(ge=1, le=cores())] | None
    config: Path
    updates: Count | None
    output: Annotated[Path, to_file("")]


def main() -> None:
    """Parse the command line, carry out the runs that are missing, and write the table."""
    arguments = arguments_of(__doc__, Given)
    seeds, path, output = arguments.seeds, arguments.config, arguments.output
    config = load_config(str(path))
    if config.environment.type != "Gymnasium":
        raise UserError(f"--config: {path}: environment.type is {config.environment.type}, should be Gymnasium")
    updates = arguments.updates or config.updates
    published = {row["task"]: row for row in read_rows(PUBLISHED)}
    tasks = chosen_tasks(arguments.tasks or "", list(published))
    if seeds and importlib.util.find_spec("popgym") is None:
        raise UserError("POPGym is not installed: pip install popgym")
    # What the file says, in whatever order: keys of later versions leave a setting what it is.
    values = json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), sort_keys=True)
    setting = f"{path.stem}-{zlib.crc32(values.encode()):08x}"
    rows = Rows(output.with_name(output.name + ".csv"), COLUMNS, keys=2)
    start = [f"--config={path}", *changes_of_length(config, updates)]
    steps = updates * config.n_workers * config.worker_steps
    jobs: dict[Job, tuple[str, int]] = {}
    for task, seed in ((task, seed) for seed in range(1, seeds + 1) for task in tasks):
        row = rows.rows.get((task, str(seed)))
        if row is None or row["setting"] != setting or int(row["steps"]) < steps:
            options = (*start, f"--seed={seed}", f"--set=environment.name=popgym:popgym-{task}-v0")
            jobs[Job(f"{setting}-{task}-{seed}-{updates}", options, steps)] = (task, seed)

    def finish(job: Job, core: int) -> None:
        """Put a run into the table."""
        task, seed = jobs[job]
        found = evaluate(job, core, f"--seeds={EPISODES}", "--repetitions=1")
        rewards = {name: f"{float(found[name]):.4f}" for name in COLUMNS if name.startswith("reward_")}
        rows.add({"task": task, "seed": seed, "setting": setting} | training_figures(job.run_id) | rewards)
        write_table()

    def write_table() -> None:
        """Write what the rows come to."""
        text = "\n".join(lines(list(rows.rows.values()), published)) + "\n"
        write_file(output.with_name(output.name + ".md"), text.encode())

    done = carry_out(list(jobs), finish, arguments.parallel)
    write_table()
    sys.exit(0 if done else 1)


def chosen_tasks(text: str, known: list[str]) -> list[str]:
    """Return the tasks that are named, in whole or in part, in a text with commas, all if it is empty.

    Raises:
        UserError: if one of the names fits none.
    """
    chosen = set()
    for name in text.split(",") if text else known:
        fitting = {name} if name in known else {task for task in known if name and name in task}
        if not fitting:
            raise UserError(f"--tasks: no task's name contains {name!r}; there are {', '.join(known)}")
        chosen |= fitting
    return [task for task in known if task in chosen]


def changes_of_length(config: Config, updates: int) -> list[str]:
    """Return the options with which a run has so many updates and schedules in proportion, none where it has anyway."""
    if updates == config.updates:
        return []
    lengths = {
        f"{name}.max_decay_steps": max(1, round(schedule.max_decay_steps * updates / config.updates))
        for name, schedule in config
        if isinstance(schedule, Schedule)
    }
    return [f"--set={name}={value}" for name, value in {"updates": updates, **lengths}.items()]


def training_figures(run_id: str) -> dict[str, float]:
    """Return steps, seconds and the best mean episodic return of a run, read from its summaries."""
    speed, rewards, lengths = (
        scalars(run_id, tag)
        for tag in ("performance/update_steps_per_second", "episode/reward_mean", "episode/length_mean")
    )
    means = np.array([rewards[step] for step in sorted(rewards) if step >= EPISODES * lengths[step]])
    if len(means) == 0:
        raise Failed(f"fewer than {EPISODES} episodes have ended")
    size = min(speed)  # steps of an update
    width = min(max(1, PUBLISHED_UPDATE // size), len(means))
    wide = np.convolve(means, np.full(width, 1 / width), mode="valid")
    seconds = sum(size / value for value in speed.values())
    best = {"mmer": round(float(means.max()), 4), "mmer_65536": round(float(wide.max()), 4)}
    return {"steps": max(speed), "seconds": round(seconds)} | best


def lines(rows: list[dict[str, str]], published: dict[str, dict[str, str]]) -> list[str]:
    """Return the lines of the Markdown table, one for each task and setting, and how many tasks come to the best.

    Args:
        rows: of runs, by `COLUMNS`.
        published: figures of each task.
    """
    result = [
        f"| task | runs | steps | {' | '.join(FIGURES.values())} | published GRU | published best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reached = dict.fromkeys(COUNTED, 0)
    for task in published:
        known = published[task]
        own = [row for row in rows if row["task"] == task]
        for setting in sorted({row["setting"] for row in own}):
            found = [row for row in own if row["setting"] == setting]
            steps = "–".join(f"{steps:,}" for steps in sorted({int(row["steps"]) for row in found}))
            cells = [task, str(len(found)), steps, *(mean_and_deviation(found, name) for name in FIGURES)]
            cells += [known["gru_2023"] or "–", f"{known['best']} {known['method']}"]
            result.append(f"| {' | '.join(cells)} |")
        for name in COUNTED:
            reached[name] += bool(own) and round(mean_of(own, name), 3) >= round(float(known["best"]) - TOLERANCE, 3)
    counts = " and ".join(f"{count} by the {FIGURES[name]}" for name, count in reached.items())
    return [
        *result,
        "",
        f"Not more than {TOLERANCE} below the best published figure, of {len(published)} tasks: {counts}.",
    ]


def mean_of(rows: list[dict[str, str]], name: str) -> float:
    """Return the mean over runs."""
    return float(np.mean([float(row[name]) for row in rows]))


def mean_and_deviation(rows: list[dict[str, str]], name: str) -> str:
    """Return mean and standard deviation over runs, as text."""
    deviation = f" ± {np.std([float(row[name]) for row in rows], ddof=1):.3f}" if len(rows) > 1 else ""
    return f"{mean_of(rows, name):.3f}{deviation}"


if __name__ == "__main__":
    command_line(main)
