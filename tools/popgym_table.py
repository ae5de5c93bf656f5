"""Train all of POPGym's tasks, evaluate them, and set them beside published figures.

Usage:
    popgym_table [options]

What is there already is not done again, so it may be interrupted at any time:
finished runs are skipped, others resumed from their newest checkpoint. A run that is to be
longer than what is there, or is there with another setting, is done anew. Several of these
may write to the same files, as long as their tasks are others.

Options:
    --seeds=<n>      Runs of each task, with the seeds 1 to n [default: 3].
    --tasks=<names>  Only these, or those whose names contain one of these, such as Easy,CountRecallHard.
    --parallel=<n>   Runs at a time, a core each; by default one per core.
    --config=<file>  Setting of all runs [default: configs/popgym.yaml].
    --updates=<n>    Updates of each run and, in proportion, of its schedules; by default the config's.
    --output=<file>  Write <file>.csv and <file>.md [default: docs/results/popgym].
    -h --help        Show this.

Example: python -m tools.popgym_table --seeds=1 --tasks=Easy
"""

import csv
import ctypes
import importlib.util
import io
import os
import signal
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import numpy as np
from pydantic import Field

from run.checkpoint import list_checkpoints, write_file
from run.cli import Arguments, Count, arguments_of, command_line, to_file
from run.config import Config, Schedule, load_config
from utils import UserError

PUBLISHED = Path(__file__).resolve().parent.parent / "docs" / "published" / "popgym.csv"
FAMILIES = (
    "Autoencode", "Battleship", "Concentration", "CountRecall", "HigherLower", "MineSweeper", "MultiarmedBandit",
    "NoisyPositionOnlyCartPole", "NoisyPositionOnlyPendulum", "PositionOnlyCartPole", "PositionOnlyPendulum",
    "RepeatFirst", "RepeatPrevious", "VelocityOnlyCartpole",
)  # fmt: skip
COLUMNS = (
    "task", "seed", "steps", "mmer", "mmer_65536", "reward_mean", "reward_low", "reward_high", "seconds", "setting",
)  # fmt: skip
# What is set beside published figures.
FIGURES = {"mmer_65536": "MMER (65,536 steps)", "mmer": "MMER", "reward_mean": "final evaluation"}
# Episodes that a mean return is taken over at least, as in POPGym.
EPISODES = 100
# Steps of one of POPGym's updates: the best of many short means is larger than the best of few long ones.
PUBLISHED_UPDATE = 65_536
# Linux tells a process by a signal that its parent is gone.
LIBC, PARENT_DEATH = ctypes.CDLL(None) if os.name == "posix" else None, 1


class Failed(Exception):
    """A run came to nothing; says why."""


class Given(Arguments):
    """What the docstring says."""

    seeds: Annotated[int, Field(ge=1, le=1000)]
    tasks: str | None
    parallel: Count | None
    config: str
    updates: Count | None
    output: Annotated[Path, to_file("")]


def main() -> None:
    """Parse the command line, carry out the runs that are missing, and write the table."""
    arguments = arguments_of(__doc__, Given)
    seeds = arguments.seeds
    config = load_config(arguments.config)
    if config.environment.type != "Gymnasium":
        raise UserError(f"--config: {arguments.config}: environment.type is {config.environment.type}, "
                        "should be Gymnasium")  # fmt: skip
    updates = arguments.updates or config.updates
    output = arguments.output
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1] * (os.cpu_count() or 1)
    parallel = min(arguments.parallel or len(cores), len(cores))
    if importlib.util.find_spec("popgym") is None:
        raise UserError("POPGym is not installed: pip install popgym")
    published = read_published()
    tasks = chosen_tasks(arguments.tasks or "", task_names(published))
    # Keys that are as they are by default do not count: those of later versions leave a setting what it is.
    setting = f"{zlib.crc32(config.model_dump_json(exclude_defaults=True).encode()):08x}"
    table = Table(output, published, setting)
    steps = updates * config.n_workers * config.worker_steps
    runs = [(task, seed) for seed in range(1, seeds + 1) for task in tasks if table.steps(task, seed) < steps]
    start = [f"--config={arguments.config}", *changes_of_length(config, updates)]
    free: SimpleQueue = SimpleQueue()
    for core in cores[:parallel]:
        free.put(core)
    with ThreadPoolExecutor(parallel) as pool:
        failures = list(pool.map(partial(carry_out, table, free, start, updates), runs))
    table.read()
    table.write()
    if any(failures):
        sys.exit(1)


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


