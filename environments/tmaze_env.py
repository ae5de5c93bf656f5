"""A T-maze: remember from the start of a corridor which way to turn at its end (Bakker 2001, Ni et al. 2023)."""

from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from pydantic import Field

from environments.gymnasium_env import GymnasiumEnv
from environments.pictures import cell_picture
from environments.section import Flag, Section, Whole

LEFT, UP, RIGHT, DOWN = range(4)
# A longer corridor is drawn by this many cells.
DRAWN_CELLS = 24
WALL, FLOOR, GOOD, BAD, AGENT = (60, 60, 60), (225, 225, 225), (40, 160, 70), (200, 50, 50), (40, 90, 200)


class TMaze(gymnasium.Env):
    """A corridor with a cue at its start and a junction at its end; the turn there ends the episode and pays 1 or 0.

    In the corridor only `right` gets on, all else leaves the agent where it is and costs 1/corridor_length, so that the
    optimum is 1, and 1/2 without knowing the cue. The horizon leaves time for the shortest way and one decision.
    Its last step terminates: there is no value beyond it. The observation says where the agent is, not how far, so
    that the time cannot be read off. With `guided`, each episode has one decision: otherwise a policy that has learned
    to walk is certain of `right` long before it has decided once.
    """

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(4)

    def __init__(self, corridor_length: int = 100, passive: bool = True, guided: bool = True) -> None:
        self._junction, self._passive, self._guided = corridor_length, passive, guided
        self.horizon = corridor_length + (1 if passive else 3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode with a random cue, 1 for up, −1 for down; the observation is (4,)."""
        super().reset(seed=seed)
        self._cue = int(self.np_random.choice((-1, 1)))
        self._step, self._position, self._was_left = 0, 0, False
        return self._observe(shown=self._passive), self._mask()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Go left (0), up (1), right (2) or down (3)."""
        self._step += 1
        decided = self._position == self._junction and action in (UP, DOWN)
        success = decided and (action == UP) == (self._cue == 1)
        reward = float(success)
        if self._position < self._junction:
            if action == RIGHT:
                self._position += 1
            elif action == LEFT and self._position == 0 and not self._passive and not self._was_left:
                self._position, self._was_left = -1, True
            else:
                reward = -1 / self._junction
        ended = decided or self._step == self.horizon
        if self._guided and self._step == self.horizon - 1:
            self._position = self._junction  # for the one step that is left
        return self._observe(shown=self._position == -1), reward, ended, False, {"success": success} | self._mask()

    def _observe(self, shown: bool) -> np.ndarray:
        place = self._position
        seen = (self._cue * shown, place == 0, 0 < place < self._junction, place == self._junction)
        return np.array(seen, dtype=np.float32)

    def _mask(self) -> dict:
        sideways = self._position < self._junction
        return {"action_mask": np.array([sideways, True, sideways, True])} if self._guided else {}

    def render(self) -> np.ndarray:  # type: ignore[override]
        """Draw the corridor, both goals and the agent: uint8 (H, W, 3); a long corridor is drawn shorter."""
        cells = min(self._junction, DRAWN_CELLS) + 2  # the first one is that to the left of the start
        board = np.full((3, cells, 3), WALL)
        board[1, int(self._passive) :] = FLOOR
        board[0, -1], board[2, -1] = (GOOD, BAD) if self._cue == 1 else (BAD, GOOD)
        board[1, 1 + round(self._position * (cells - 2) / self._junction)] = AGENT
        return cell_picture(board)


class TMazeSection(Section):
    """A cue, a corridor, and a junction at its end where the cue says whether up or down is right."""

    type: Literal["TMaze"] = Field(description="Which environment.")
    corridor_length: Annotated[Whole, Field(ge=1, le=10**5)] = Field(100, description="Steps from start to junction.")
    passive: Flag = Field(
        True, description="The cue is in the first observation; else it lies one step to the left of the start."
    )
    guided: Flag = Field(
        True,
        description="Every episode comes to its decision: an agent that is late is carried to the junction, where only "
        "up and down are allowed. False is closer to what is published: an agent has to walk without a mistake first.",
    )

    def create(self, render_mode: str | None = None) -> GymnasiumEnv:
        """Return a new T-maze."""
        env = TMaze(self.corridor_length, self.passive, self.guided)
        return GymnasiumEnv(env, env.horizon, names=("cue", "at the start", "in the corridor", "at the junction"))
