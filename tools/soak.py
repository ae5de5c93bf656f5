"""Do to trainings what machines do to them, at random times, and check that nothing is lost.

Usage:
    soak [options]

Trains a run that nothing disturbs. Then, until the time is over, trains it again and
disturbs it: kills it, stops it, copies its folder, renames it, fills its disk, makes an
environment hang. After each, the run is resumed to its end and its weights are compared,
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
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np
import psutil
import torch
import yaml
from pydantic import Field

from run.checkpoint import load
from run.cli import Arguments, Seed, arguments_of, command_line, to_file
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("number", "disturbance", "after_update", "exit_code", "resumed_from", "same_weights", "left")
# Environments hang while the file is there that this variable names. It also marks the processes of the soak.
HANGING = "SOAK_HANGING"
# A run that was asked to stop waits 10 s for its environments; the rest is for a busy machine.
PATIENCE = 120
SCHEDULE = {"initial": 3e-3, "final": 1e-4, "max_decay_steps": 40}
CONFIG: dict[str, Any] = {
    "environment": {"type": "Gymnasium", "name": "tools.soak:Recall-v0"},
    "updates": 40,
    "epochs": 2,
    "n_workers": 8,
    "worker_steps": 64,
    "n_mini_batch": 4,
    "hidden_layer_size": 32,
    "checkpoint_interval": 4,
    "kl_limit": 0.05,
    "prediction_coefficient": 0.1,
    "transformer": {
        "num_blocks": 1, "embed_dim": 32, "num_heads": 2, "memory_length": 16, "positional_encoding": "relative",
    },
    **{f"{name}_schedule": dict(SCHEDULE) for name in ("learning_rate", "beta", "clip_range")},
}  # fmt: skip


class Recall(gymnasium.Env):
    """Shows one of four marks, and wants it named ten steps later."""

    observation_space = gymnasium.spaces.Box(0, 1, (5,), np.float32)
    action_space = gymnasium.spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Draw a mark, and show it."""
        super().reset(seed=seed)
        self.mark, self.time = int(self.np_random.integers(4)), 0
        return np.eye(5, dtype=np.float32)[self.mark], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Show nothing more; hang while the file is there."""
        while os.path.exists(os.environ[HANGING]):
            time.sleep(0.1)
        self.time += 1
        asked = self.time == 10
        return np.eye(5, dtype=np.float32)[4], float(asked and action == self.mark), asked, False, {}


gymnasium.register("Recall-v0", entry_point="tools.soak:Recall")


class Soak:
    """A folder in which runs are trained and disturbed.

    Args:
        folder: where everything lies; empty.
        random: what is done, and when, is drawn from it.
    """

    def __init__(self, folder: Path, random: random.Random) -> None:
        self.folder, self.random, self.hanging = folder, random, folder / "hanging"
        self.environment = os.environ | {
            HANGING: str(self.hanging), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder),
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        started = time.monotonic()
        self.finish("undisturbed", "--config=config.yaml", "--seed=1", "--run-id=undisturbed")
        self.seconds, self.weights = time.monotonic() - started, self.weights_of("undisturbed")

    def start(self, *options: str) -> subprocess.Popen:
        """Start train.py in the folder, with its output in a file."""
        command = [sys.executable, str(ROOT / "train.py"), *options, "--cpu", "--processes=2"]
        with open(self.folder / "output.txt", "ab") as output:
            return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=output, stderr=output)

    def finish(self, run_id: str, *options: str) -> None:
        """Train a run to its end: a new one, or, without options, one that goes on."""
        code = self.start(*options or (f"--resume={run_id}",)).wait(10 * PATIENCE)
        if code:
            raise UserError(f"{run_id} ended with exit code {code}: {self.said()}")

    def said(self) -> str:
        """Return what train.py said last."""
        return (self.folder / "output.txt").read_text().splitlines()[-1]

    def weights_of(self, run_id: str) -> dict[str, torch.Tensor]:
        """Return the weights of the model of a run."""
        return load(self.folder / "models" / f"{run_id}.nn", "model")["weights"]

    def left(self) -> str:
        """Return which processes of the soak and what shared memory of theirs are still there."""
        found = [f"process {process.pid}" for process in psutil.process_iter() if self.owns(process)]
        return " ".join(found + [path.name for path in Path("/dev/shm").iterdir() if path.name not in self.before])

    def owns(self, process: psutil.Process) -> bool:
        """Return whether a process was started by this soak."""
        try:
            return process.pid != os.getpid() and process.environ().get(HANGING) == str(self.hanging)
        except psutil.Error:
            return False

    def disturb(self, number: int) -> dict[str, object]:
        """Start a run, disturb it once, resume it to its end, and return what came of it."""
        self.before = {path.name for path in Path("/dev/shm").iterdir()}
        run_id, name = f"run-{number}", self.random.choice(sorted(DISTURBANCES))
        update, said = self.random.randint(0, CONFIG["updates"] - 1), self.folder / "output.txt"
        said.unlink()
        training = self.start("--config=config.yaml", "--seed=1", f"--run-id={run_id}")
        while training.poll() is None and f"update {update}/" not in said.read_text() and update:
            time.sleep(0.01)
        time.sleep(self.random.uniform(0, 2 * self.seconds / CONFIG["updates"]))
        goes_on = DISTURBANCES[name](self, training, run_id)
        code = training.wait(PATIENCE)
        self.hanging.unlink(missing_ok=True)
        resumed = "nothing"
        for run in goes_on:
            checkpoints = sorted((self.folder / "checkpoints" / run).glob("checkpoint-*.pt"))
            if checkpoints:
                resumed = checkpoints[-1].stem
                self.finish(run)
            else:  # it was hit before its first checkpoint: there is nothing to lose
                self.finish(run, "--config=config.yaml", "--seed=1", f"--run-id={run}", "--overwrite")
        found = [self.weights_of(run) for run in goes_on]
        same = all(torch.equal(tensor, weights[key]) for weights in found for key, tensor in self.weights.items())
        time.sleep(1)  # until a resource tracker has gone, too
        row = (number, name, update, code, resumed, same, self.left())
        for place in ("checkpoints", "models", "summaries"):
            shutil.rmtree(self.folder / place)
        return dict(zip(COLUMNS, row, strict=True))


def sends(number: signal.Signals) -> Callable[[Soak, subprocess.Popen, str], list[str]]:
    """Return a disturbance that sends a signal to a training."""

    def disturbance(soak: Soak, training: subprocess.Popen, run_id: str) -> list[str]:
        training.send_signal(number)
        return [run_id]

    return disturbance


def kills_worker(soak: Soak, training: subprocess.Popen, run_id: str) -> list[str]:
    """Kill one of the processes that it has started."""
    children = psutil.Process(training.pid).children(recursive=True)
    if children:
        soak.random.choice(children).kill()
    return [run_id]


def hangs(soak: Soak, training: subprocess.Popen, run_id: str) -> list[str]:
    """Let its environments hang, and ask it to stop."""
    soak.hanging.touch()
    time.sleep(1)
    training.terminate()
    return [run_id]


def fills_disk(soak: Soak, training: subprocess.Popen, run_id: str) -> list[str]:
    """Let no file grow beyond a kilobyte any more, which is what a full disk looks like from within."""
    resource.prlimit(training.pid, resource.RLIMIT_FSIZE, (1024, 1024))
    return [run_id]


def copies(soak: Soak, training: subprocess.Popen, run_id: str) -> list[str]:
    """Copy its folder while it trains; the copy is a run of its own."""
    folder = soak.folder / "checkpoints"
    if not (folder / run_id).exists():
        return [run_id]
    shutil.copytree(folder / run_id, folder / f"{run_id}-copy", ignore=shutil.ignore_patterns(".*"))
    return [run_id, f"{run_id}-copy"]


def renames(soak: Soak, training: subprocess.Popen, run_id: str) -> list[str]:
    """Rename its folder while it trains, and kill it."""
    folder = soak.folder / "checkpoints"
    if (folder / run_id).exists():
        (folder / run_id).rename(folder / f"{run_id}-renamed")
        run_id = f"{run_id}-renamed"
    time.sleep(0.1 * soak.seconds)
    training.kill()
    return [run_id]


DISTURBANCES: dict[str, Callable[[Soak, subprocess.Popen, str], list[str]]] = {
    "killed": sends(signal.SIGKILL),
    "stopped by SIGTERM": sends(signal.SIGTERM),
    "stopped by SIGHUP": sends(signal.SIGHUP),
    "stopped by SIGUSR1": sends(signal.SIGUSR1),
    "a child killed": kills_worker,
    "environments hang": hangs,
    "disk full": fills_disk,
    "folder copied": copies,
    "folder renamed": renames,
}


class Given(Arguments):
    """What the docstring says."""

    minutes: Annotated[float, Field(gt=0)]
    seed: Seed
    output: Annotated[Path, to_file(".csv")]


def main() -> None:
    """Disturb runs until the time is over; exit code 1 where anything was lost or left."""
    arguments = arguments_of(__doc__, Given)
    end, lost = time.monotonic() + 60 * arguments.minutes, 0
    place = tempfile.TemporaryDirectory(prefix="soak-")
    with place as folder, arguments.output.open("w", newline="", encoding="utf-8", buffering=1) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        soak, number = Soak(Path(folder), random.Random(arguments.seed)), 0
        print(f"undisturbed: {soak.seconds:.0f} s")
        while time.monotonic() < end:
            number += 1
            row = soak.disturb(number)
            rows.writerow(row.values())
            lost += not row["same_weights"] or bool(row["left"])
            print(*row.values(), sep="  ", flush=True)
    print(f"{number} disturbances, {lost} of them with a loss")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    command_line(main)
