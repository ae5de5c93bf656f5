"""What all environments share: counting an episode and rendering on request."""

import difflib
from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np

from environments.numbers import task_numbers as task_numbers
from environments.spaces import SMALLEST_PICTURE, as_picture, frame_picture

Info = dict[str, Any]
# A frame or a vector, an array; both are a dict of two arrays, "frame" and "vector"
Observation = Any
# Observation, reward, terminated, truncated, info
Step = tuple[Observation, float, bool, bool, Info]


class EpisodeEnv(gymnasium.Env):
    """Base of all environments: counts reward and length of the episode and guards the rendering.

    Attributes:
        max_episode_steps: the longest episode, None where episodes have no limit.
        vector_names: what each entry of the observed vector is; empty where the environment does not say.
        action_bounds: lowest and highest (n,) of what an action of n numbers is clipped to; None for other actions.
        reward_scale: what the task's own rewards are multiplied by before they are learned from.
    """

    metadata = {"render_modes": ["rgb_array"]}
    max_episode_steps: int | None
    vector_names: tuple[str, ...] = ()
    action_bounds: tuple[np.ndarray, np.ndarray] | None = None
    reward_scale: float = 1.0

    def __init__(self, render_mode: str | None = None):
        """
        Args:
            render_mode: "rgb_array", or None if nothing is to be looked at.

        Raises:
            ValueError: if the render mode is another one.
        """
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode: {render_mode!r} is not known; allowed: None, 'rgb_array'")
        self.render_mode = render_mode
        self._observation: Observation | None = None
        self._start_episode()

    def _start_episode(self) -> None:
        """Set the counters of the episode back; belongs into every reset."""
        self._episode_reward = 0.0
        self._episode_length = 0

    def numbers_so_far(self) -> dict[str, float]:
        """Return reward, in the environment's own unit, and length of the running episode."""
        return {"reward": self._episode_reward, "length": self._episode_length}

    def _count_step(self, reward: float, ended: bool, numbers: dict[str, float]) -> Info:
        """Count one step and return its info, which is empty unless the episode has ended.

        Args:
            reward: the step's reward, in the environment's own unit.
            ended: whether this was the episode's last step.
            numbers: the task's own results, such as the success.
        """
        self._episode_reward += reward
        self._episode_length += 1
        if not ended:
            return {}
        return {**numbers, **self.numbers_so_far()}

    def render(self) -> np.ndarray:
        """Return the global view of the current state as a picture.

        Returns:
            Picture of shape (height, width, 3), uint8.

        Raises:
            RuntimeError: if the environment was made without a render mode or has not been reset yet.
        """
        self._check_rendering()
        return self._draw()

    def agent_view(self) -> np.ndarray | None:
        """Return the frame that the agent sees as a picture, None where it sees numbers only.

        Returns:
            Picture of shape (height, width, 3), uint8, or None.

        Raises:
            RuntimeError: if the environment was made without a render mode or has not been reset yet.
        """
        self._check_rendering()
        frame = self._observation["frame"] if isinstance(self._observation, dict) else self._observation
        return frame_picture(frame) if frame.ndim == 3 else None

    def notices(self) -> list[str]:
        """Return what someone who trains on this environment had better know, a line each."""
        return []

    def _check_rendering(self) -> None:
        if self.render_mode is None:
            raise RuntimeError("there is nothing to look at: the environment was made without render_mode='rgb_array'")
        if self._observation is None:
            raise RuntimeError("there is nothing to look at before the first reset")

    def _draw(self) -> np.ndarray:
        raise NotImplementedError


class WrappedEnv(EpisodeEnv):
    """Base of the environments that pass their calls on to an environment made by Gymnasium, `self._env`."""

    _env: gymnasium.Env | None = None

    def _draw(self) -> np.ndarray:
        return as_picture(self._env.render(), self._env.spec.id)

    def close(self) -> None:
        """Close the environment; closing it again does nothing."""
        environment, self._env = self._env, None
        if environment is not None:
            environment.close()


def check_picture_size(height: int, width: int, named: str) -> None:
    """Raise a ValueError if pictures are too small for the encoder.

    Args:
        height: rows of the picture.
        width: columns of the picture.
        named: what the size comes from, the beginning of the message.
    """
    if min(height, width) < SMALLEST_PICTURE:
        smallest = f"{SMALLEST_PICTURE}×{SMALLEST_PICTURE}"
        raise ValueError(f"{named}: pictures of {height}×{width} are too small; expected at least {smallest}")


def picture_space(channels: int, height: int, width: int) -> gymnasium.spaces.Box:
    """Return the space of uint8 pictures of shape (channels, height, width)."""
    return gymnasium.spaces.Box(0, 255, (channels, height, width), np.uint8)


def discrete(action: Any) -> int:
    """Return a single action as an int, whether it comes as an int or as an array of shape (1,)."""
    return int(np.asarray(action).item())


def suggest(name: Any, known: Iterable[str]) -> str:
    """Return the end of an error message: the known names that are nearest to the given one.

    Args:
        name: the name that is not known.
        known: the names that are.
    """
    return "; the nearest: " + ", ".join(difflib.get_close_matches(str(name), known, n=3, cutoff=0.0))


def one_line(error: Exception) -> str:
    """Return kind and message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
