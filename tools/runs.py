"""Tables of trained runs: what a table lacks is trained, a run on each core, and may be stopped at any time."""

import csv
import io
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from filelock import FileLock
from pydantic import Field
from tqdm import tqdm

from run.checkpoint import list_checkpoints, write_file
from run.cli import Arguments, Count, Processes, cores, to_file
from run.config import Schedule, load_config
from utils import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EPISODES = 100  # that a trained run plays where its table does not say otherwise
Row = dict[str, str]
# What the docstrings of all tables end with.
OPTIONS = """
    --seeds=<n>         Runs of each, with the seeds 1 to n; 0 trains nothing [default: 3].
    --tasks=<names>     Only these, or whose names contain one of these, with commas between.
    --updates=<n>       Updates of each run, schedules in proportion; by default the config's.
    --parallel=<n>      Runs at a time, a core each; by default one per core.
    -h --help           Show this.

What there is already is not done again, so it may be interrupted at any time. A run whose
config has changed, or that is to be longer, is done anew. <output>.csv has a row for each run.
"""


class Given(Arguments):
    """What the docstrings of all tables say; some lack the last ones."""

    seeds: Annotated[int, Field(ge=0, le=1000)]
    tasks: str | None
    updates: Count | None
    parallel: Processes | None
    output: Annotated[Path, to_file("")]
    memories: str | None = None
    lengths: str | None = None
    config: Path | None = None


@dataclass(frozen=True)
class Trial:
    """One training."""

    key: tuple[str, ...]  # what tells it from the others of its table; the last part is the seed
    setting: str  # a digest of all that it depends on but its seed and its length
    config: Path
    changes: tuple[str, ...]  # in the config, key=value
    steps: int

    @property
    def run_id(self) -> str:
        """The name of its files; a run that this name has a checkpoint of goes on."""
        return "-".join(part for part in (*self.key, self.setting, str(self.steps)) if part)


def make_trial(
    key: tuple[str, ...], path: Path, changes: Sequence[str], updates: int | None, setting: str = ""
) -> Trial:
    """Return a training of so many updates and schedules in proportion, by default as many as the config says."""
    config, lengths = load_config(path, changes), {}
    if updates and updates != config.updates:
        lengths = {"updates": updates} | {
            f"{name}.max_decay_steps": max(1, round(schedule.max_decay_steps * updates / config.updates))
            for name, schedule in config
            if isinstance(schedule, Schedule)
        }
    changed = (*changes, *(f"{name}={value}" for name, value in lengths.items()))
    return Trial(key, setting or digest(path, changes), path, changed, (updates or config.updates) * config.samples)


def digest(config: Path, *more: Any) -> str:
    """Return a digest of what a config file says, in whatever order, and more: keys of later versions do not count."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    return f"{zlib.crc32(json.dumps([values, *more] if more else values, sort_keys=True).encode()):08x}"


def chosen(text: str | None, known: Iterable[str], flag: str) -> list[str]:
    """Return the names that are given, in whole or in part, in a text with commas; all where there is none."""
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
    episodes: int = EPISODES,
) -> None:
    """Carry out the trials that a table lacks, each on a core of its own, then show it; exit code 1 where one failed.

    Each run's row is added at once. Several processes may add to a table, as long as their runs differ.

    Args:
        columns: the first ones are those of `Trial.key`, up to the seed.
        measure: returns what else a trained run's row holds, given the row of evaluate.py; may raise UserError.
        show: writes what the rows come to into files whose names begin with a path.
        episodes: how many a trained run plays.
    """
    path = arguments.output.with_name(f"{arguments.output.name}.csv")
    free = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def take_a_core() -> None:
        if free:  # a thread keeps it, and so does what it starts
            os.sched_setaffinity(0, {free.pop(0)})

    def came_to_something(trial: Trial) -> bool:
        """Train, measure and add a run; say why and return False where that fails."""
        try:
            row = dict(zip(columns, trial.key, strict=False)) | measure(trial, trained(trial, episodes))
        except UserError as error:
            tqdm.write(f"{trial.run_id}: {error}", file=sys.stderr)
            return False
        with FileLock(path.with_name(f".{path.name}.lock")):
            add_row(path, columns, row | {"setting": trial.setting})
            show([*read_table(path, columns).values()], arguments.output)
        return True

    done = {(*key, row["setting"]): int(row["steps"]) for key, row in read_table(path, columns).items()}
    missing = [trial for trial in trials if done.get((*trial.key, trial.setting), 0) < trial.steps]
    with ThreadPoolExecutor(min(arguments.parallel or cores(), cores()), initializer=take_a_core) as pool:
        came = list(tqdm(pool.map(came_to_something, missing), total=len(missing), unit="run", disable=not missing))
    if not missing:  # otherwise each run has shown it
        show([*read_table(path, columns).values()], arguments.output)
    sys.exit(0 if all(came) else 1)


def trained(trial: Trial, episodes: int) -> Row:
    """Train a run to its end, from its newest checkpoint if it has one; return the row of evaluate.py.

    What is printed goes to a file beside the summaries; where anything fails, a UserError quotes its last line.
    """
    run_id, output = trial.run_id, Path("summaries", f"{trial.run_id}-evaluation.csv")
    training = [f"--resume={run_id}"]
    if not list_checkpoints(Path("checkpoints", run_id)):
        training = [f"--run-id={run_id}", "--overwrite", f"--config={trial.config}", f"--seed={trial.key[-1]}"]
        training += [f"--set={change}" for change in trial.changes]
    evaluation = [f"models/{run_id}.nn", f"--output={output.with_suffix('')}", f"--seeds={episodes}", "--repetitions=1"]
    log, environment = output.with_name(f"{run_id}.log"), os.environ | {"OMP_NUM_THREADS": "1"}
    log.parent.mkdir(exist_ok=True)
    for script, options in {"train.py": training, "evaluate.py": evaluation}.items():
        command = [sys.executable, script, *options, "--cpu", "--processes=1"]
        with log.open("a", encoding="utf-8") as file:
            code = subprocess.run(command, env=environment, stdout=file, stderr=file).returncode
        if code:
            last = log.read_text(encoding="utf-8").splitlines()[-1:]
            raise UserError(f"{script} ended with code {code}: {''.join(last)} (see {log})")
    return read_rows(output)[0]


def scalars(run_id: str, tag: str) -> dict[int, float]:
    """Return what TensorBoard has of a run under a tag, by steps; where it was resumed, the later start holds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for folder in sorted({path.parent for path in (Path("summaries") / run_id).rglob("*.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        if tag in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars(tag)}
    return dict(sorted(found.items()))


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_table(path: Path, columns: tuple[str, ...]) -> dict[tuple[str, ...], Row]:
    """Return the rows of a table, which may not be there yet, by what its columns say up to the seed."""
    rows = read_rows(path) if path.exists() else []
    if any(tuple(row) != columns for row in rows):
        raise UserError(f"{path}: should have the columns {', '.join(columns)}")
    return {tuple(row[name] for name in columns[: columns.index("seed") + 1]): row for row in rows}


def add_row(path: Path, columns: tuple[str, ...], row: dict[str, Any]) -> None:
    """Put a run's row into a table, in place of an earlier one."""
    key = tuple(row[name] for name in columns[: columns.index("seed") + 1])
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for _, row in sorted((read_table(path, columns) | {key: row}).items()))
    write_file(path, text.getvalue().encode())
