"""Tables of trained runs: what a table lacks is trained, a run on each core, and may be stopped at any time."""

import csv
import io
import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import yaml
from pydantic import Field
from tqdm import tqdm

from run.checkpoint import list_checkpoints, write_file
from run.cli import Arguments, Count, Processes, to_file
from run.config import Config, Schedule, load_config
from utils import UserError

EPISODES = 100  # that a trained run plays
Row = dict[str, str]


class Failed(Exception):
    """A run came to nothing; says why."""


class Given(Arguments):
    """What the docstrings of all tables say."""

    seeds: Annotated[int, Field(ge=0, le=1000)]
    tasks: str | None
    updates: Count | None
    parallel: Processes | None
    output: Annotated[Path, to_file("")]


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        key: what tells it from the others of its table; the last part is the seed.
        setting: a digest of all that it depends on but its seed and its length.
        config: its file.
        changes: what is changed in it, key=value.
        steps: how long it is.
    """

    key: tuple[str, ...]
    setting: str
    config: Path
    changes: tuple[str, ...]
    steps: int

    @property
    def run_id(self) -> str:
        """The name of its files; a run that this name has a checkpoint of goes on."""
        return "-".join(part for part in (*self.key, self.setting, str(self.steps)) if part)


def make_trial(key: tuple[str, ...], setting: str, path: Path, changes: Sequence[str], updates: int | None) -> Trial:
    """Return a training of so many updates and schedules in proportion, by default as many as the config says."""
    config = load_config(path, changes)
    lengths = changes_of_length(config, updates or config.updates)
    return Trial(key, setting, path, (*changes, *lengths), (updates or config.updates) * config.samples)


def changes_of_length(config: Config, updates: int) -> list[str]:
    """Return the changes with which a run has so many updates and schedules in proportion, none where it has anyway."""
    if updates == config.updates:
        return []
    lengths = {
        f"{name}.max_decay_steps": max(1, round(schedule.max_decay_steps * updates / config.updates))
        for name, schedule in config
        if isinstance(schedule, Schedule)
    }
    return [f"{name}={value}" for name, value in {"updates": updates, **lengths}.items()]


def digest(config: Path, *more: Any) -> str:
    """Return a digest of what a config file says, in whatever order, and more: keys of later versions do not count."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    return f"{zlib.crc32(json.dumps([values, *more] if more else values, sort_keys=True).encode()):08x}"


def chosen(text: str | None, known: Iterable[str], flag: str) -> list[str]:
    """Return the names that are given, in whole or in part, in a text with commas, all where there is none.

    Raises:
        UserError: if one of them fits none.
    """
    names, found = list(known), set()
    for part in names if text is None else text.split(","):
        fitting = {part} if part in names else {name for name in names if part and part in name}
        if not fitting:
            raise UserError(f"{flag}: {part!r} is not known; there are {', '.join(names)}")
        found |= fitting
    return [name for name in names if name in found]


def fill(
    trials: Sequence[Trial],
    columns: tuple[str, ...],
    measure: Callable[[Trial, Row], dict[str, Any]],
    show: Callable[[list[Row], Path], None],
    arguments: Given,
) -> None:
    """Carry out the trials that a table lacks, each on a core of its own, and show it; exit code 1 where one failed.

    Of each run <output>.csv gets a row at once. Several processes may add to it, as long as their runs are others.

    Args:
        trials: all that are wanted.
        columns: of the table; the first ones are those of `Trial.key`, up to the seed.
        measure: returns what else a trained run's row holds, given the row of evaluate.py; may raise `Failed`.
        show: writes what the rows come to into files whose names begin with a path.
        arguments: of the command line.
    """
    path, lock = arguments.output.with_name(f"{arguments.output.name}.csv"), threading.Lock()
    there = read_table(path, columns)
    missing = [trial for trial in trials if not is_done(trial, there.get(trial.key))]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1] * (os.cpu_count() or 1)
    free: SimpleQueue = SimpleQueue()
    for core in cores[: arguments.parallel]:
        free.put(core)

    def carry_out(trial: Trial) -> bool:
        """Do a trial on a core that is free; return whether it came to something."""
        core = free.get()
        try:
            known = dict(zip(columns, trial.key, strict=False)) | {"setting": trial.setting}
            row = known | measure(trial, trained(trial, core))
            with lock:
                add_row(path, columns, {name: str(row[name]) for name in columns})
                show([*read_table(path, columns).values()], arguments.output)
            return True
        except Failed as failure:
            tqdm.write(f"{trial.run_id}: {failure}", file=sys.stderr)
            return False
        finally:
            free.put(core)

    with ThreadPoolExecutor(free.qsize()) as pool:
        done = list(tqdm(pool.map(carry_out, missing), total=len(missing), unit="run", disable=not missing))
    show([*read_table(path, columns).values()], arguments.output)
    sys.exit(0 if all(done) else 1)


