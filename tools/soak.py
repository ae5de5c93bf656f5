"""Do to trainings what machines do to them, at random times, and check that nothing is lost.

Usage:
    soak [options]

Trains a run that nothing disturbs. Then, until the time is over, trains it again and
disturbs it: kills it, stops it, copies its folder, renames it, fills its disk, makes its
environments hang. After each, the run is resumed to its end and its weights are compared,
bit for bit; no process and no shared memory may be left. Linux only.

Options:
    --minutes=<n>  How long [default: 60].
    --seed=<n>     What is done, and when, derives from it [default: 1].
    --output=<file>  A .csv with a row for each disturbance [default: docs/results/soak.csv].
    -h --help      Show this.

Example: python -m tools.soak --minutes=5 --seed=2
"""

import csv
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import psutil
import torch
from pydantic import Field

from run.checkpoint import list_checkpoints, load
from run.cli import Arguments, Seed, arguments_of, command_line, to_file
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("number", "disturbance", "after_update", "exit_code", "resumed_from", "same_weights", "left")
DISTURBANCES = (
    "killed", "stopped by SIGTERM", "stopped by SIGHUP", "stopped by SIGUSR1", "a child killed", "environments hang",
    "disk full", "folder copied", "folder renamed",
)  # fmt: skip
UPDATES = 40
CHANGES = (
    f"updates={UPDATES}", "epochs=2", "n_workers=8", "worker_steps=64", "n_mini_batch=4", "checkpoint_interval=4",
    "hidden_layer_size=32", "prediction_coefficient=0.1", "transformer.num_blocks=1", "transformer.embed_dim=32",
)  # fmt: skip
START = (f"--config={ROOT}/configs/poc_memory_env.yaml", "--seed=1", *(f"--set={change}" for change in CHANGES))
# A run that was asked to stop waits 10 s for its environments; the rest is for a busy machine.
PATIENCE = 120
MARK = "SOAK"  # the variable by which processes of the soak are known; it holds the folder


class Soak:
    """A folder in which runs are trained and disturbed.

    Args:
        folder: where everything lies; empty.
        random: what is done, and when, is drawn from it.
    """

    def __init__(self, folder: Path, random: random.Random) -> None:
        self.folder, self.random, self.said = folder, random, folder / "output.txt"
        started = time.monotonic()
        self.finish("undisturbed")
        self.seconds, self.weights = time.monotonic() - started, self.weights_of("undisturbed")

    def train(self, *options: str) -> psutil.Popen:
        """Start train.py in the folder, with its output in a file."""
        command = [sys.executable, str(ROOT / "train.py"), *options, "--cpu", "--processes=2"]
        own = {MARK: str(self.folder), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)}
        with open(self.said, "ab") as output:
            return psutil.Popen(command, cwd=self.folder, env=os.environ | own, stdout=output, stderr=subprocess.STDOUT)

    def finish(self, run_id: str) -> str:
        """Train a run to its end; return the checkpoint that it went on from."""
        found = list_checkpoints(self.folder / "checkpoints" / run_id)
        # Where it was hit before its first checkpoint, there is nothing to lose.
        options = [f"--resume={run_id}"] if found else [*START, f"--run-id={run_id}", "--overwrite"]
        code = self.train(*options).wait(10 * PATIENCE)
        if code:
            raise UserError(f"{run_id} ended with exit code {code}: {self.said.read_text().splitlines()[-1]}")
        return found[-1].stem if found else "nothing"

    def weights_of(self, run_id: str) -> dict[str, torch.Tensor]:
        """Return the weights of the model of a run."""
        return load(self.folder / "models" / f"{run_id}.nn", "model")["weights"]

    def left(self, before: set[Path]) -> str:
        """Return which processes of the soak are still there, and what shared memory that was not there before."""
        found = [path.name for path in set(Path("/dev/shm").iterdir()) - before]
        for process in psutil.process_iter(["pid", "environ"]):
            if (process.info["environ"] or {}).get(MARK) == str(self.folder):
                found.append(f"process {process.pid}")
        return " ".join(found)

    def round(self, number: int) -> tuple:
        """Start a run, disturb it once, resume it to its end, and return a row of `COLUMNS`."""
        before, run_id, name = set(Path("/dev/shm").iterdir()), f"run-{number}", self.random.choice(DISTURBANCES)
        update = self.random.randint(0, UPDATES - 1)
        self.said.unlink()
        training = self.train(*START, f"--run-id={run_id}")
        while training.poll() is None and f"update {update}/" not in self.said.read_text() and update:
            time.sleep(0.01)
        time.sleep(self.random.uniform(0, 2 * self.seconds / UPDATES))
        goes_on = [run_id]
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            goes_on = self.disturb(training, run_id, name)
        code = training.wait(PATIENCE)
        resumed = [self.finish(run) for run in goes_on][-1]
        found = [self.weights_of(run) for run in goes_on]
        same = all(torch.equal(tensor, weights[key]) for weights in found for key, tensor in self.weights.items())
        time.sleep(1)  # until a resource tracker has gone, too
        for place in ("checkpoints", "models", "summaries"):
            shutil.rmtree(self.folder / place)
        return number, name, update, code, resumed, same, self.left(before)

    def disturb(self, training: psutil.Popen, run_id: str, name: str) -> list[str]:
        """Do something to a run that trains, and return the ids of those that have to go on."""
        place = self.folder / "checkpoints" / run_id
        children = training.children(recursive=True)
        match name.split():
            case ["killed"]:
                training.kill()
            case ["stopped", "by", number]:
                training.send_signal(signal.Signals[number])
            case ["a", "child", "killed"] if children:
                self.random.choice(children).kill()
            case ["environments", "hang"]:
                for worker in [worker for server in training.children() for worker in server.children()]:
                    worker.suspend()
                time.sleep(1)
                training.terminate()
            case ["disk", "full"]:  # which is what this looks like from within
                training.rlimit(resource.RLIMIT_FSIZE, (1024, 1024))
            case ["folder", "copied"] if place.exists():
                shutil.copytree(place, f"{place}-copy", ignore=shutil.ignore_patterns(".*"))
                return [run_id, f"{run_id}-copy"]
            case ["folder", "renamed"] if place.exists():
                place.rename(f"{place}-renamed")
                time.sleep(0.1 * self.seconds)
                training.kill()
                return [f"{run_id}-renamed"]
        return [run_id]


class Given(Arguments):
    """What the docstring says."""

    minutes: Annotated[float, Field(gt=0)]
    seed: Seed
    output: Annotated[Path, to_file(".csv")]


def main() -> None:
    """Disturb runs until the time is over; exit code 1 where anything was lost or left."""
    arguments = arguments_of(__doc__, Given)
    end, rows = time.monotonic() + 60 * arguments.minutes, list[tuple]()
    place = tempfile.TemporaryDirectory(prefix="soak-")
    with place as folder, arguments.output.open("w", newline="", encoding="utf-8", buffering=1) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        soak = Soak(Path(folder), random.Random(arguments.seed))
        print(f"undisturbed: {soak.seconds:.0f} s")
        while time.monotonic() < end:
            rows.append(soak.round(len(rows) + 1))
            writer.writerow(rows[-1])
            print(*rows[-1], sep="  ", flush=True)
    lost = sum(not same or left != "" for *_, same, left in rows)
    print(f"{len(rows)} disturbances, {lost} of them with a loss")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    command_line(main)