def task_names(published: dict[str, dict[str, str]]) -> list[str]:
    """Return all tasks without navigation, those with published figures first."""
    names = [family + level for family in FAMILIES for level in ("Easy", "Medium", "Hard")]
    return sorted(names, key=lambda name: name not in published)


def read_published() -> dict[str, dict[str, str]]:
    """Return the published figures of each task."""
    return {row["task"]: row for row in read_rows(PUBLISHED)}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def carry_out(table: "Table", free: SimpleQueue, start: list[str], updates: int, run: tuple[str, int]) -> bool:
    """Train and evaluate one run on a core that is free; return whether that failed.

    Args:
        table: takes what it reached.
        free: cores, of which one is taken meanwhile.
        start: options of a run that starts.
        updates: of a run.
        run: task and seed.
    """
    task, seed = run
    core = free.get()
    try:
        print(f"{task}, seed {seed}", file=sys.stderr, flush=True)
        # From the checkpoint of a run with another setting or other schedules, a run does not go on.
        run_id = f"popgym-{task}-{seed}-{table.setting}-{updates}"
        train(run_id, task, seed, start, core)
        table.add({"task": task, "seed": seed} | training_figures(run_id) | evaluation_figures(run_id, core))
    except Failed as failure:
        print(f"{task}, seed {seed}: {failure}", file=sys.stderr, flush=True)
        return True
    finally:
        free.put(core)
    return False


def train(run_id: str, task: str, seed: int, start: list[str], core: int) -> None:
    """Train a run to its end, from its newest checkpoint if it has one, else started with some options."""
    options = [f"--resume={run_id}"]
    if not list_checkpoints(Path("checkpoints", run_id)):
        name = f"environment.name=popgym:popgym-{task}-v0"
        options = [f"--run-id={run_id}", "--overwrite", f"--seed={seed}", *start, f"--set={name}"]
    command("train.py", *options, core=core, log=run_id)


def command(script: str, *options: str, core: int, log: str) -> None:
    """Run one of the project's command lines on one core; its output goes to a file beside the summaries.

    Raises:
        Failed: if it did; says what it said last.
    """
    arguments = [sys.executable, script, *options, "--cpu", "--processes=1"]
    # Without a limit PyTorch would start a thread for every core of the machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    prepare = partial(bind, core) if os.name == "posix" else None
    path = Path("summaries") / f"{log}.log"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        code = subprocess.run(arguments, env=environment, stdout=file, stderr=file, preexec_fn=prepare).returncode
    if code:
        last = path.read_text(encoding="utf-8").splitlines()[-1:]
        raise Failed(f"{script} ended with code {code}: {''.join(last)} (see {path})")


def bind(core: int) -> None:
    """Bind this process, which is to become a training, to a core, and let it stop when the table does.

    A training that went on alone would be in the way of the next one's files.
    """
    if core >= 0:
        os.sched_setaffinity(0, {core})
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(PARENT_DEATH, signal.SIGTERM)


