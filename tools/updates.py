"""One side of benchmark.py: does what it reads, an update or another measurement a line, and answers in JSON.

It imports the version of this project that comes first on PYTHONPATH.
"""

import itertools
import json
import os
import resource
import sys
import time
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import psutil
import torch

from run.cli import Computing, command_line, cores, use_cores
from run.config import load_config
from run.distributed import together
from run.start import Options
from trainer import PPOTrainer
from worker import inspect_environment

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


def main() -> None:
    """Make a trainer of what the command line says in JSON, and answer until nobody asks any more."""
    given = SimpleNamespace(**json.loads(sys.argv[1]))
    # What environments print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with together(Computing(**{"--device": given.device, "--cpu": given.cpu})) as (ranks, device):
        config = load_config(given.config, given.set)
        use_cores(device, ranks.local_size)
        processes = given.processes or max(1, cores() // ranks.local_size)
        options = Options(device, processes, precision=given.precision, compile=given.compile, ranks=ranks)
        trainer = PPOTrainer(config, inspect_environment(config.environment)[0], 1, options)
        with closing(trainer.workers):
            trainer.start_workers()
            for line in sys.stdin:
                found = {"update": measured, "environments": stepped, "profile": profiled}[line.strip()](trainer)
                print(json.dumps(found), file=answers, flush=True)


def measured(trainer: PPOTrainer) -> dict[str, float]:
    """Carry out one update; return seconds, rates, and memory in GB."""
    before, started = cpu_seconds(), time.perf_counter()
    scalars = trainer.train_update()
    wall = time.perf_counter() - started
    on_gpu = trainer.device.type == "cuda"
    return {
        "steps/s": trainer.config.samples / wall,
        "steps/s, sampling": scalars["performance/sampling_steps_per_second"],
        "steps/s, optimisation": scalars["performance/optimisation_steps_per_second"],
        "seconds": wall,
        "CPU seconds": cpu_seconds() - before,
        "GB, trainer at most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT / 1e9,
        "GB, workers": sum(child.memory_info().rss for child in psutil.Process().children(recursive=True)) / 1e9,
    } | ({"GB, GPU at most": torch.cuda.max_memory_allocated(trainer.device) / 1e9} if on_gpu else {})


def cpu_seconds() -> float:
    """Return what this process and those that step its environments have used so far."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


def stepped(trainer: PPOTrainer) -> dict[str, float]:
    """Let the environments alone make the steps of an update, by random actions that are allowed."""
    workers, task, generator, started = trainer.workers, trainer.task, np.random.default_rng(1), time.perf_counter()
    for _, group in itertools.product(range(trainer.config.worker_steps), workers.groups):
        if task.continuous:
            actions = generator.standard_normal((len(group), task.action_size), dtype=np.float32)
        else:
            preferences = generator.random((len(group), sum(task.branches)))
            if workers.arrays.masks is not None:
                preferences *= workers.arrays.masks[group.start : group.stop]
            branches = np.split(preferences, np.cumsum(task.branches)[:-1], axis=1)
            actions = np.stack([branch.argmax(axis=1) for branch in branches], axis=1)
        workers.send(group, actions)
        workers.receive(group)
    return {"steps/s": trainer.config.samples / (time.perf_counter() - started)}


def profiled(trainer: PPOTrainer) -> dict[str, str]:
    """Carry out one update under PyTorch's profiler; return a table of its operators."""
    with torch.profiler.profile() as profiler:
        trainer.train_update()
    by = "self_cuda_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
    return {"profile": profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=40)}


if __name__ == "__main__":
    command_line(main)
