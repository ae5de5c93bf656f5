"""Environments in processes of their own: the same episodes however they are spread, and faults that stay there."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import psutil
import pytest

from environments import SECTIONS
from environments.contract import Task
from environments.section import Section
from tests.toy_environments import toy
from utils import EnvironmentFailure, UserError, own_rows, training_seed
from worker import Workers, inspect_environment

ROOT = Path(__file__).parents[1]
TOY = Task(None, 3, (3,), 0, 24)
HERE = r"^environment \d, reset seed \d+, step 9: "


def section(name: str) -> Section:
    """Return the section of a toy, or of a registered environment that is named with its module."""
    return SECTIONS["Gymnasium"].model_validate(toy(name) | ({"name": name} if ":" in name else {}))


@contextlib.contextmanager
def started(name: str, count: int = 3, processes: int = 2, state: dict | None = None, **options):
    """Yield the started workers of an environment."""
    seed = partial(training_seed, 5, section(name))
    workers = Workers(section(name), TOY, count, seed, processes, **options)
    if state is not None:
        workers.load_state_dict(state)
    with contextlib.closing(workers):
        workers.start()
        yield workers


def step(workers: Workers, t: int) -> list:
    """Step all environments once, by actions that depend on number and step; return all that is seen."""
    for group in workers.groups:
        actions = [[(workers.first + index + t * t) % 3] for index in group]
        workers.send(group, np.array(actions, dtype=np.int64))
    ended = [report for group in workers.groups for report in workers.receive(group)]
    arrays = workers.arrays
    seen = [arrays.vectors, arrays.rewards, arrays.terminated, arrays.truncated, arrays.digests]
    rows = [[array[index].tolist() for array in seen] for index in range(len(workers.episodes))]
    return [[row, [report for index, report in ended if index == number]] for number, row in enumerate(rows)]


def played(name: str, steps: int = 40, **options) -> list:
    """Return what is seen in so many steps, by environment."""
    with started(name, **options) as workers:
        return [list(rows) for rows in zip(*(step(workers, t) for t in range(steps)), strict=True)]


# --------------------------------------------------------------------------------------------------- the same episodes

# Draws from all generators, before any other in its process and in between.
GLOBAL = """
import torch
class Mine(Toy):
    def draw(self):
        return random.random() + random.gauss(0, 1) + np.random.rand() + np.random.randn()
    def __init__(self, render_mode=None): self.offset = self.draw()
    def reset(self, **options):
        super().reset(**options)
        self.place = self.draw() + self.offset + torch.rand(()).item()
        return self.observe(), {}
    def fault(self):
        if random.random() < .5: self.place += self.draw() + torch.rand(()).item()
