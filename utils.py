"""What every other module needs and nothing of learning: errors, environments by name, seeds, schedules."""

import math
import traceback
from dataclasses import dataclass
from numbers import Real

import numpy as np

import kernels.allocator  # noqa: F401  (sets what PyTorch reads when it is loaded)
from environments import MEMORY_GYM_TYPES

ENVIRONMENT_TYPES = ("PocMemoryEnv", "CartPole", "CartPoleMasked", "Minigrid", *MEMORY_GYM_TYPES, "Gymnasium")


class UserError(Exception):
    """Something that the user can put right; command lines print it without a traceback and exit with code 2."""


def create_env(environment: dict, render_mode: str | None = None):
    """Create one environment; this is the one place to add a type.

    Args:
        environment: the `environment` section of a config.
        render_mode: "rgb_array" to be able to call `render`, else None.

    Returns:
        An environment that speaks the Gymnasium API and has `max_episode_steps` (None if endless).

    Raises:
        UserError: if the section names something that does not exist or cannot be played.
    """
    kind = environment["type"]
    try:
        if kind == "PocMemoryEnv":
            from environments.poc_memory_env import PocMemoryEnv

            return PocMemoryEnv(environment, render_mode)
        if kind in ("CartPole", "CartPoleMasked"):
            from environments.cartpole_env import CartPole

            return CartPole(environment, render_mode)
        if kind == "Minigrid":
            from environments.minigrid_env import MinigridEnv

            return MinigridEnv(environment, render_mode)
        if kind in MEMORY_GYM_TYPES:
            from environments.memory_gym_env import MemoryGymEnv

            return MemoryGymEnv(environment, render_mode)
        if kind == "Gymnasium":
            from environments.gymnasium_env import GymnasiumEnv

            return GymnasiumEnv(environment, render_mode)
    except ValueError as error:
        raise UserError(f"environment: {error}") from error
    except ModuleNotFoundError as error:
        how = "pip install --no-deps memory-gym==1.0.2" if error.name == "memory_gym" else f"pip install {error.name}"
        raise UserError(f"environment.type: {kind!r} needs a package that is not installed: {how}") from error
    raise UserError(f"environment.type: {kind!r} should be one of {', '.join(ENVIRONMENT_TYPES)}")


@dataclass(frozen=True)
class Task:
    """What a model needs to know of an environment.

    Attributes:
        observation_shape: (C, H, W) of uint8 frames or (n,) of float32 vectors.
        branches: number of actions of each action branch.
        max_episode_steps: longest episode, None if endless.
    """

    observation_shape: tuple[int, ...]
    branches: tuple[int, ...]
    max_episode_steps: int | None

    @property
    def visual(self) -> bool:
        """Whether observations are frames."""
        return len(self.observation_shape) == 3


def inspect_environment(environment: dict) -> Task:
    """Create an environment, play one step of it and return what it is like.

    Raises:
        UserError: if it cannot be created or breaks the contract, naming how.
    """
    env = create_env(environment)
    name = type(env).__name__
    try:
        space, actions = env.observation_space, env.action_space
        limit = getattr(env, "max_episode_steps", "missing")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise UserError(f"{name}: max_episode_steps is {limit}, should be a whole number above 0, None if endless")
        frames = len(space.shape) == 3 and space.dtype == np.uint8 and min(space.shape[1:]) >= 36
        if not frames and not (len(space.shape) == 1 and space.dtype == np.float32):
            raise UserError(
                f"{name}: observation_space is {space}, should be uint8 (C, H, W) of at least 36×36 or float32 (n,)"
            )
        branches = actions.nvec.tolist() if hasattr(actions, "nvec") else [int(actions.n)]
        task = Task(tuple(space.shape), tuple(branches), limit)
        first = env.reset(seed=0)
        if not isinstance(first, tuple) or len(first) != 2:
            raise UserError(f"{name}: reset returned {type(first).__name__}, should be a tuple: observation, info")
        check_observation(env, first[0], task)
        checked_step(env, np.zeros(len(branches), dtype=np.int64), task)
        return task
    except UserError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{name}: fails at its first step ({where.filename}:{where.lineno}): {what}") from error
    finally:
        env.close()


def check_observation(env: object, observation: np.ndarray, task: Task) -> None:
    """Raise UserError if an observation is not what the environment declares."""
    dtype = np.uint8 if task.visual else np.float32
    shape, found = getattr(observation, "shape", None), getattr(observation, "dtype", type(observation).__name__)
    if shape != task.observation_shape or found != dtype:
        raise UserError(
            f"{type(env).__name__}: observation is {shape} {found}, declared are {task.observation_shape} "
            f"{np.dtype(dtype)}"
        )
    if not task.visual and not np.isfinite(observation).all():
        raise UserError(f"{type(env).__name__}: observation is not finite: {observation}")


def checked_step(env: object, action: np.ndarray, task: Task) -> tuple:
    """Step an environment and return what it returned; UserError if that breaks the Gymnasium API."""
    result = env.step(action)
    if not isinstance(result, tuple) or len(result) != 5:
        size = len(result) if isinstance(result, tuple) else type(result).__name__
        raise UserError(
            f"{type(env).__name__}: step returned {size} values, should be 5: observation, reward, terminated, "
            "truncated, info"
        )
    check_observation(env, result[0], task)
    if not isinstance(result[1], Real):
        raise UserError(f"{type(env).__name__}: reward is {type(result[1]).__name__}, should be a number")
    if not math.isfinite(result[1]):
        raise UserError(f"{type(env).__name__}: reward is not finite: {result[1]}")
    return result


def seed_range(environment: dict) -> tuple[int, int]:
    """Return the first and the number of the episode seeds that training draws from, by default 0 and 100,000."""
    parameters = environment["reset_params"]
    return parameters.get("start-seed", 0), parameters.get("num-seeds", 100_000)


def training_seed(seed: int, environment: dict, index: int, episode: int) -> int:
    """Return the reset seed of an episode, which depends on nothing but the run's seed, environment and number."""
    start, count = seed_range(environment)
    return start + int(np.random.SeedSequence((seed, index, episode)).generate_state(1)[0]) % count


def reason_of(error: Exception) -> str:
    """Return what an error says on one short line, or what it is called where it says nothing."""
    return " ".join(str(error).split())[:100] or type(error).__name__


def polynomial_decay(schedule: dict, update: int) -> float:
    """Return the value of a schedule at an update.

    Args:
        schedule: `initial`, `final`, `power` and `max_decay_steps` of a config.
        update: number of finished updates.
    """
    if update >= schedule["max_decay_steps"]:
        return schedule["final"]
    remaining = (1 - update / schedule["max_decay_steps"]) ** schedule["power"]
    return (schedule["initial"] - schedule["final"]) * remaining + schedule["final"]
