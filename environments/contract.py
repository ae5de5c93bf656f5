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
OLD_API = (
    "that is the API of gym, which Gymnasium has replaced: https://gymnasium.farama.org/introduction/migration_guide"
)


class BrokenContract(ValueError):
    """What an environment returned breaks the Gymnasium API or the spaces that it declares; one line says how."""


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


def shorten(value: Any, length: int = 60) -> str:
    """Return a value, or an error with its kind, on one short line."""
    text = " ".join((f"{type(value).__name__}: {value}" if isinstance(value, Exception) else repr(value)).split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def try_out(env: Any, seed: int = 0) -> tuple[Task, list[str]]:
    """Play one step of an environment; return what it is like, and what its user should know.

    Args:
        env: has just been made.
        seed: of the episode, one that training may draw: some environments have few.

    Raises:
        BrokenContract: if it breaks the contract, naming how.
    """
    name = type(env).__name__
    try:
        task = declared_task(env)
        observation, info = reset_result(name, env.reset(seed=seed))
        check_observation(env, observation, task)
        mask = info.get("action_mask")
        action = np.zeros(task.continuous, np.float32) if task.continuous else first_allowed(task, mask)
        *_, info = checked_step(env, action, replace(task, masked=True))
        task = replace(task, masked=mask is not None or info.get("action_mask") is not None)
        return task, [f"environment: {notice}" for notice in getattr(env, "notices", list)()]
    except BrokenContract:
        raise
    except Exception as error:  # whatever an environment does
        where = traceback.extract_tb(error.__traceback__)[-1]
        is_old = any(words in str(error) for words in ("unexpected keyword argument 'seed'", "values to unpack"))
        hint = f"; {OLD_API}" if is_old else ""
        raise BrokenContract(
            f"{name}: fails at its first step ({where.filename}:{where.lineno}): {shorten(error, 500)}{hint}"
        ) from error


def declared_task(env: Any) -> Task:
    """Return the task that an environment's spaces declare; BrokenContract if they are not those of the contract."""
    name, space, actions = type(env).__name__, env.observation_space, env.action_space
    limit = getattr(env, "max_episode_steps", "missing")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise BrokenContract(f"{name}: max_episode_steps is {limit}, should be a whole number above 0, None if endless")
    parts = dict(space.spaces) if hasattr(space, "spaces") else {"frame" if len(space.shape) == 3 else "vector": space}
    kinds = {key: (len(part.shape), part.dtype) for key, part in parts.items()}
    frame, vector = parts.get("frame"), parts.get("vector")
    allowed = {("frame", (3, np.dtype(np.uint8))), ("vector", (1, np.dtype(np.float32)))}
    if not kinds or kinds.items() - allowed or (frame is not None and min(frame.shape[1:]) < 3):
        raise BrokenContract(
            f"{name}: observation_space is {space}, should be uint8 (C, H, W) of at least 3×3, float32 (n,), or "
            "both in a Dict as frame and vector"
        )
    branches = tuple(np.ravel(getattr(actions, "nvec", getattr(actions, "n", ()))).astype(int).tolist())
    if not branches and len(actions.shape or ()) != 1:
        raise BrokenContract(f"{name}: action_space is {actions}, should be discrete, or float32 (n,)")
    continuous = 0 if branches else actions.shape[0]
    shape, size = None if frame is None else tuple(frame.shape), 0 if vector is None else vector.shape[0]
    check_sizes(shape, size, continuous or sum(branches), f"{name}: ")
    return Task(shape, size, branches, continuous, limit)


def check_sizes(frame: tuple[int, ...] | None = None, vector: int = 0, actions: int = 0, named: str = "") -> None:
    """Raise BrokenContract if a frame (C, H, W), a vector or the actions are too many numbers to be worked with."""
    for count, most, what, way_out in (
        (math.prod(frame or (0,)), MOST_PIXELS, f"frames of {frame}", "ResizeObservation of gymnasium.wrappers helps"),
        (vector, MOST_ENTRIES, "a vector", "leave parts out, or show numbers instead of one choice out of many"),
        (actions, MOST_ENTRIES, "actions", "several smaller branches (MultiDiscrete) or numbers (Box) help"),
    ):
        if count > most:
            raise BrokenContract(f"{named}{what} of {count:,} values, more than {most:,}: {way_out}")


def first_allowed(task: Task, mask: np.ndarray | None) -> np.ndarray:
    """Return the first allowed action (branches,); all are where the mask (sum of branches,) is None."""
    if mask is None:
        return np.zeros(len(task.branches), dtype=np.int64)
    return np.array([part.argmax() for part in np.split(mask, np.cumsum(task.branches)[:-1])], dtype=np.int64)


def check_observation(env: object, observation: Any, task: Task) -> None:
    """Raise BrokenContract if an observation is not what the environment declares."""
    both = task.frame is not None and task.vector and isinstance(observation, dict)
    parts = observation if both else {"frame" if task.frame else "vector": observation}
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


def checked_step(env: Any, action: np.ndarray, task: Task) -> tuple[Any, float, bool, bool, Mapping]:
    """Step an environment and return what it returned; BrokenContract if that breaks the Gymnasium API."""
    name = type(env).__name__
    observation, reward, terminated, truncated, info = step_result(name, env.step(action))
    check_observation(env, observation, task)
    if not math.isfinite(reward):
        raise BrokenContract(f"{name}: reward is not finite: {reward}")
    if info.get("action_mask") is not None and not task.masked:
        raise BrokenContract(f"{name}: gives an action_mask, but gave none with its first observations")
    return observation, reward, terminated, truncated, info


def reset_result(name: str, result: Any) -> tuple[Any, Mapping]:
    """Return observation and info of what a reset returned; BrokenContract if they are not there."""
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1] or {}, Mapping):
        raise BrokenContract(
            f"{name}: reset returned {shorten(result)}, should be a tuple of observation and info: {OLD_API}"
        )
    return result[0], result[1] or {}


def step_result(name: str, result: Any) -> tuple[Any, float, bool, bool, Mapping]:
    """Return what a step returned as observation, float, bool, bool and mapping; BrokenContract if it is not that."""
    if not isinstance(result, tuple) or len(result) != 5:
        raise BrokenContract(
            f"{name}: step returned {len(result) if isinstance(result, tuple) else type(result).__name__} values, "
            f"should be 5: observation, reward, terminated, truncated, info: {OLD_API}"
        )
    observation, reward, terminated, truncated, info = result
    for flag, value in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(value, bool) and (np.shape(value) != () or np.asarray(value).dtype != bool):
            raise BrokenContract(f"{name}: {flag} is {shorten(value)}, should be True or False")
    try:
        number = float(reward.item() if hasattr(reward, "item") else reward + 0.0)
    except (TypeError, ValueError, RuntimeError):
        raise BrokenContract(f"{name}: reward is {shorten(reward)}, should be a number") from None
    if not isinstance(info or {}, Mapping):
        raise BrokenContract(f"{name}: the info is {shorten(info)}, should be a dict")
    return observation, number, bool(terminated), bool(truncated), info or {}