"""


def test_episodes_do_not_depend_on_who_steps_them():
    one = played("Toy", count=4, processes=1)
    assert one == played("Toy", count=4, processes=2, groups=2)
    assert one[2:] == played("Toy", count=2, processes=1, first=2)


def test_global_generators_differ_by_environment_and_episode_alone(module):
    name = module(GLOBAL)
    one = played(name, count=2, processes=1)
    assert one[1:] == played(name, count=1, processes=1, first=1)
    starts = [rows[t + 1][0][0][0] for rows in one for t in range(39) if rows[t][1]]  # as they are first seen
    assert len(starts) >= 2 and len({*starts}) == len(starts)


@pytest.mark.parametrize("victim", ("worker", "server"))
def test_a_process_that_is_killed_is_replaced(victim, capfd):
    """Whoever kills it, and when; the fork server is needed only to replace workers."""
    expected = played("Toy")
    with started("Toy", groups=2) as workers:
        seen = []
        for t in range(40):
            if t in (3, 16):
                if victim == "server":
                    server = forkserver._forkserver._forkserver_pid
                    os.kill(server, signal.SIGKILL)
                    os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
                os.kill(workers.processes[t % 2].handle.pid, signal.SIGKILL)
            seen.append(step(workers, t))
    assert [list(rows) for rows in zip(*seen, strict=True)] == expected
    assert "its process died" in capfd.readouterr().err


def test_state_goes_on_elsewhere(module):
    """Running episodes are brought back, by other processes and in other shares."""
    expected = played("Toy", steps=30, count=4)
    with started("Toy", count=4, groups=2) as workers:
        for t in range(17):
            step(workers, t)
        state = workers.state_dict()
    for place in (0, 2):
        half = own_rows(state, range(place, place + 2))
        with started("Toy", count=2, processes=1, first=place, state=half) as workers:
            after = {name: [*map(str, entries)] for name, entries in workers.state_dict().items()}
            assert after == {name: [*map(str, entries)] for name, entries in half.items()}
            seen = [list(rows) for rows in zip(*(step(workers, t) for t in range(17, 30)), strict=True)]
            assert seen == [rows[17:] for rows in expected[place : place + 2]]


def test_an_environment_that_is_not_deterministic(capfd):
    """Its episodes begin afresh, which is told; within a rollout they count as truncated at the step that was lost."""
    with started("Random", processes=1) as workers:
        for t in range(5):
            step(workers, t)
        state, shown = workers.state_dict(), workers.arrays.vectors.copy()
        os.kill(workers.processes[0].handle.pid, signal.SIGKILL)
        step(workers, 5)
        arrays = workers.arrays
        assert arrays.truncated.all() and not arrays.terminated.any() and not arrays.rewards.any()
        assert (workers.final.vectors == shown).all() and (arrays.vectors != shown).any(axis=1).all()
        step(workers, 6)
        assert not arrays.truncated.any() and [len(episode.actions) for episode in workers.episodes] == [1, 1, 1]
    with started("Random", state=state) as workers:
        assert [episode.number for episode in workers.episodes] == [1, 1, 1]
        step(workers, 0)
    assert capfd.readouterr().err.count("environments [0, 1, 2] are not deterministic and began fresh episodes") == 2


# -------------------------------------------------------------------------------------------------------------- faults

FAILURES = {
    "Exit": r"its process died \(exit code 7\) 4 times at the same step$",
    "Raise": r"it raised\nTraceback(.|\n)*toy_environments.py(.|\n)*ArithmeticError: the toy is broken$",
    "Leaves": r"SystemExit: window closed",
    "InfiniteReward": r".*reward is not finite: inf$",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_says_where(name, toy_folder):
    with pytest.raises(EnvironmentFailure) as failure:
        played(name)
    assert re.search(HERE + FAILURES[name], str(failure.value)), failure.value
    environment, seed = re.search(r"environment (\d), reset seed (\d+)", str(failure.value)).groups()
    assert int(seed) == training_seed(5, section(name), int(environment), 0)


UNPLAYABLE = {
    "import": ("class Mine(Toy): pass\nsys.exit(0)", r"^environment: SystemExit: 0 .*mine.py:5\)$"),
    "reset": ("class Mine(Toy):\n    def reset(self, **_): sys.exit('closed')", "SystemExit: closed"),
    "crash": ("class Mine(Toy):\n    def reset(self, **_): os.abort()", r"^environment: its process died .*-6\)$"),
    "gym": ("class Mine(Toy):\n    def reset(self): pass", r"^environment: [^\n]*unexpected keyword argument 'seed'"),
}


@pytest.mark.parametrize("what", UNPLAYABLE)
def test_what_cannot_be_played_is_no_success(what, module):
    """What its author can mend is told apart from an environment that leaves."""
    text, message = UNPLAYABLE[what]
    with pytest.raises(UserError if what == "gym" else EnvironmentFailure, match=message):
        inspect_environment(section(module(text)))
    assert not multiprocessing.active_children()


UNTIDY = """
import argparse
import worker, model
from utils import clamp
argparse.ArgumentParser().parse_args()
sys.stdout = sys.stderr = None
class Mine(Toy):
    def __init__(self, render_mode=None): os.chdir('/')
    def step(self, action): return super().step(clamp(action))
    def close(self): raise RuntimeError('not connected')
"""


def test_what_an_environment_does_to_its_process_stays_there(module, tmp_path, capfd):
    """It is found in the current folder with what it imports, plays as any, and the trainer never sees its module."""
    for own in ("utils", "worker", "model"):
        (tmp_path / f"{own}.py").write_text("def clamp(action): return action\n")
    arguments, path = [*sys.argv], [*sys.path]
    mine = module(UNTIDY)
    task, (notice,) = inspect_environment(section(mine))
    assert task == TOY and notice.startswith("environment: close() fails, which is ignored: RuntimeError: not connect")
    assert played(mine) == played("Toy")
    assert (sys.argv, sys.path, Path.cwd()) == (arguments, path, tmp_path)
    files = [str(getattr(found, "__file__", "")) for found in sys.modules.values()]
    assert not any(file.startswith(str(tmp_path)) for file in files) and not capfd.readouterr().err


ORPHAN = """
from tests.test_workers import *
with started("Hangs") as workers:
    print(*(process.handle.pid for process in workers.processes), flush=True)
    played = [step(workers, t) for t in range(9)]
"""


def test_nothing_outlives_a_trainer_that_is_killed():
    """Not even an environment that hangs."""
    trainer = subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    time.sleep(0.5)
    trainer.kill()
    trainer.wait()
    until = time.monotonic() + 60
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < until
        time.sleep(0.1)
