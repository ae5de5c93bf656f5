"""Environments that go wrong in a chosen way, registered by importing this module: `tests.toy_environments:Exit-v0`.

They are quick, and all but `Random` are determined by their reset seed and their actions. What goes wrong does so
after the first step, because the trainer plays one step itself before it starts any process.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np


def toy(name: str, **entries) -> dict:
    """Return the `environment` section of a toy."""
    return {"type": "Gymnasium", "name": f"tests.toy_environments:{name}-v0"} | entries


LONGEST = 24
# An episode goes wrong at this step.
FAULT_STEP = 9


class Toy(gymnasium.Env):
    """Shows where a point on a line is and how old the episode is; pays for being right of the middle."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)
    bonus = 0.0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age, self.place = 0, float(self.np_random.normal())
        self.end = int(self.np_random.integers(LONGEST // 2, 2 * LONGEST))
        return self.observe(), {}

    def step(self, action):
        self.age += 1
        self.place += 0.1 * (int(action) - 1) + 0.01 * float(self.np_random.normal())
        self.fault()
        return self.observe(), float(self.place > 0) + self.bonus, self.age >= self.end, False, {}

    def observe(self):
        return np.array([self.place, self.age / LONGEST, self.end % 2], dtype=np.float32)

    def fault(self):
        """Go wrong, or not."""


class Faulty(Toy):
    """Goes wrong at a step, in one of the ways that `FAULTS` names."""

    def __init__(self, name, render_mode=None):
        super().__init__(render_mode)
        self.name = name

    def fault(self):
        if self.age == FAULT_STEP:
            FAULTS[self.name](self)


def raise_unless_well(toy):
    """Raise an exception while the file TOY_FOLDER/well does not exist."""
    if not (Path(os.environ["TOY_FOLDER"]) / "well").exists():
        raise ArithmeticError("the toy is broken")


FAULTS = {
    "Exit": lambda toy: os._exit(7),
    "Raise": raise_unless_well,
    "NotANumber": lambda toy: setattr(toy, "place", float("nan")),
    "InfiniteReward": lambda toy: setattr(toy, "bonus", float("inf")),
    "Hangs": lambda toy: time.sleep(10**6),
    "Leaves": lambda toy: sys.exit("window closed"),
}


class KillTrainerOnce(Toy):
    """Kills the trainer in its third rollout, where it has two environments in one process; needs TOY_FOLDER."""

    steps = 0

    def fault(self):
        KillTrainerOnce.steps += 1
        killed = Path(os.environ["TOY_FOLDER"]) / "killed"
        if KillTrainerOnce.steps == 70 and not killed.exists():
            killed.touch()
            os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)


class Random(Toy):
    """Is determined by nothing."""

    def step(self, action):
        self.place += random.SystemRandom().random()
        return super().step(action)


class Often(Toy):
    """Succeeds by chance in 80 % of the episodes, and says nothing where it does not."""

    def step(self, action):
        observation, reward, terminated, truncated, _ = super().step(action)
        return observation, reward, terminated, truncated, {"is_success": True} if terminated and self.good else {}

    def reset(self, *, seed=None, options=None):
        first = super().reset(seed=seed, options=options)
        self.end, self.good = 3, self.np_random.random() < 0.8
        return first


class Acted(Toy):
    """Is acted in by two numbers, of which one has bounds, and draws nothing."""

    action_space = gymnasium.spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, np.inf], np.float32))

    def step(self, action):
        return super().step(round(float(action[0])))


class Masked(Toy):
    """Allows other actions at every step and breaks where a forbidden one is taken."""

    action_space = gymnasium.spaces.MultiDiscrete([4, 3])

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], {"action_mask": self.mask()}

    def step(self, action):
        if not self.mask()[[action[0], 4 + action[1]]].all():
            raise ArithmeticError(f"{action} is not allowed at step {self.age}")
        observation, *rest, info = super().step(action[1])
        return observation, *rest, info | {"action_mask": self.mask()}

    def mask(self):
        return np.array([self.age > 0, 1, self.age % 2, 0, 1, self.age % 3 == 0, self.age > 5], dtype=np.int8)


for kind in (Toy, KillTrainerOnce, Random, Often, Acted, Masked):
    gymnasium.register(f"{kind.__name__}-v0", entry_point=kind, max_episode_steps=LONGEST)
for name in FAULTS:
    gymnasium.register(f"{name}-v0", entry_point=Faulty, max_episode_steps=LONGEST, kwargs={"name": name})