def training_figures(run_id: str) -> dict[str, float]:
    """Return steps, seconds and the best mean episodic return of a run, read from its summaries."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = sorted(path for path in (Path("summaries") / run_id).iterdir() if path.is_dir())[-1]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    speed = {event.step: event.value for event in events.Scalars("performance/update_steps_per_second")}
    rewards = {event.step: event.value for event in events.Scalars("episode/reward_mean")}
    lengths = {event.step: event.value for event in events.Scalars("episode/length_mean")}
    steps = np.array(sorted(step for step in rewards if step >= EPISODES * lengths[step]))
    if len(steps) == 0:
        raise Failed(f"fewer than {EPISODES} episodes have ended")
    means = np.array([rewards[step] for step in steps])
    size = min(speed)  # steps of an update
    width = min(max(1, PUBLISHED_UPDATE // size), len(means))
    wide = np.convolve(means, np.full(width, 1 / width), mode="valid")
    seconds = sum(size / value for value in speed.values())
    best = {"mmer": means.max(), "mmer_65536": wide.max()}
    return {"steps": max(speed), "seconds": round(seconds)} | {name: round(float(v), 4) for name, v in best.items()}


def evaluation_figures(run_id: str, core: int) -> dict[str, float]:
    """Return the mean return of a trained model over unseen episodes, with its interval."""
    output = Path("summaries") / f"{run_id}-evaluation"
    model = Path("models", f"{run_id}.nn")
    options = (f"--seeds={EPISODES}", "--repetitions=1", f"--output={output}")
    command("evaluate.py", str(model), *options, core=core, log=run_id)
    row = read_rows(output.with_name(output.name + ".csv"))[0]
    names = ("reward_mean", "reward_low", "reward_high")
    return {name: round(float(row[name]), 4) for name in names}


class Table:
    """What all runs came to, in a CSV that has a row for each, and as a Markdown table of a row for each task.

    Args:
        output: the files, without their suffixes.
        published: figures to set it beside.
        setting: tells runs of one setting, whatever their length, from others.
    """

    def __init__(self, output: Path, published: dict[str, dict[str, str]], setting: str) -> None:
        self.path, self.published, self.setting = output.with_name(output.name + ".csv"), published, setting
        self.rows: dict[tuple[str, int], dict] = {}
        self.others: dict[tuple[str, int], dict] = {}  # of other settings, kept until done anew
        self.lock = threading.Lock()
        self.read()

    def read(self) -> None:
        """Read what is there, to which another process may have added.

        Raises:
            UserError: if the file is none of these.
        """
        try:
            for row in read_rows(self.path) if self.path.exists() else []:
                if not set(COLUMNS[:-1]) <= row.keys() <= set(COLUMNS):
                    raise ValueError("other columns")
                for name in COLUMNS[1:-2]:
                    float(row[name])
                rows = self.rows if row.get("setting") == self.setting else self.others
                rows[row["task"], int(row["seed"])] = row
        except (ValueError, TypeError, OSError, csv.Error) as error:
            raise UserError(f"--output: {self.path}: should have the columns {', '.join(COLUMNS)}, "
                            f"numbers from seed to reward_high ({error})") from error  # fmt: skip

    def steps(self, task: str, seed: int) -> int:
        """Return how long the run of this setting is that is there, 0 if there is none."""
        return int(self.rows.get((task, seed), {"steps": 0})["steps"])

    def runs_of(self, task: str) -> list[dict]:
        """Return the rows of a task, one per seed."""
        return [row for (name, _), row in self.rows.items() if name == task]

    def add(self, row: dict) -> None:
        """Keep a run's figures, by the names of `COLUMNS`, at once."""
        with self.lock:
            self.read()
            self.rows[row["task"], row["seed"]] = row | {"setting": self.setting}
            self.write()

    def write(self) -> None:
        """Write both files."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted((self.others | self.rows).items()))
        write_file(self.path, text.getvalue().encode())
        write_file(self.path.with_suffix(".md"), "\n".join(self.lines()).encode() + b"\n")

    def lines(self) -> list[str]:
        """Return the lines of the Markdown table."""
        lines = [
            f"| task | seeds | steps | {' | '.join(FIGURES.values())} | published GRU | published best |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for task in sorted({task for task, _ in self.rows}):
            rows = self.runs_of(task)
            cells = [mean_and_deviation(rows, name) for name in FIGURES]
            known = self.published.get(task, {"gru_mmer": "–", "best_mmer": "–", "best_model": ""})
            best = f"{known['best_mmer']} {known['best_model']}".rstrip()
            steps = "–".join(f"{steps:,}" for steps in sorted({int(row["steps"]) for row in rows}))
            lines.append(f"| {' | '.join((task, str(len(rows)), steps, *cells, known['gru_mmer'], best))} |")
        reached = ", ".join(f"{self.reached(name)} by {what}" for name, what in FIGURES.items())
        return [*lines, "", f"At or above the best published figure of its {len(self.published)} tasks: {reached}."]

    def reached(self, name: str) -> int:
        """Return how many tasks are at or above the best published figure, which has three decimals."""
        return sum(
            round(mean_of(rows, name), 3) >= float(known["best_mmer"])
            for task, known in self.published.items()
            if (rows := self.runs_of(task))
        )


def mean_of(rows: list[dict], name: str) -> float:
    """Return the mean over runs."""
    return float(np.mean([float(row[name]) for row in rows]))


def mean_and_deviation(rows: list[dict], name: str) -> str:
    """Return mean and standard deviation over runs, as text."""
    deviation = f" ± {np.std([float(row[name]) for row in rows], ddof=1):.3f}" if len(rows) > 1 else ""
    return f"{mean_of(rows, name):.3f}{deviation}"


if __name__ == "__main__":
    command_line(main)
