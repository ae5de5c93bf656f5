"""What an environment has to be for a model to play it, and whether it is: spaces, observations, steps."""

import math
import traceback
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from environments import BrokenContract


@dataclass(frozen=True)
class Task:
    """What a model needs to know of an environment.

    Attributes:
        frame: (C, H, W) of the uint8 frames that it shows, None without.
        vector: number of float32 entries of the vectors that it shows, 0 without.
        branches: number of actions of each discrete action branch; empty where actions are continuous.
        continuous: number of entries of a continuous action, 0 where actions are discrete.
        max_episode_steps: longest episode, None if endless.
        masked: whether it says which actions are allowed.
    """

    frame: tuple[int, ...] | None
    vector: int
    branches: tuple[int, ...]
    continuous: int
    max_episode_steps: int | None
    masked: bool = False

    @property
    def action_size(self) -> int:
        """Entries of an action: a choice per branch, or real numbers."""
        return len(self.branches) or self.continuous


def try_out(env: Any) -> tuple[Task, list[str]]:
    """Play one step of an environment; return what it is like, and what its user should know.

    Raises:
        BrokenContract: if it breaks the contract, naming how.
    """
    name = type(env).__name__
    try:
        task = declared_task(env)
        first = env.reset(seed=0)
        if not isinstance(first, tuple) or len(first) != 2:
            raise BrokenContract(f"{name}: reset returned {type(first).__name__}, should be a tuple: observation, info")
        check_observation(env, first[0], task)
        mask = (first[1] or {}).get("action_mask")
        action = np.zeros(task.continuous, np.float32) if task.continuous else first_allowed(task, mask)
        *_, info = checked_step(env, action, replace(task, masked=True))
        task = replace(task, masked=mask is not None or info.get("action_mask") is not None)
        return task, [f"environment: {notice}" for notice in getattr(env, "notices", list)()]
    except BrokenContract:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise BrokenContract(f"{name}: fails at its first step ({where.filename}:{where.lineno}): {what}") from error


def declared_task(env: Any) -> Task:
    """Return the task that an environment's spaces declare; BrokenContract if they are not those of the contract."""
    name, space, actions = type(env).__name__, env.observation_space, env.action_space
    limit = getattr(env, "max_episode_steps", "missing")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise BrokenContract(f"{name}: max_episode_steps is {limit}, should be a whole number above 0, None if endless")
    parts = dict(space.spaces) if hasattr(space, "spaces") else {"frame" if len(space.shape) == 3 else "vector": space}
    frame, vector = parts.get("frame"), parts.get("vector")
    fine = parts.keys() <= {"frame", "vector"} and bool(parts)
    if frame is not None:
        fine &= len(frame.shape) == 3 and frame.dtype == np.uint8 and min(frame.shape[1:]) >= 3
    if vector is not None:
        fine &= len(vector.shape) == 1 and vector.dtype == np.float32
    if not fine:
        raise BrokenContract(
            f"{name}: observation_space is {space}, should be uint8 (C, H, W) of at least 3×3, float32 (n,), or "
            "both in a Dict as frame and vector"
        )
    discrete = hasattr(actions, "n") or hasattr(actions, "nvec")
    if not discrete and len(actions.shape or ()) != 1:
        raise BrokenContract(f"{name}: action_space is {actions}, should be discrete, or float32 (n,)")
    continuous = 0 if discrete else actions.shape[0]
    branches = () if continuous else tuple(np.ravel(getattr(actions, "nvec", getattr(actions, "n", None))).tolist())
    shape = None if frame is None else tuple(frame.shape)
    return Task(shape, 0 if vector is None else vector.shape[0], branches, continuous, limit)


def first_allowed(task: Task, mask: np.ndarray | None) -> np.ndarray:
    """Return the first allowed action (branches,); all are where the mask (sum of branches,) is None."""
    if mask is None:
        return np.zeros(len(task.branches), dtype=np.int64)
    return np.array([part.argmax() for part in np.split(mask, np.cumsum(task.branches)[:-1])], dtype=np.int64)


def check_observation(env: object, observation: Any, task: Task) -> None:
    """Raise BrokenContract if an observation is not what the environment declares."""
    both = task.frame is not None and task.vector
    parts = (
        observation if both and isinstance(observation, dict) else {"frame" if task.frame else "vector": observation}
    )
    for name, shape, dtype in (("frame", task.frame, np.uint8), ("vector", (task.vector,), np.float32)):
        if shape is None or shape == (0,):
            continue
        part = parts.get(name)
        found, kind = getattr(part, "shape", None), getattr(part, "dtype", type(part).__name__)
        if found != shape or kind != dtype:
            raise BrokenContract(
                f"{type(env).__name__}: observation is {found} {kind}, declared are {shape} {np.dtype(dtype)}"
            )
        if name == "vector" and not np.isfinite(part).all():
            raise BrokenContract(f"{type(env).__name__}: observation is not finite: {part}")


def checked_step(env: Any, action: np.ndarray, task: Task) -> tuple[Any, float, bool, bool, dict]:
    """Step an environment and return what it returned; BrokenContract if that breaks the Gymnasium API."""
    result = env.step(action)
    name = type(env).__name__
    if not isinstance(result, tuple) or len(result) != 5:
        size = len(result) if isinstance(result, tuple) else type(result).__name__
        raise BrokenContract(
            f"{name}: step returned {size} values, should be 5: observation, reward, terminated, truncated, info"
        )
    observation, reward, terminated, truncated, info = result
    check_observation(env, observation, task)
    size = np.size(reward) if isinstance(reward, (int, float, np.number, np.ndarray)) else 0
    if size != 1 or np.asarray(reward).dtype.kind not in "biuf":
        raise BrokenContract(f"{name}: reward is {type(reward).__name__}, should be a number")
    reward = float(np.asarray(reward).item())
    if not math.isfinite(reward):
        raise BrokenContract(f"{name}: reward is not finite: {reward}")
    info = info or {}
    if info.get("action_mask") is not None and not task.masked:
        raise BrokenContract(f"{name}: gives an action_mask, but gave none with its first observations")
    return observation, reward, bool(terminated), bool(truncated), info
