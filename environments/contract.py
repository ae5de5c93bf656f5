"""What an environment has to be for a model to play it, and whether it is: spaces, observations, steps."""

import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# The largest observations and actions. A vector's entry or an action costs a row of weights; a frame of 2²⁰ values is
# one of 590×590 in colour.
MOST_ENTRIES, MOST_PIXELS = 2**16, 2**20
# What Python says of environments that were written for gym.
OLD_SIGNS = ("reset() got an unexpected keyword argument", "values to unpack")
OLD_API = (
    "that is the API of gym, which Gymnasium has replaced: https://gymnasium.farama.org/introduction/migration_guide"
)


class BrokenContract(ValueError):
    """An environment cannot be played, or has shown something else than it declares; one line says how."""


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

    @property
    def shown(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of what an observation consists of."""
        frame = {} if self.frame is None else {"frame": (self.frame, np.dtype(np.uint8))}
        return frame | ({"vector": ((self.vector,), np.dtype(np.float32))} if self.vector else {})


def failure_of(error: BaseException) -> str:
    """Return what went wrong in an environment on one line; where, too, unless the line is meant for its user."""
    if isinstance(error, BrokenContract):
        return str(error)
    where, text = traceback.extract_tb(error.__traceback__)[-1], " ".join(str(error).split())[:500]
    hint = f"; {OLD_API}" if any(sign in text for sign in OLD_SIGNS) else ""
    return f"{type(error).__name__}: {text} ({where.filename}:{where.lineno}){hint}"


def try_out(env: Any, seed: int = 0) -> tuple[Task, list[str]]:
    """Play one step of an environment; return what it is like, and what its user should know.

    Args:
        env: has just been made.
        seed: of the episode, one that training may draw: some environments have few.

    Raises:
        BrokenContract: if it breaks the contract, naming how.
    """
    task = declared_task(env)
    observation, info = env.reset(seed=seed)
    check_observation(env, observation, task)
    mask = info.get("action_mask")
    action = np.zeros(task.continuous, np.float32) if task.continuous else first_allowed(task, mask)
    later = checked_step(env, action, replace(task, masked=True))[-1].get("action_mask")
    notices = [f"environment: {notice}" for notice in getattr(env, "notices", list)()]
    return replace(task, masked=mask is not None or later is not None), notices


def declared_task(env: Any) -> Task:
    """Return the task that an environment's spaces declare; BrokenContract if they are not those of the contract."""
    name, space, actions, limit = type(env).__name__, env.observation_space, env.action_space, env.max_episode_steps
    if limit is not None and limit < 1:
        raise BrokenContract(f"{name}: max_episode_steps is {limit}, should be above 0, None if endless")
    parts = dict(space.spaces) if hasattr(space, "spaces") else {"frame" if len(space.shape) == 3 else "vector": space}
    branches = tuple(np.ravel(getattr(actions, "nvec", getattr(actions, "n", ()))).astype(int).tolist())
    continuous = 0 if branches else math.prod(actions.shape)
    frame = tuple(parts["frame"].shape) if "frame" in parts else None
    vector = math.prod(parts["vector"].shape) if "vector" in parts else 0
    task = Task(frame, vector, branches, continuous, limit)
    if {key: (part.shape, part.dtype) for key, part in parts.items()} != task.shown:
        raise BrokenContract(
            f"{name}: observation_space is {space}, should be uint8 (C, H, W), float32 (n,), or both in a Dict as "
            "frame and vector"
        )
    check_sizes(frame, vector, continuous or sum(branches))
    return task


def check_sizes(frame: tuple[int, ...] | None = None, vector: int = 0, actions: int = 0) -> None:
    """Raise BrokenContract if a frame (C, H, W), a vector or the actions are too many numbers to be worked with."""
    for count, most, what, way_out in (
        (math.prod(frame or (0,)), MOST_PIXELS, f"frames of {frame}", "ResizeObservation of gymnasium.wrappers helps"),
        (vector, MOST_ENTRIES, "a vector", "leave parts out, or show numbers instead of one choice out of many"),
        (actions, MOST_ENTRIES, "actions", "several smaller branches (MultiDiscrete) or numbers (Box) help"),
    ):
        if count > most:
            raise BrokenContract(f"{what} of {count:,} values, more than {most:,}: {way_out}")


def first_allowed(task: Task, mask: np.ndarray | None) -> np.ndarray:
    """Return the first allowed action (branches,); all are where the mask (sum of branches,) is None."""
    if mask is None:
        return np.zeros(len(task.branches), dtype=np.int64)
    return np.array([part.argmax() for part in np.split(mask, np.cumsum(task.branches)[:-1])], dtype=np.int64)


def check_observation(env: object, observation: Any, task: Task) -> None:
    """Raise BrokenContract if an observation is not what the environment declares."""
    parts = observation if isinstance(observation, dict) else {"vector" if task.frame is None else "frame": observation}
    found, name = {key: (part.shape, part.dtype) for key, part in parts.items()}, type(env).__name__
    if found != task.shown:
        raise BrokenContract(f"{name}: observation is {found}, declared is {task.shown}")
    if task.vector and not np.isfinite(parts["vector"]).all():
        raise BrokenContract(f"{name}: observation is not finite: {parts['vector']}")


def checked_step(env: Any, action: np.ndarray, task: Task) -> tuple[Any, float, bool, bool, Mapping]:
    """Step an environment and return what it returned; BrokenContract if that cannot be learned from."""
    observation, reward, terminated, truncated, info = env.step(action)
    check_observation(env, observation, task)
    if not math.isfinite(reward):
        raise BrokenContract(f"{type(env).__name__}: reward is not finite: {reward}")
    if info.get("action_mask") is not None and not task.masked:
        raise BrokenContract(f"{type(env).__name__}: gives an action_mask, but gave none with its first observations")
    return observation, float(reward), bool(terminated), bool(truncated), info
