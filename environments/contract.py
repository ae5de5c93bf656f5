"""What a model needs to know of an environment, and how one that cannot be played is reported."""

import traceback
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gymnasium import Space, spaces


class BrokenContract(ValueError):
    """An environment cannot be played, or has shown something else than it declares; one line says how."""


# What Python says of environments that were written for gym.
OLD_SIGNS = ("reset() got an unexpected keyword argument", "values to unpack")
OLD_API = (
    "that is the API of gym, which Gymnasium has replaced: https://gymnasium.farama.org/introduction/migration_guide"
)


@dataclass(frozen=True)
class Task:
    """What a model needs to know of an environment."""

    frame: tuple[int, ...] | None  # (C, H, W) of the uint8 frames that it shows
    vector: int  # float32 entries of the vectors that it shows, 0 without
    branches: tuple[int, ...]  # actions of each discrete branch; empty where actions are continuous
    continuous: int  # entries of a continuous action, 0 where actions are discrete
    max_episode_steps: int | None  # None if endless
    masked: bool = False  # whether it says which actions are allowed

    @property
    def action_size(self) -> int:
        """Entries of an action: a choice per branch, or real numbers."""
        return len(self.branches) or self.continuous

    @property
    def observation_space(self) -> Space:
        """The space of what the agent sees."""
        parts: dict[str, Space] = {}
        if self.frame is not None:
            parts["frame"] = spaces.Box(0, 255, self.frame, np.uint8)
        if self.vector:
            parts["vector"] = spaces.Box(-np.inf, np.inf, (self.vector,), np.float32)
        return spaces.Dict(parts) if len(parts) == 2 else next(iter(parts.values()))

    @property
    def action_space(self) -> Space:
        """The space of the agent's actions."""
        if self.continuous:
            return spaces.Box(-np.inf, np.inf, (self.continuous,), np.float32)
        single = len(self.branches) == 1
        return spaces.Discrete(self.branches[0]) if single else spaces.MultiDiscrete(list(self.branches))


def failure_of(error: BaseException) -> str:
    """Return what went wrong in an environment on one line; where, too, unless the line is meant for its user."""
    if isinstance(error, BrokenContract):
        return str(error)
    where, text = traceback.extract_tb(error.__traceback__)[-1], " ".join(str(error).split())[:500]
    hint = f"; {OLD_API}" if any(sign in text for sign in OLD_SIGNS) else ""
    return f"{type(error).__name__}: {text} ({where.filename}:{where.lineno}){hint}"


def try_out(env: Any, seed: int = 0) -> Task:
    """Play one step of a `GymnasiumEnv` to see whether its actions are masked; return its task.

    The seed has to be one that training may draw: some environments have few.
    """
    task, mask = env.task, env.reset(seed=seed)[1].get("action_mask")
    if task.continuous:
        action = np.zeros(task.continuous, np.float32)
    else:  # the first that is allowed of each branch
        allowed = np.split(np.ones(sum(task.branches)) if mask is None else mask, np.cumsum(task.branches)[:-1])
        action = np.array([branch.argmax() for branch in allowed])
    later = env.step(action)[-1].get("action_mask")
    return replace(task, masked=mask is not None or later is not None)
