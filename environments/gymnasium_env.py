"""Any registered environment with vectors or pictures as observations and discrete actions."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from environments.episode import (
    SMALLEST_PICTURE,
    Info,
    Step,
    WrappedEnv,
    discrete,
    make_registered,
    picture_space,
    task_numbers,
)
from environments.section import GymnasiumSection

PICTURE_CHANNELS = (1, 3, 4)


class GymnasiumEnv(WrappedEnv):
    """A registered Gymnasium environment with the observations, actions and infos that the trainer expects."""

    def __init__(self, section: GymnasiumSection, render_mode: str | None = None):
        """
        Args:
            section: of the config.
            render_mode: "rgb_array", or None if nothing is to be looked at.

        Raises:
            ValueError: if there is no such environment, or if its spaces or another entry are not supported.
        """
        super().__init__(render_mode)
        name = section.name
        self._env = make_registered(name, render_mode=render_mode, max_episode_steps=section.max_episode_steps)
        if render_mode is not None and render_mode not in self._env.metadata.get("render_modes", ()):
            raise ValueError(f"render_mode: {name!r} cannot render pictures ({render_mode!r})")
        self.max_episode_steps = self._env.spec.max_episode_steps

        observed = self._env.observation_space
        self._channels_last = is_channels_last_picture(observed)
        if self._channels_last:
            height, width, channels = observed.shape
            self.observation_space = picture_space(channels, height, width)
        elif is_channels_first_picture(observed):
            self.observation_space = picture_space(*observed.shape)
        elif isinstance(observed, spaces.Box) and len(observed.shape) == 1:
            self.observation_space = spaces.Box(-np.inf, np.inf, observed.shape, np.float32)
        else:
            raise ValueError(
                f"name: {name!r} has the observation space {one_line_space(observed)}; supported are vectors and uint8 "
                f"pictures of at least {SMALLEST_PICTURE}×{SMALLEST_PICTURE} with {PICTURE_CHANNELS} channels"
            )

        acted = self._env.action_space
        if isinstance(acted, spaces.Discrete):
            self.action_space = spaces.Discrete(int(acted.n))
        elif isinstance(acted, spaces.MultiDiscrete) and acted.nvec.ndim == 1:
            self.action_space = spaces.MultiDiscrete(acted.nvec)
        else:
            raise ValueError(
                f"name: {name!r} has the action space {one_line_space(acted)}; supported are Discrete and MultiDiscrete"
            )
        # Actions count from 0 here; the environment's own may count from elsewhere.
        self._first_action = getattr(acted, "start", 0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Info]:
        """Start an episode.

        Args:
            seed: determines the episode.
            options: passed on to the environment.

        Returns:
            The observation, shape (n,) or (channels, height, width), and an empty info.
        """
        observation, _ = self._env.reset(seed=seed, options=options)
        self._start_episode()
        return self._observe(observation), {}

    def step(self, action: np.ndarray | int) -> Step:
        """Take an action.

        Args:
            action: shape (branches,), or an int where there is only one branch.

        Returns:
            Observation of shape (n,) or (channels, height, width), reward, terminated, truncated and info.
        """
        if isinstance(self.action_space, spaces.Discrete):
            action = discrete(action) + int(self._first_action)
        else:
            action = np.array(action, dtype=self.action_space.dtype) + self._first_action
        observation, reward, terminated, truncated, own_info = self._env.step(action)
        terminated, truncated = bool(terminated), bool(truncated)
        numbers = task_numbers(own_info) if terminated or truncated else {}
        if "is_success" in numbers:
            numbers["success"] = numbers.pop("is_success")
        info = self._count_step(float(reward), terminated or truncated, numbers)
        return self._observe(observation), float(reward), terminated, truncated, info

    def _observe(self, observation: np.ndarray) -> np.ndarray:
        # Always a copy: environments may write their next observation into the same array.
        if self.observation_space.dtype == np.float32:
            self._observation = np.array(observation, dtype=np.float32)
        else:
            picture = observation if self._channels_last else observation.transpose(1, 2, 0)
            self._observation = np.array(picture, order="C").transpose(2, 0, 1)
        return self._observation


def is_channels_last_picture(space: gymnasium.Space) -> bool:
    """Tells whether a space holds uint8 pictures of shape (height, width, channels) that are large enough."""
    return is_picture(space) and space.shape[2] in PICTURE_CHANNELS and min(space.shape[:2]) >= SMALLEST_PICTURE


def is_channels_first_picture(space: gymnasium.Space) -> bool:
    """Tells whether a space holds uint8 pictures of shape (channels, height, width) that are large enough."""
    return is_picture(space) and space.shape[0] in PICTURE_CHANNELS and min(space.shape[1:]) >= SMALLEST_PICTURE


def is_picture(space: gymnasium.Space) -> bool:
    """Tells whether a space holds uint8 arrays of three dimensions."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8


def one_line_space(space: gymnasium.Space) -> str:
    """Return the description of a space in one line."""
    return " ".join(str(space).split())
