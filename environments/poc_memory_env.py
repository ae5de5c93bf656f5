"""The proof of concept of a memory: a corridor whose good end is shown only at first."""

from typing import Any

import gymnasium
import numpy as np

from environments.episode import EpisodeEnv, Info, Step, discrete
from environments.section import PocMemorySection

# Positions are whole numbers of fifths, which do not drift as sums of 0.2 would.
FIFTHS = 5
START_POSITIONS = (-2, -1, 0, 1, 2)
SHOWN_STEPS = 2
MAX_EPISODE_STEPS = 32
STEP_COST = 0.1
END_REWARD = 1.0 + 6 * STEP_COST

# The picture
HEIGHT, WIDTH = 300, 600
CELL_WIDTH = 50
GOAL_HALF_WIDTH = 28
AGENT_RADIUS = 18
WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (160, 160, 160)
GREEN, RED, BLUE = (40, 160, 70), (200, 50, 50), (40, 90, 200)


class PocMemoryEnv(EpisodeEnv):
    """A line from −1 to 1 with a good end and a bad one, which are visible only during the first steps.

    The observation is (left goal, position, right goal), where a goal is 1 if it is good, −1 if it is bad and 0 once
    it is hidden. The agent is frozen while it is shown the goals, so that it has to remember them to arrive.
    """

    max_episode_steps = MAX_EPISODE_STEPS
    vector_names = ("left goal", "position", "right goal")

    def __init__(self, section: PocMemorySection, render_mode: str | None = None):
        """
        Args:
            section: of the config.
            render_mode: "rgb_array", or None if nothing is to be looked at.
        """
        super().__init__(render_mode)
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Info]:
        """Start an episode at a random position with the good end on a random side.

        Args:
            seed: determines the episode.
            options: not used.

        Returns:
            The observation, shape (3,), and an empty info.
        """
        super().reset(seed=seed)
        self._start_episode()
        self._position = int(self.np_random.choice(START_POSITIONS))
        self._good_end = int(self.np_random.choice((-FIFTHS, FIFTHS)))
        return self._observe(goals_visible=True), {}

    def step(self, action: np.ndarray | int) -> Step:
        """Move the agent one step to the left (0) or to the right (1).

        Args:
            action: shape (1,), or an int.

        Returns:
            Observation of shape (3,), reward, terminated, truncated and info.
        """
        frozen = self._episode_length < SHOWN_STEPS
        if not frozen:
            self._position += 1 if discrete(action) == 1 else -1
        terminated = abs(self._position) == FIFTHS
        success = self._position == self._good_end
        reward = 0.0 if frozen else -STEP_COST
        if terminated:
            reward = END_REWARD if success else -END_REWARD
        truncated = not terminated and self._episode_length + 1 == MAX_EPISODE_STEPS
        info = self._count_step(reward, terminated or truncated, {"success": float(success)})
        return self._observe(goals_visible=frozen), reward, terminated, truncated, info

    def _observe(self, goals_visible: bool) -> np.ndarray:
        side = np.sign(self._good_end) if goals_visible else 0
        self._observation = np.array([-side, self._position / FIFTHS, side], dtype=np.float32)
        return self._observation.copy()

    def _draw(self) -> np.ndarray:
        picture = np.full((HEIGHT, WIDTH, 3), WHITE, dtype=np.uint8)
        row, middle = HEIGHT // 2, WIDTH // 2
        line_end = FIFTHS * CELL_WIDTH
        picture[row - 2 : row + 2, middle - line_end : middle + line_end] = BLACK
        for position in range(-FIFTHS, FIFTHS + 1):
            column = middle + position * CELL_WIDTH
            picture[row - 10 : row + 10, column - 1 : column + 1] = BLACK
        for end, goal in ((-FIFTHS, self._observation[0]), (FIFTHS, self._observation[2])):
            column = middle + end * CELL_WIDTH
            colour = GREY if goal == 0 else GREEN if goal > 0 else RED
            picture[row - 60 : row + 60, column - GOAL_HALF_WIDTH : column + GOAL_HALF_WIDTH] = colour
        rows, columns = np.ogrid[:HEIGHT, :WIDTH]
        distance = (rows - row) ** 2 + (columns - middle - self._position * CELL_WIDTH) ** 2
        picture[distance <= AGENT_RADIUS**2] = BLUE
        return picture
