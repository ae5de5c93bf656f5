"""The proof of concept of a memory: a corridor whose good end is shown only at first."""

from typing import Any, Literal

import gymnasium
import numpy as np
from pydantic import Field

from environments.gymnasium_env import GymnasiumEnv
from environments.pictures import cell_picture
from environments.section import Section

# Positions are whole numbers of fifths, which do not drift as sums of 0.2 would.
FIFTHS = 5
START_POSITIONS = (-2, -1, 0, 1, 2)
SHOWN_STEPS, LONGEST = 2, 32
STEP_COST = 0.1
END_REWARD = 1.0 + 6 * STEP_COST
COLOURS = {-1: (200, 50, 50), 0: (160, 160, 160), 1: (40, 160, 70)}  # of a bad, a hidden and a good end


class PocMemoryEnv(gymnasium.Env):
    """A line from −1 to 1 with a good end and a bad one, which are visible only during the first steps.

    The observation is (left goal, position, right goal), where a goal is 1 if it is good, −1 if it is bad and 0 once
    it is hidden. The agent is frozen while it is shown the goals, so that it has to remember them to arrive.
    """

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode at a random position with the good end on a random side; the observation is (3,)."""
        super().reset(seed=seed)
        self._step = 0
        self._position = int(self.np_random.choice(START_POSITIONS))
        self._good_end = int(self.np_random.choice((-FIFTHS, FIFTHS)))
        return self._observe(goals_visible=True), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Move the agent one step to the left (0) or to the right (1)."""
        frozen = self._step < SHOWN_STEPS
        self._step += 1
        if not frozen:
            self._position += 1 if action == 1 else -1
        terminated = abs(self._position) == FIFTHS
        success = self._position == self._good_end
        reward = 0.0 if frozen else -STEP_COST
        if terminated:
            reward = END_REWARD if success else -END_REWARD
        truncated = not terminated and self._step == LONGEST
        return self._observe(goals_visible=frozen), reward, terminated, truncated, {"success": success}

    def _observe(self, goals_visible: bool) -> np.ndarray:
        self._shown = np.sign(self._good_end) if goals_visible else 0
        return np.array([-self._shown, self._position / FIFTHS, self._shown], dtype=np.float32)

    def render(self) -> np.ndarray:  # type: ignore[override]
        """Draw the corridor, its ends as they are shown, and the agent: uint8 (H, W, 3)."""
        cells = np.full((1, 2 * FIFTHS + 1, 3), 225)
        cells[0, 0], cells[0, -1] = COLOURS[-self._shown], COLOURS[self._shown]
        cells[0, FIFTHS + self._position] = (40, 90, 200)
        return cell_picture(cells)


class PocMemorySection(Section):
    """A corridor whose good end is shown only at first."""

    type: Literal["PocMemoryEnv"] = Field(description="Which environment.")

    def create(self, render_mode: str | None = None) -> GymnasiumEnv:
        """Return a new environment."""
        return GymnasiumEnv(PocMemoryEnv(), LONGEST, names=("left goal", "position", "right goal"))
