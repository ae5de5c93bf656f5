"""Any observation space as a frame, a vector or both; any action space as branches of choices or as numbers.

A picture becomes the frame: uint8, (channels, height, width). All the rest is flattened to one float32 vector, in the
order of the space, as `gymnasium.spaces.utils` does; whole numbers with bounds are brought to 0..1.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from operator import getitem
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatdim, flatten, flatten_space

from environments.contract import BrokenContract, check_sizes
from environments.episode import SMALLEST_PICTURE

SMALLEST_GRID = 3
# Whole numbers with bounds further apart have none that mean something: they are those of the data type.
WIDEST_RANGE = 2**31 - 1

Path = tuple[Any, ...]
Choices = spaces.Discrete | spaces.MultiDiscrete


def leaves(space: gymnasium.Space, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the spaces inside nested Dicts and Tuples, each with the keys that lead to it."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts: Any = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for key, part in parts:
            yield from leaves(part, (*path, key))
    else:
        yield path, space


def path_name(path: Path) -> str:
    """Return how a part of an observation is called: `key`, `key.inner` or, in a Tuple, `observation[0]`."""
    name = "" if path and isinstance(path[0], str) else "observation"
    for key in path:
        name += f"[{key}]" if not isinstance(key, str) else f".{key}" if name else key
    return name


def choices_of(space: Any) -> list[int]:
    """Return how many choices there are in each place of a Discrete or MultiDiscrete; 2 in each of a MultiBinary."""
    if isinstance(space, spaces.MultiBinary):
        return [2] * math.prod(space.shape)
    return np.ravel(getattr(space, "nvec", getattr(space, "n", None))).tolist()


def pixel_scale(space: Any) -> float | None:
    """Return what turns the values of a Box into those of pixels, a factor; None if they are no pixels."""
    if np.all(space.low == 0) and np.all(space.high == 1):
        return 255.0
    return 1.0 if space.dtype == np.uint8 or np.all(space.low == 0) and np.all(space.high == 255) else None


def picture_axes(space: gymnasium.Space) -> tuple[int, ...] | None:
    """Return the axes of a picture's height, width and, if it has three, channels; None if a space holds no pictures.

    Pictures are uint8, or bounded by 0..1 or 0..255, and at least 36×36. From 3×3 on, uint8 and bool of three
    dimensions are pictures too. Where two neighbouring dimensions are equal and the third is not, that one is the
    channels; else the smaller of the first and the last, and the last where these are equal.
    """
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3) or pixel_scale(space) is None:
        return None
    first, middle, last = space.shape[0], space.shape[1], space.shape[-1]
    if len(space.shape) == 2:
        axes: tuple[int, ...] = (0, 1)
    elif (middle == last) != (middle == first):
        axes = (1, 2, 0) if middle == last else (0, 1, 2)
    else:
        axes = (1, 2, 0) if first < last else (0, 1, 2)
    is_grid = len(axes) == 3 and space.dtype in (np.uint8, np.bool_)
    smallest = SMALLEST_GRID if is_grid else SMALLEST_PICTURE
    return axes if min(space.shape[axes[0]], space.shape[axes[1]]) >= smallest else None


class FramePart:
    """The picture of an observation; `shape` is (channels, height, width)."""

    def __init__(self, space: Any, name: str) -> None:
        self._space, self._name, self._axes, self._scale = space, name, picture_axes(space), pixel_scale(space)
        height, width, *channels = (space.shape[axis] for axis in self._axes)
        self.shape = (*(channels or [1]), height, width)

    def __call__(self, value: Any) -> np.ndarray:
        """Return a copy of a picture as uint8 of shape (channels, height, width), channels last in memory."""
        picture, space = np.asarray(value), self._space
        if picture.shape != space.shape or (space.dtype == np.uint8 and picture.dtype.kind == "f"):
            raise BrokenContract(
                f"{self._name} has the shape {picture.shape} of {picture.dtype}, its space says {space.shape} of "
                f"{space.dtype}"
            )
        if picture.dtype != np.uint8 or self._scale != 1:
            pixels = np.rint(picture * self._scale)
            if not (pixels.min() >= 0 and pixels.max() <= 255):  # NaN included
                raise BrokenContract(f"{self._name} holds values outside of its bounds, or NaN")
            picture = pixels.astype(np.uint8)
        picture = picture[:, :, None] if len(self._axes) == 2 else picture.transpose(self._axes)
        # Always a copy: environments may write their next observation into the same array.
        return np.array(picture, order="C").transpose(2, 0, 1)


class VectorPart:
    """A part of an observation in the vector: choices one-hot, or numbers; `size` is how many entries it has."""

    def __init__(self, space: Any, name: str) -> None:
        if not isinstance(space, Choices | spaces.MultiBinary | spaces.Box):
            raise ValueError(f"{name} is {type(space).__name__}, which cannot be seen: leave it out with `observe`")
        self._space, self._name, self.size = space, name, flatdim(space)
        self._low: Any = np.float64(0.0)
        self._range: Any = np.float64(1.0)
        if isinstance(space, spaces.Box) and space.dtype.kind in "biu":
            low, high = (np.ravel(end).astype(np.float64) for end in (space.low, space.high))
            if (high - low).max(initial=0) < WIDEST_RANGE:
                self._low, self._range = low, np.maximum(high - low, 1.0)

    def names(self) -> list[str]:
        """Return what each entry is: `name[1,2]`, `name` where there is one number, `name=2` of choices."""
        indices = [",".join(map(str, index)) for index in np.ndindex(*self._space.shape)]
        names = [f"{self._name}[{index}]" if index else self._name for index in indices]
        if not isinstance(self._space, Choices):
            return names
        starts = np.broadcast_to(np.ravel(self._space.start), len(names))
        triples = zip(names, starts, choices_of(self._space), strict=True)
        return [f"{name}={start + choice}" for name, start, choices in triples for choice in range(choices)]

    def __call__(self, value: Any) -> Any:
        """Return the entries (size,) of a value; BrokenContract if it is not one of the space."""
        space, numbers = self._space, np.asarray(value)
        if numbers.shape != space.shape and not numbers.size == math.prod(space.shape) == 1:
            raise BrokenContract(f"{self._name} has the shape {numbers.shape}, its space says {space.shape}")
        if not isinstance(space, Choices):
            return (numbers.ravel() - self._low) / self._range
        chosen = numbers.reshape(space.shape).astype(np.int64)
        if not space.contains(chosen):
            raise BrokenContract(f"{self._name} is {value}, which its space does not contain")
        return flatten(space, chosen)


class Observer:
    """Turns what an environment shows into a frame, a vector or both; ValueError where that cannot be done.

    Args:
        space: the environment's observation space.
        observe: the entries of a Dict to be seen, None for all of them.

    Attributes:
        frame_shape: (channels, height, width) of the frame, None if there is none.
        size: number of entries of the vector, 0 if there is none.
    """

    def __init__(self, space: gymnasium.Space, observe: list[str] | None = None) -> None:
        there = list(space.spaces) if isinstance(space, spaces.Dict) else []
        for key in observe or ():
            if key not in there:
                raise ValueError(f"observe: {key!r} is not there; there are {', '.join(map(str, there)) or 'none'}")
        self._frames, self._vectors = {}, {}
        for path, part in leaves(space):
            if observe is None or path[0] in observe:
                if picture_axes(part):
                    self._frames[path] = FramePart(part, path_name(path))
                else:
                    self._vectors[path] = VectorPart(part, path_name(path))
        if len(self._frames) > 1:
            raise ValueError(f"{', '.join(map(path_name, self._frames))} are pictures: choose one with `observe`")
        self.frame_shape = next((part.shape for part in self._frames.values()), None)
        self.size = sum(part.size for part in self._vectors.values())
        check_sizes(self.frame_shape, self.size)

    def names(self) -> list[str]:
        """Return what each entry of the vector is."""
        return [name for part in self._vectors.values() for name in part.names()]

    def frame(self, observation: Any) -> np.ndarray | None:
        """Return the frame of an observation, a copy of shape `frame_shape`; None if there is none."""
        return next((part(reduce(getitem, path, observation)) for path, part in self._frames.items()), None)

    def vector(self, observation: Any) -> list[np.ndarray]:
        """Return the vector of an observation in pieces, of `size` entries in all."""
        return [part(reduce(getitem, path, observation)) for path, part in self._vectors.items()]


def hidden_entries(hide: Iterable[int | str], size: int) -> np.ndarray:
    """Return the indices (int64) of the entries of a vector that are to be hidden; ValueError if one is beyond it.

    Args:
        hide: indices and slices such as "2:4", "2:" or ":4", as Python understands them.
        size: number of entries of the vector.
    """
    hidden = np.zeros(size, bool)
    for item in hide:
        ends = [int(end) if end else None for end in str(item).split(":")]
        try:
            hidden[ends[0] if len(ends) == 1 else slice(*ends)] = True
        except IndexError:
            raise ValueError(f"hide: {item!r} is out of range; the vector has {size} entries") from None
    return np.flatnonzero(hidden)


class Actor:
    """Turns branches of choices, or numbers, into the actions of an environment, of the type that its space samples.

    A space that mixes choices and numbers, or holds anything else, is a ValueError.

    Attributes:
        space: Discrete or MultiDiscrete, both from 0, or float32 Box (n,) without bounds.
        branches: how many actions each branch has; empty for numbers.
        size: entries that `features` returns.
        bounds: lowest and highest (n,) of numbers; None where there are branches.
    """

    bounds: tuple[np.ndarray, np.ndarray] | None = None

    def __init__(self, space: gymnasium.Space) -> None:
        self._own, parts = space, [part for _, part in leaves(space)]
        kinds = [type(part).__name__ for part in parts]
        self.branches: tuple[int, ...] = ()
        if all(isinstance(part, spaces.Box) for part in parts):
            flat: Any = flatten_space(space)
            self.size = flat.shape[0]
            self.space: gymnasium.Space = spaces.Box(-np.inf, np.inf, flat.shape, np.float32)
            self.bounds = flat.low.astype(np.float64), flat.high.astype(np.float64)
        elif all(isinstance(part, Choices | spaces.MultiBinary) for part in parts):
            self.branches = tuple(count for part in parts for count in choices_of(part))
            self.size = sum(self.branches)
            is_one = isinstance(space, spaces.Discrete)
            self.space = spaces.Discrete(self.size) if is_one else spaces.MultiDiscrete(list(self.branches))
        else:
            raise ValueError(
                f"{', '.join(kinds)} cannot be acted in: wrap it so that all of it is Discrete, MultiDiscrete or "
                "MultiBinary, or all of it Box"
            )
        check_sizes(actions=self.size)
        self._offsets = np.cumsum(self.branches, dtype=np.int64) - np.array(self.branches, dtype=np.int64)

    def names(self, root: str) -> list[str]:
        """Return what each entry of `features` is: `root=1`, `root[0]=1`, or `root[0]` where actions are numbers."""
        return VectorPart(self.space, root).names()

    def features(self, action: Any) -> np.ndarray:
        """Return an action as (size,): one-hot per branch, or numbers as passed on; zeros where it is None."""
        features = np.zeros(self.size)
        if action is not None and self.branches:
            features[self._offsets + np.ravel(action)] = 1.0
        elif action is not None:
            features[:] = flatten(self._own, self.action(action))
        return features

    def action(self, action: Any) -> Any:
        """Return the environment's own action for one of shape (branches,), (n,), or an int for one branch."""
        numbers = action if self.branches else np.clip(np.asarray(action, np.float64), *self.bounds)
        return rebuilt(self._own, iter(np.ravel(numbers)))

    def mask(self, mask: Any) -> np.ndarray:
        """Return a mask of allowed actions as bool (sum of branches,), branch after branch.

        It comes as an array over all of them, or nested as the action space is; BrokenContract if it fits neither.
        """
        is_nested = isinstance(mask, Mapping) or isinstance(self._own, spaces.Tuple) and len(mask) != self.size
        parts = [reduce(getitem, path, mask) for path, _ in leaves(self._own)] if is_nested else [mask]
        arrays = [np.ravel(one) for part in parts for one in (part if isinstance(part, list | tuple) else [part])]
        flat = np.concatenate(arrays).astype(bool)
        if len(flat) != self.size:
            raise BrokenContract(f"action_mask has {len(flat)} entries, there are {self.size} actions: {self.branches}")
        if not np.logical_or.reduceat(flat, self._offsets).all():
            raise BrokenContract("action_mask allows no action of a branch")
        return flat


def rebuilt(space: Any, flat: Iterator) -> Any:
    """Return an action as its space has it, from choices that count from 0, or numbers, as many as the space takes."""
    if isinstance(space, spaces.Dict):
        return {key: rebuilt(part, flat) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(rebuilt(part, flat) for part in space.spaces)
    values = np.array([next(flat) for _ in range(math.prod(space.shape))]).reshape(space.shape)
    values = np.rint(values) if space.dtype.kind in "iu" else values
    values = np.asarray(values.astype(space.dtype) + getattr(space, "start", 0), dtype=space.dtype)
    return values[()] if isinstance(space, spaces.Discrete) else values
