"""What all environments share: counting an episode, and pictures of it."""

import difflib
from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np

from environments.contract import BrokenContract, shorten
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
    """Base of all environments: counts reward and length of the episode and guards the rendering.

    An action is int64 (branches,), or an int where there is one branch, or float32 (n,) where it is numbers. An episode
    is determined by its seed and its actions. The info is empty before the end, but for an `action_mask`.

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

    def __init__(self, section: Section, render_mode: str | None = None):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode: {render_mode!r} is not known; allowed: None, 'rgb_array'")
        self.section: Any = section
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
        """Count a step by its reward in the environment's own unit; return its info, empty before the end."""
        self._episode_reward += reward
        self._episode_length += 1
        return {**numbers, **self.numbers_so_far()} if ended else {}

    def render(self) -> np.ndarray:
        """Return the global view as a picture (height, width, 3), uint8; RuntimeError without render mode or reset."""
        self._check_rendering()
        return self._draw()

    def agent_view(self) -> np.ndarray | None:
        """Return the frame that the agent sees as `render` does, None where it sees numbers only."""
        self._check_rendering()
        frame = self._observation["frame"] if isinstance(self._observation, dict) else self._observation
        return frame_picture(frame) if frame.ndim == 3 else None

    def notices(self) -> list[str]:
        """Return what someone who trains on this environment had better know, a line each."""
        return []

    def _check_rendering(self) -> None:
        if self.render_mode is None or self._observation is None:
            raise RuntimeError("there is nothing to look at before the first reset, or without render_mode='rgb_array'")

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


def picture_space(channels: int, height: int, width: int) -> gymnasium.spaces.Box:
    """Return the space of uint8 pictures of shape (channels, height, width)."""
    return gymnasium.spaces.Box(0, 255, (channels, height, width), np.uint8)


def discrete(action: Any) -> int:
    """Return a single action as an int, whether it comes as an int or as an array of shape (1,)."""
    return int(np.asarray(action).item())


def suggest(name: Any, known: Iterable[str]) -> str:
    """Return the end of an error message: the known names that are nearest to the given one."""
    return "; the nearest: " + ", ".join(difflib.get_close_matches(str(name), known, n=3, cutoff=0.0))


def as_picture(rendered: Any, name: str) -> np.ndarray:
    """Return what an environment's `render` returned as a picture (height, width, 3), uint8, a copy.

    Args:
        rendered: grey, RGB or RGBA, of bytes, bools or floats (0..1 or 0..255); of several pictures the last is taken.
        name: what the environment is called in the error message.

    Raises:
        BrokenContract: if it is no picture.
    """
    is_list = isinstance(rendered, list | tuple) and rendered and getattr(rendered[-1], "ndim", 0) >= 2
    try:
        picture = np.asarray(rendered[-1] if is_list else rendered)
    except ValueError:  # nested lists of different lengths
        picture = np.empty(0)
    picture = picture[:, :, None] if picture.ndim == 2 else picture
    if picture.ndim != 3 or picture.size == 0 or picture.shape[2] not in (1, 3, 4) or picture.dtype.kind not in "biuf":
        raise BrokenContract(f"{name}: render returned {shorten(rendered)}, should be a picture (height, width, 3)")
    if not (picture.min() >= 0 and picture.max() <= 255):  # NaN included
        raise BrokenContract(f"{name}: render returned values outside of 0..255")
    if picture.dtype.kind in "bf" and picture.max() <= 1:
        picture = picture * 255.0
    channels = picture.repeat(3, axis=2) if picture.shape[2] == 1 else picture[:, :, :3]
    return np.array(np.rint(channels), np.uint8, order="C")


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
    cells[: len(vector)] = np.nan_to_num(vector)
    # 0 is grey, ±1 is three quarters of the way to white and black, however large an entry gets.
    grey = np.uint8(127.5 + 127.5 * np.tanh(cells)).reshape(rows, columns)
    return cell_picture(grey[:, :, None].repeat(3, axis=2))


def cell_picture(colours: np.ndarray) -> np.ndarray:
    """Return a picture of a board whose cells have these colours, (rows, columns, 3), with white lines between them."""
    cell = max(SMALLEST_CELL, -(-SHORTEST_SIDE // min(colours.shape[:2])))
    picture = np.uint8(colours).repeat(cell, axis=0).repeat(cell, axis=1)
    picture[cell - 1 :: cell], picture[:, cell - 1 :: cell] = 255, 255
    return picture
