"""Do to trainings what machines do to them, at random times, and check that nothing is lost.

Usage:
    soak [options]

Trains a run that nothing disturbs. Then, until the time is over, trains it again, disturbs it
once and resumes it to its end. The weights have to be the same, bit for bit, and no process
and no shared memory may be left. Prints a row of a CSV file for each time. Linux only.

Options:
    --minutes=<n>  How long [default: 60].
    --seed=<n>     What is done, and when, derives from it [default: 1].
    -h --help      Show this.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from run.checkpoint import list_checkpoints, load
from run.cli import Arguments, Count, Seed, arguments_of, command_line

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600  # seconds; what takes longer hangs
KEYS = ("updates=40", "n_workers=8", "worker_steps=64", "n_mini_batch=4", "checkpoint_interval=4",
        "hidden_layer_size=32", "prediction_coefficient=0.1", "transformer.embed_dim=32")  # fmt: skip
START = (f"--config={ROOT}/configs/poc_memory_env.yaml", "--seed=1", "--overwrite", *(f"--set={key}" for key in KEYS))


class Given(Arguments):
    """What the docstring says."""

    minutes: Count
    seed: Seed


def main() -> None:
    """Disturb runs in a folder of their own until the time is over; exit with 1 once one has lost or left anything."""
    arguments = arguments_of(__doc__, Given)
    random.seed(arguments.seed)
    began, number = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        os.environ |= {"OMP_NUM_THREADS": "1", "TMPDIR": place}
        train("undisturbed")[0].wait(PATIENCE)
        duration = time.monotonic() - began
        print("run,disturbance,after_seconds,exit_code,resumed_from,same_weights,left")
        while time.monotonic() < began + 60 * arguments.minutes:
            number += 1
            *row, same, left = disturb(f"run-{number}", random.uniform(0, duration))
            print(*row, same, left, sep=",", flush=True)
            if not same or left:
                sys.exit(1)


def disturb(run_id: str, seconds: float) -> tuple:
    """Start a run, disturb it once and resume it to its end; return its row of the table."""
    shared, (training, _), folder = set(os.listdir("/dev/shm")), train(run_id), Path("checkpoints", run_id)
    time.sleep(seconds)
    started = training.children(recursive=True)
    workers = [process for process in started if process.ppid() != training.pid]
    disturbances = {
        "killed": training.kill,
        "stopped by SIGTERM": training.terminate,
        "stopped by SIGHUP": lambda: training.send_signal(signal.SIGHUP),
        "stopped by SIGUSR1": lambda: training.send_signal(signal.SIGUSR1),
        "a child killed": lambda: random.choice(started).kill(),
        "environments hang": lambda: [*(worker.suspend() for worker in workers), training.terminate()],
        "disk full": lambda: training.rlimit(psutil.RLIMIT_FSIZE, (1024, 1024)),
        "folder copied": lambda: shutil.copytree(folder, f"{folder}-copy"),
        "folder renamed": lambda: folder.rename(f"{folder}-renamed"),
    }
    name = random.choice([*disturbances])
    with suppress(psutil.NoSuchProcess, OSError, IndexError):  # it has ended, or has nothing yet
        disturbances[name]()
    code = training.wait(PATIENCE)
    expected, same = load(Path("models", "undisturbed.nn"), "model")["weights"], True
    for run in sorted({run_id, *(path.name for path in Path("checkpoints").glob(f"{run_id}*"))}):
        again, checkpoint = train(run)
        if again.wait(PATIENCE):
            sys.exit(Path(f"{run}.txt").read_text())
        weights = load(Path("models", f"{run}.nn"), "model")["weights"]
        same &= all(torch.equal(tensor, weights[key]) for key, tensor in expected.items())
    time.sleep(1)  # until a resource tracker has gone, too
    ours = [process for process in psutil.process_iter(["environ"]) if process.info["environ"]]
    alive = [process for process in ours if process.info["environ"].get("TMPDIR") == os.environ["TMPDIR"]]
    left = [*(set(os.listdir("/dev/shm")) - shared), *(f"process {process.pid}" for process in alive)]
    return run_id, name, round(seconds, 2), code, checkpoint, same, " ".join(left)


def train(run_id: str) -> tuple[psutil.Popen, str]:
    """Start a run, or go on from its newest checkpoint, which is returned, too; what it says goes to a file."""
    found = list_checkpoints(Path("checkpoints", run_id))
    options = [f"--resume={run_id}"] if found else [f"--run-id={run_id}", *START]
    command = [sys.executable, f"{ROOT}/train.py", *options, "--cpu", "--processes=2"]
    with open(f"{run_id}.txt", "a") as said:
        return psutil.Popen(command, stdout=said, stderr=said), found[-1].stem if found else "nothing"


if __name__ == "__main__":
    command_line(main)
