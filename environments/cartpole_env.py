"""CartPole, with or without its velocities."""

from typing import Any

import numpy as np

from environments.episode import Info, Step, WrappedEnv, discrete
from environments.registered import make_registered
from environments.section import CartPoleSection

CART_AND_POLE_VELOCITY = [1, 3]


class CartPole(WrappedEnv):
    """CartPole; `CartPoleMasked` hides the velocities, so that they have to be inferred from memory.

    A step's reward is 1/100, the return in the info is not divided: one for each step.
    """

    reward_scale = 0.01

    def __init__(self, section: CartPoleSection, render_mode: str | None = None):
        """
        Args:
            section: of the config.
            render_mode: "rgb_array", or None if nothing is to be looked at.
        """
        super().__init__(render_mode)
        self.vector_names = ("cart position", "cart velocity", "pole angle", "pole velocity")
        self._is_masked = section.type == "CartPoleMasked"
        self.max_episode_steps = section.max_episode_steps
        # The task of CartPole-v0, which Gymnasium calls deprecated, but for the number of steps
        self._env = make_registered("CartPole-v1", max_episode_steps=self.max_episode_steps, render_mode=render_mode)
        self.observation_space = self._env.observation_space
        self.action_space = self._env.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Info]:
        """Start an episode.

        Args:
            seed: determines the episode.
            options: passed on to Gymnasium's CartPole.

        Returns:
            The observation, shape (4,), and an empty info.
        """
        observation, _ = self._env.reset(seed=seed, options=options)
        self._start_episode()
        return self._observe(observation), {}

    def step(self, action: np.ndarray | int) -> Step:
        """Pushes the cart to the left (0) or to the right (1).

        Args:
            action: shape (1,), or an int.

        Returns:
            Observation of shape (4,), reward, terminated, truncated and info.
        """
        observation, reward, terminated, truncated, _ = self._env.step(discrete(action))
        info = self._count_step(float(reward), terminated or truncated, {})
        return self._observe(observation), float(reward) * self.reward_scale, bool(terminated), bool(truncated), info

    def _observe(self, observation: np.ndarray) -> np.ndarray:
        self._observation = np.array(observation, dtype=np.float32)
        if self._is_masked:
            self._observation[CART_AND_POLE_VELOCITY] = 0.0
        return self._observation
