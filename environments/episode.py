"""What all environments share: counting an episode, and pictures of it."""

import warnings
from typing import Any

import gymnasium
import numpy as np

from environments.contract import BrokenContract
from environments.section import Section

Info = dict[str, Any]
# A frame or a vector, an array; both are a dict of two arrays, "frame" and "vector"
Observation = Any
# Observation, reward, terminated, truncated, info
Step = tuple[Observation, float, bool, bool, Info]

# The smallest picture that passes the encoder's three convolutions; smaller frames pass other ones.
SMALLEST_PICTURE = 36
# A drawn vector: cells side by side, and the shortest side in pixels.
MOST_COLUMNS, SHORTEST_SIDE, SMALLEST_CELL = 16, 96, 12


class EpisodeEnv(gymnasium.Env):
    """Base of all environments: counts reward and length of the episode.

    An action is int64 (branches,), or an int where there is one branch, or float32 (n,) where it is numbers. An episode
    is determined by its seed and its actions. The info is empty before the end, but for an `action_mask`. `render`
    returns the global view as a picture (height, width, 3), uint8.

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
    _observation: Observation

    def __init__(self, section: Section, render_mode: str | None = None):
        self.section: Any = section
        self.render_mode = render_mode
        self._start_episode()

    def _start_episode(self) -> None:
        """Set the counters of the episode back; belongs into every reset."""
        self._episode_reward = 0.0
        self._episode_length = 0

    def numbers_so_far(self) -> dict[str, float]:
        """Return reward, in the environment's own unit, and length of the running episode."""
        return {"reward": self._episode_reward, "length": self._episode_length}

    def _count_step(self, reward: float, ended: bool, numbers: dict[str, float]) -> Info:
        """Count a step by its reward in the environment's own unit; return its info, empty before the end."""
        self._episode_reward += reward
        self._episode_length += 1
        return {**numbers, **self.numbers_so_far()} if ended else {}

    def agent_view(self) -> np.ndarray | None:
        """Return the frame that the agent sees as `render` does, None where it sees numbers only."""
        frame = self._observation["frame"] if isinstance(self._observation, dict) else self._observation
        return frame_picture(frame) if frame.ndim == 3 else None

    def notices(self) -> list[str]:
        """Return what someone who trains on this environment had better know, a line each."""
        return []


class WrappedEnv(EpisodeEnv):
    """Base of the environments that pass their calls on to an environment made by Gymnasium, `self._env`."""

    _env: Any

    def render(self) -> np.ndarray:
        """Return what the environment draws, a copy; BrokenContract if it is no picture."""
        picture: Any = np.asarray(self._env.render())
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            found = f"{picture.dtype} {picture.shape}"
            raise BrokenContract(f"{self._env.spec.id}: render returned {found}, should be uint8 (height, width, 3)")
        return picture.copy()

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


def make_registered(name: str, **arguments: Any) -> Any:
    """Make an environment that is registered with Gymnasium, without its checker and its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gymnasium.make(name, disable_env_checker=True, **arguments)


def picture_space(channels: int, height: int, width: int) -> gymnasium.spaces.Box:
    """Return the space of uint8 pictures of shape (channels, height, width)."""
    return gymnasium.spaces.Box(0, 255, (channels, height, width), np.uint8)


def discrete(action: Any) -> int:
    """Return a single action as an int, whether it comes as an int or as an array of shape (1,)."""
    return int(np.asarray(action).item())


def frame_picture(frame: np.ndarray) -> np.ndarray:
    """Return a frame (channels, height, width) as a picture (height, width, 3) that can be looked at, a copy.

    Stacks show their newest picture: the last three channels where their number is a multiple of three, else the last
    one. Small grids, whose numbers are rather kinds than brightness, are brought to the full range.
    """
    shown = frame[-3:] if len(frame) % 3 == 0 else frame[-1:].repeat(3, axis=0)
    if min(frame.shape[1:]) < SMALLEST_PICTURE:
        shown = shown * np.uint8(255 // max(int(shown.max()), 1))
    return np.array(shown.transpose(1, 2, 0), order="C")


def vector_picture(vector: np.ndarray) -> np.ndarray:
    """Return a vector as a picture, where nothing is drawn: a cell for each entry, black over grey to white."""
    columns = min(len(vector), MOST_COLUMNS)
    rows = -(-len(vector) // columns)
    cells = np.zeros(rows * columns)
    cells[: len(vector)] = vector
    # 0 is grey, ±1 is three quarters of the way to white and black, however large an entry gets.
    grey = np.uint8(127.5 + 127.5 * np.tanh(cells)).reshape(rows, columns)
    return cell_picture(grey[:, :, None].repeat(3, axis=2))


def cell_picture(colours: np.ndarray) -> np.ndarray:
    """Return a picture of a board whose cells have these colours, (rows, columns, 3), with white lines between them."""
    cell = max(SMALLEST_CELL, -(-SHORTEST_SIDE // min(colours.shape[:2])))
    picture = np.uint8(colours).repeat(cell, axis=0).repeat(cell, axis=1)
    picture[cell - 1 :: cell], picture[:, cell - 1 :: cell] = 255, 255
    return picture