def is_done(trial: Trial, row: Row | None) -> bool:
    """Return whether a row is that of a trial: of its setting, and not shorter."""
    return row is not None and row["setting"] == trial.setting and int(row["steps"]) >= trial.steps


def trained(trial: Trial, core: int) -> Row:
    """Train a run to its end, from its newest checkpoint if it has one; return the row of evaluate.py."""
    options = [f"--resume={trial.run_id}"]
    if not list_checkpoints(Path("checkpoints") / trial.run_id):
        options = [f"--run-id={trial.run_id}", "--overwrite", f"--config={trial.config}", f"--seed={trial.key[-1]}"]
        options += [f"--set={change}" for change in trial.changes]
    command("train.py", *options, core=core, log=trial.run_id)
    output = Path("summaries") / f"{trial.run_id}-evaluation"
    options = [f"models/{trial.run_id}.nn", f"--output={output}", f"--seeds={EPISODES}", "--repetitions=1"]
    command("evaluate.py", *options, core=core, log=trial.run_id)
    return read_rows(output.with_name(f"{output.name}.csv"))[0]


def command(script: str, *options: str, core: int, log: str) -> None:
    """Run one of the project's command lines on one core; its output goes to a file beside the summaries.

    Raises:
        Failed: if it did; says what it said last.
    """
    arguments = [sys.executable, script, *options, "--cpu", "--processes=1"]
    # Without a limit PyTorch would start a thread for every core of the machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    bind = partial(os.sched_setaffinity, 0, {core}) if core >= 0 else None
    path = Path("summaries") / f"{log}.log"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        code = subprocess.run(arguments, env=environment, stdout=file, stderr=file, preexec_fn=bind).returncode
    if code:
        last = path.read_text(encoding="utf-8").splitlines()[-1:]
        raise Failed(f"{script} ended with code {code}: {''.join(last)} (see {path})")


def scalars(run_id: str, tag: str) -> dict[int, float]:
    """Return what TensorBoard has of a run under a tag, by steps; where it was resumed, the later start holds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for folder in sorted({path.parent for path in (Path("summaries") / run_id).rglob("*.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        if tag in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars(tag)}
    return found


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_table(path: Path, columns: tuple[str, ...]) -> dict[tuple[str, ...], Row]:
    """Return the rows of a table, which may not be there yet, by what its columns say up to the seed."""
    rows = read_rows(path) if path.exists() else []
    if any(tuple(row) != columns or None in row.values() for row in rows):
        raise UserError(f"{path}: should have the columns {', '.join(columns)}")
    return {tuple(row[name] for name in columns[: columns.index("seed") + 1]): row for row in rows}


def add_row(path: Path, columns: tuple[str, ...], row: Row) -> None:
    """Put a run's row into a table, in place of an earlier one."""
    rows = read_table(path, columns)
    rows[tuple(row[name] for name in columns[: columns.index("seed") + 1])] = row
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for _, row in sorted(rows.items()))
    write_file(path, text.getvalue().encode())
