"""Carry out many trainings, one on each core, so that they may be stopped at any time and go on where they were."""

import csv
import ctypes
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

from run.checkpoint import list_checkpoints, write_file
from utils import UserError

# Linux tells a process by a signal that its parent is gone.
LIBC, PARENT_DEATH = ctypes.CDLL(None) if os.name == "posix" else None, 1


class Failed(Exception):
    """A run came to nothing; says why."""


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        run_id: names its files; a run that this id has a checkpoint of goes on.
        options: of train.py, when it starts.
        steps: how long it is, for the bar.
    """

    run_id: str
    options: tuple[str, ...]
    steps: int


def carry_out(jobs: Sequence[Job], finish: Callable[[Job, int], None], parallel: int | None = None) -> bool:
    """Train all jobs, each on a core of its own; return whether all came to something.

    Args:
        jobs: what is to be trained.
        finish: called with a job whose training has ended and the core that it may use; may raise `Failed`.
        parallel: how many at a time; by default one per core.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1] * (os.cpu_count() or 1)
    free: SimpleQueue = SimpleQueue()
    for core in cores[:parallel]:
        free.put(core)

    def carry_out_one(job: Job) -> bool:
        """Train a job on a core that is free; return whether it came to something."""
        core = free.get()
        try:
            train(job, core)
            finish(job, core)
            return True
        except Failed as failure:
            tqdm.write(f"{job.run_id}: {failure}", file=sys.stderr)
            return False
        finally:
            free.put(core)
            bar.update(job.steps)

    total = sum(job.steps for job in jobs)
    with (
        tqdm(total=total, unit=" steps", unit_scale=True, disable=not jobs) as bar,
        ThreadPoolExecutor(free.qsize()) as pool,
    ):
        return all(list(pool.map(carry_out_one, jobs)))


def train(job: Job, core: int) -> None:
    """Train a run to its end, from its newest checkpoint if it has one."""
    options = [f"--resume={job.run_id}"]
    if not list_checkpoints(Path("checkpoints", job.run_id)):
        options = [f"--run-id={job.run_id}", "--overwrite", *job.options]
    command("train.py", *options, core=core, log=job.run_id)


def evaluate(job: Job, core: int, *options: str) -> dict[str, str]:
    """Return the row that evaluate.py writes of a trained model."""
    output = Path("summaries") / f"{job.run_id}-evaluation"
    command(
        "evaluate.py",
        str(Path("models", f"{job.run_id}.nn")),
        f"--output={output}",
        *options,
        core=core,
        log=job.run_id,
    )
    return read_rows(output.with_name(output.name + ".csv"))[0]


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
    """Bind this process, which is to become a training, to a core, and let it stop when its parent does.

    A training that went on alone would be in the way of the next one's files.
    """
    if core >= 0:
        os.sched_setaffinity(0, {core})
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(PARENT_DEATH, signal.SIGTERM)


def scalars(run_id: str, tag: str) -> dict[int, float]:
    """Return what TensorBoard has of a run under a tag, by steps; where it was resumed, the later start holds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for folder in sorted({path.parent for path in (Path("summaries") / run_id).rglob("*.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        if tag in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars(tag)}
    return found


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Rows:
    """A CSV file with a row for each run, to which several processes may add.

    Args:
        path: the file, which may not be there yet.
        columns: its columns.
        keys: how many of them, from the first, tell a run from others.

    Raises:
        UserError: if the file is none of these.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], keys: int) -> None:
        self.path, self.columns, self.keys = path, columns, keys
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        self.lock = threading.Lock()
        self.read()

    def read(self) -> None:
        """Read what is there, to which another process may have added."""
        try:
            for row in read_rows(self.path) if self.path.exists() else []:
                if tuple(row) != self.columns or None in row.values():
                    raise ValueError("other columns")
                self.rows[tuple(row[name] for name in self.columns[: self.keys])] = row
        except (ValueError, TypeError, OSError, csv.Error) as error:
            raise UserError(f"{self.path}: should have the columns {', '.join(self.columns)} ({error})") from error

    def add(self, row: dict) -> None:
        """Keep a run's row, in place of an earlier one, at once."""
        with self.lock:
            self.read()
            row = {name: str(row[name]) for name in self.columns}
            self.rows[tuple(row[name] for name in self.columns[: self.keys])] = row
            text = io.StringIO()
            writer = csv.DictWriter(text, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for _, row in sorted(self.rows.items()))
            write_file(self.path, text.getvalue().encode())
