"""Three rooms: a key, apples that distract, a door that pays with the key only (Hung et al. 2019, Ni et al. 2023)."""

from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from pydantic import Field

from environments.gymnasium_env import GymnasiumEnv
from environments.pictures import cell_picture
from environments.section import Section, Whole

KEY_ROOM, APPLE_ROOM, DOOR_ROOM = range(3)
ROOM_STEPS = 15  # in the room of the key, and in that of the door
SIDE, CENTRE = 3, (1, 1)
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
APPLE_REWARD, DOOR_REWARD = 0.1, 1.0
WALL, FLOOR, AGENT, HOLDER = (60, 60, 60), (225, 225, 225), (40, 90, 200), (40, 190, 220)
OBJECTS = ((230, 180, 40), (200, 50, 50), (130, 80, 40))  # key, apples, door


class KeyToDoor(gymnasium.Env):
    """Three rooms of 3×3 cells in which the agent begins in the centre and takes what it steps on.

    The key pays nothing when it is taken, and the agent is not shown whether it has it. Each of 0 to 8 apples pays .1.
    The door ends the episode and pays 1 with the key, else nothing. So the optimum is 1 + .1 per apple, `optimum` in
    the info, and all of it can be reached. The last step terminates: there is no value beyond it.

    The observation is the room, one of three, and what lies around the agent within two cells, so that all of the room
    is seen: 1 an object, −1 a wall. So one linear layer is enough to walk to an object.
    """

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3 + 5 * 5,), np.float32)
    action_space = gymnasium.spaces.Discrete(len(MOVES))

    def __init__(self, episode_length: int = 60) -> None:
        self._episode_length = episode_length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode with key, apples and door in random cells; the observation has the shape (28,)."""
        super().reset(seed=seed)
        cells = [cell for cell in np.ndindex(SIDE, SIDE) if cell != CENTRE]
        self._apples = int(self.np_random.integers(len(cells) + 1))
        drawn = [self.np_random.permutation(len(cells))[:count] for count in (1, self._apples, 1)]
        self._objects = [{cells[number] for number in numbers} for numbers in drawn]
        self._step, self._room, self._cell, self._has_key = 0, KEY_ROOM, CENTRE, False
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Go up (0), right (1), down (2) or left (3); walls leave the agent where it is."""
        self._step += 1
        down, right = MOVES[action]
        self._cell = min(max(self._cell[0] + down, 0), SIDE - 1), min(max(self._cell[1] + right, 0), SIDE - 1)
        took = self._cell in self._objects[self._room]
        self._objects[self._room].discard(self._cell)
        self._has_key |= took and self._room == KEY_ROOM
        opened = took and self._room == DOOR_ROOM
        success = opened and self._has_key
        reward = APPLE_REWARD * (took and self._room == APPLE_ROOM) + DOOR_REWARD * success

        ended = opened or self._step == self._episode_length
        if self._step in (ROOM_STEPS, self._episode_length - ROOM_STEPS):
            self._room, self._cell = self._room + 1, CENTRE
        numbers = {"success": success, "optimum": DOOR_REWARD + APPLE_REWARD * self._apples}
        return self._observe(), reward, ended, False, numbers

    def _observe(self) -> np.ndarray:
        board = np.full((SIDE + 4, SIDE + 4), -1.0)
        board[2:-2, 2:-2] = 0.0
        for row, column in self._objects[self._room]:
            board[row + 2, column + 2] = 1.0
        row, column = self._cell
        view = board[row : row + 5, column : column + 5]
        return np.concatenate((np.eye(3)[self._room], view.ravel())).astype(np.float32)

    def render(self) -> np.ndarray:  # type: ignore[override]
        """Draw the rooms side by side with what lies in them, and the agent: uint8 (H, W, 3)."""
        board = np.full((SIDE, 3, SIDE + 1, 3), WALL)  # the rooms side by side, a wall after each
        board[:, :, :SIDE] = FLOOR
        for room, objects in enumerate(self._objects):
            for row, column in objects:
                board[row, room, column] = OBJECTS[room]
        board[self._cell[0], self._room, self._cell[1]] = HOLDER if self._has_key else AGENT
        return cell_picture(board.reshape(SIDE, -1, 3))


class KeyToDoorSection(Section):
    """A key in the first room, apples in the second, in the third a door that pays only an agent that has the key."""

    type: Literal["KeyToDoor"] = Field(description="Which environment.")
    episode_length: Annotated[Whole, Field(ge=40, le=10**5)] = Field(
        60, description="Steps of an episode: 15 in the first room, 15 in the last, and all others among the apples."
    )

    def create(self, render_mode: str | None = None) -> GymnasiumEnv:
        """Return new rooms."""
        names = [f"room {number}" for number in (1, 2, 3)]
        names += [f"{down:+d},{right:+d}" for down in range(-2, 3) for right in range(-2, 3)]
        return GymnasiumEnv(KeyToDoor(self.episode_length), self.episode_length, names=names)
