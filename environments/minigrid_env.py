"""The grid worlds of MiniGrid, seen as pictures."""

from typing import Any

import gymnasium
import minigrid  # noqa: F401  (registers its environments)
import numpy as np
from minigrid.minigrid_env import MiniGridEnv

from environments.episode import (
    Info,
    Step,
    WrappedEnv,
    check_picture_size,
    discrete,
    make_registered,
    picture_space,
)
from environments.section import MinigridSection

# Grid worlds show the same few views over and over, and rendering one takes longer than the rest of a step. The
# symbolic view determines its picture, so pictures are kept by (environment, tile size, bytes of the symbolic view),
# the oldest leaving first. 1,000 pictures of 84×84 are 21 MB, shared by all environments of a process.
MAX_KEPT_PICTURES = 1000
_kept_pictures: dict[tuple[str, int, bytes], np.ndarray] = {}


class MinigridEnv(WrappedEnv):
    """A MiniGrid environment whose observation is a picture of the part of the grid in front of the agent.

    Memory tasks default to a view of 3×3 tiles of 28 pixels, the first 3 actions (the turns and forward) and 96 steps;
    all others to 7×7 tiles of 8 pixels, all 7 actions and 64 steps.
    """

    def __init__(self, section: MinigridSection, render_mode: str | None = None):
        """
        Args:
            section: of the config.
            render_mode: "rgb_array", or None if nothing is to be looked at.

        Raises:
            ValueError: if there is no such MiniGrid environment, or if another entry is not allowed.
        """
        super().__init__(render_mode)
        self._name = section.name
        defaults = (3, 28, 3, 96) if "Memory" in self._name else (7, 8, 7, 64)
        given = (section.view_size, section.tile_size, section.num_actions, section.max_episode_steps)
        view_size, self._tile_size, num_actions, self.max_episode_steps = (
            default if value is None else value for value, default in zip(given, defaults, strict=True)
        )
        side = view_size * self._tile_size
        check_picture_size(side, side, f"tile_size: {self._tile_size} with view_size: {view_size}")
        self.observation_space = picture_space(3, side, side)

        # Gymnasium's time limit truncates episodes earlier than MiniGrid's own one, `max_steps`, which has to stay as
        # it is: the reward for success, 1 − 0.9·step/max_steps, depends on it.
        self._env = make_registered(
            self._name, agent_view_size=view_size, max_episode_steps=self.max_episode_steps, render_mode=render_mode
        )
        if not isinstance(self._env.unwrapped, MiniGridEnv):
            raise ValueError(f"name: {self._name!r} is not a MiniGrid environment")
        available = int(self._env.action_space.n)
        if (section.num_actions or 0) > available:
            raise ValueError(f"num_actions: {num_actions} is not allowed; expected no more than {available}")
        self.action_space = gymnasium.spaces.Discrete(min(num_actions, available))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Info]:
        """Start an episode.

        Args:
            seed: determines the episode.
            options: passed on to MiniGrid.

        Returns:
            The observation, a read-only picture of shape (3, height, width), and an empty info.
        """
        observation, _ = self._env.reset(seed=seed, options=options)
        self._start_episode()
        return self._observe(observation["image"]), {}

    def step(self, action: np.ndarray | int) -> Step:
        """Take one of MiniGrid's actions.

        Args:
            action: shape (1,), or an int.

        Returns:
            Observation (a read-only picture of shape (3, height, width)), reward, terminated, truncated and info.
        """
        observation, reward, terminated, truncated, _ = self._env.step(discrete(action))
        reward = float(reward)
        info = self._count_step(reward, terminated or truncated, {"success": float(reward > 0)})
        return self._observe(observation["image"]), reward, bool(terminated), bool(truncated), info

    def _observe(self, symbols: np.ndarray) -> np.ndarray:
        key = (self._name, self._tile_size, symbols.tobytes())
        if key not in _kept_pictures:
            if len(_kept_pictures) >= MAX_KEPT_PICTURES:
                del _kept_pictures[next(iter(_kept_pictures))]
            picture = self._env.unwrapped.get_frame(tile_size=self._tile_size, agent_pov=True)
            picture = np.array(picture, dtype=np.uint8, order="C")
            # Everyone who sees this view gets the same array.
            picture.setflags(write=False)
            _kept_pictures[key] = picture.transpose(2, 0, 1)
        self._observation = _kept_pictures[key]
        return self._observation
