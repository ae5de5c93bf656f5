"""Any observation space as a frame, a vector or both; any action space as branches of choices or as numbers.

A picture becomes the frame: uint8, (channels, height, width). All the rest is flattened to one float32 vector, in the
order of the space, as `gymnasium.spaces.utils` does; whole numbers with bounds are brought to 0..1.
"""

import math
import textwrap
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import getitem
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatdim, flatten, flatten_space, unflatten

from environments.contract import BrokenContract
from environments.pictures import SMALLEST_PICTURE

# Whole numbers with bounds further apart have none that mean something: they are those of the data type.
WIDEST_RANGE = 2**31 - 1
# The largest observations and actions. A vector's entry or an action costs a row of weights; a frame of 2²⁰ values is
# one of 590×590 in colour.
MOST_ENTRIES, MOST_PIXELS = 2**16, 2**20

Choices = spaces.Discrete | spaces.MultiDiscrete


def check_size(space: gymnasium.Space, what: str, count: int, most: int = MOST_ENTRIES) -> None:
    """Raise BrokenContract if what becomes of a space are too many numbers to be worked with."""
    if count > most:
        shown = textwrap.shorten(str(space), 120)
        raise BrokenContract(f"{shown} makes {what} of {count:,} values, more than {most:,}: see docs/environments.md")


def leaves(space: gymnasium.Space, path: tuple = (), name: str = "") -> Iterator[tuple[tuple, Any, str]]:
    """Yield, for each space inside nested Dicts and Tuples, its keys, itself and its name: `key.inner`, `key[0]`."""
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from leaves(part, (*path, key), f"{name}.{key}" if name else str(key))
    elif isinstance(space, spaces.Tuple):
        for index, part in enumerate(space.spaces):
            yield from leaves(part, (*path, index), f"{name or 'observation'}[{index}]")
    else:
        yield path, space, name or "observation"


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

    What a picture is, and which dimension its channels are: the table in docs/environments.md.
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
    smallest = 3 if len(axes) == 3 and space.dtype in (np.uint8, np.bool_) else SMALLEST_PICTURE
    return axes if min(space.shape[axes[0]], space.shape[axes[1]]) >= smallest else None


def entries_of(value: Any, space: Any, name: str) -> np.ndarray:
    """Return the entries (size,) of a value in the vector: choices one-hot, or numbers."""
    numbers = np.asarray(value)
    if numbers.shape != space.shape and not numbers.size == math.prod(space.shape) == 1:
        raise BrokenContract(f"{name} has the shape {numbers.shape}, its space says {space.shape}")
    if not isinstance(space, Choices):
        return numbers.ravel()
    chosen = numbers.reshape(space.shape).astype(np.int64)
    if not space.contains(chosen):
        raise BrokenContract(f"{name} is {value}, which its space does not contain")
    return np.asarray(flatten(space, chosen))


def entry_names(space: Any, root: str) -> list[str]:
    """Return what each entry is called: `root[1,2]`, `root` where there is one number, `root=2` of choices."""
    indices = [",".join(map(str, index)) for index in np.ndindex(*space.shape)]
    names = [f"{root}[{index}]" if index else root for index in indices]
    if not isinstance(space, Choices):
        return names
    triples = zip(names, np.broadcast_to(np.ravel(space.start), len(names)), choices_of(space), strict=True)
    return [f"{name}={start + choice}" for name, start, choices in triples for choice in range(choices)]


def entry_ranges(space: Any) -> np.ndarray:
    """Return (2, size): what is subtracted from each entry, and what it is divided by then."""
    ranges = np.array([[0.0], [1.0]]).repeat(flatdim(space), axis=1)
    if isinstance(space, spaces.Box) and space.dtype.kind in "biu":
        low, high = (np.ravel(end).astype(np.float64) for end in (space.low, space.high))
        if (high - low).max(initial=0) < WIDEST_RANGE:
            ranges[:] = low, np.maximum(high - low, 1.0)
    return ranges


class Observer:
    """Turns what an environment shows into a frame, a vector or both; BrokenContract where that cannot be done.

    `frame_shape` is (channels, height, width), None without a frame; the vector has `size` entries, called `names`.
    """

    def __init__(self, space: gymnasium.Space, observe: list[str] | None = None) -> None:
        there = [*space.spaces] if isinstance(space, spaces.Dict) else []
        if not set(observe or ()) <= set(there):
            raise BrokenContract(f"observe: {observe} should all be among {there}")
        parts = [part for part in leaves(space) if observe is None or part[0][0] in observe]
        pictures = [part for part in parts if picture_axes(part[1])]
        if len(pictures) > 1:
            names = ", ".join(name for *_, name in pictures)
            raise BrokenContract(f"several pictures ({names}): choose one with `observe`")
        self._picture, self.frame_shape = next(iter(pictures), None), None
        for _, part, _ in pictures:
            self._axes, self._scale = picture_axes(part), pixel_scale(part)
            height, width, *channels = (part.shape[axis] for axis in self._axes)
            self.frame_shape = (*(channels or [1]), height, width)
            check_size(space, f"frames {self.frame_shape}", math.prod(self.frame_shape), MOST_PIXELS)
        self._vectors = [part for part in parts if not picture_axes(part[1])]
        for _, part, name in self._vectors:
            if not isinstance(part, Choices | spaces.MultiBinary | spaces.Box):
                raise BrokenContract(
                    f"{name} is {type(part).__name__}, which is not supported: leave it out with `observe`"
                )
        self.size = sum(flatdim(part) for _, part, _ in self._vectors)
        check_size(space, "a vector", self.size)
        self.names = [entry for _, part, name in self._vectors for entry in entry_names(part, name)]
        self._ranges = np.concatenate([np.zeros((2, 0)), *(entry_ranges(part) for _, part, _ in self._vectors)], axis=1)

    def frame(self, observation: Any) -> np.ndarray | None:
        """Return the frame of an observation, a copy of shape `frame_shape`; None if there is none."""
        if self._picture is None:
            return None
        path, space, name = self._picture
        picture = np.asarray(reduce(getitem, path, observation))
        if picture.shape != space.shape or (space.dtype == np.uint8 and picture.dtype.kind == "f"):
            found = f"{picture.shape} of {picture.dtype}"
            raise BrokenContract(f"{name} has the shape {found}, its space says {space.shape} of {space.dtype}")
        if picture.dtype != np.uint8 or self._scale != 1:
            pixels = np.rint(picture * self._scale)
            if not (pixels.min() >= 0 and pixels.max() <= 255):  # NaN included
                raise BrokenContract(f"{name} holds values outside of its bounds, or NaN")
            picture = pixels.astype(np.uint8)
        picture = picture[:, :, None] if len(self._axes) == 2 else picture.transpose(self._axes)
        # Channels last in memory. Always a copy: environments may write their next observation into the same array.
        return np.array(picture, order="C").transpose(2, 0, 1)

    def vector(self, observation: Any) -> np.ndarray:
        """Return the vector of an observation (size,), float64."""
        parts = [entries_of(reduce(getitem, path, observation), space, name) for path, space, name in self._vectors]
        return (np.concatenate([np.zeros(0), *parts]) - self._ranges[0]) / self._ranges[1]


def hidden_entries(hide: Iterable[int | str], size: int) -> np.ndarray:
    """Return which entries of a vector are hidden, bool (size,), by Python's indices and slices: "2:4", "2:", ":4"."""
    hidden = np.zeros(size, bool)
    for item in hide:
        ends = [int(end) if end else None for end in str(item).split(":")]
        try:
            hidden[slice(*ends) if len(ends) > 1 else ends[0]] = True
        except IndexError as error:
            raise BrokenContract(f"hide: {error}") from error
    return hidden


class Actor:
    """Turns branches of choices, or numbers, into the actions of an environment, of the type that its space samples.

    A space that mixes choices and numbers, or holds anything else, is a BrokenContract.
    """

    branches: tuple[int, ...] = ()  # how many actions each has
    bounds: tuple[np.ndarray, np.ndarray] | None = None  # lowest and highest (n,), where there are no branches

    def __init__(self, space: gymnasium.Space) -> None:
        self._own, parts = space, [part for _, part, _ in leaves(space)]
        if all(isinstance(part, spaces.Box) for part in parts):
            flat: Any = flatten_space(space)
            self.bounds = flat.low.astype(np.float64), flat.high.astype(np.float64)
            self._whole = np.concatenate([np.full(flatdim(part), part.dtype.kind in "iu") for part in parts])
        elif all(isinstance(part, Choices | spaces.MultiBinary) for part in parts):
            self.branches = tuple(count for part in parts for count in choices_of(part))
        else:
            raise BrokenContract(
                f"the action space {textwrap.shorten(str(space), 120)} cannot be acted in: wrap it so that all of it "
                "is Discrete, MultiDiscrete or MultiBinary, or all of it Box"
            )
        self.size = sum(self.branches) or flatdim(space)
        check_size(space, "actions", self.size)
        self._offsets = np.cumsum((0, *self.branches))[:-1]
        # Which features Gymnasium's flat form has: for an entry of a MultiBinary, only the second of its two.
        kept = [[False, True] * flatdim(part) if isinstance(part, spaces.MultiBinary) else [True] * flatdim(part)
                for part in parts]  # fmt: skip
        self._kept = np.concatenate(kept)

    def features(self, action: Any) -> np.ndarray:
        """Return an action as (size,): one-hot per branch, or numbers as passed on; zeros where it is None."""
        features = np.zeros(self.size)
        if action is not None and self.branches:
            features[self._offsets + np.ravel(action)] = 1.0
        elif action is not None:
            features = np.clip(np.asarray(action, np.float64), *self.bounds)
            features[self._whole] = np.rint(features[self._whole])
        return features

    def action(self, action: Any) -> Any:
        """Return the environment's own action for one of shape (branches,), (n,), or an int for one branch."""
        return unflatten(self._own, self.features(action)[self._kept])

    def mask(self, mask: Any) -> np.ndarray:
        """Return which actions are allowed, bool (sum of branches,), of such an array or a list of one per branch."""
        flat = np.ravel(mask if isinstance(mask, np.ndarray) else np.hstack(mask)).astype(bool)
        if len(flat) != self.size:
            raise BrokenContract(f"action_mask has {len(flat)} entries, there are {self.size} actions: {self.branches}")
        if not np.logical_or.reduceat(flat, self._offsets).all():
            raise BrokenContract("action_mask allows no action of a branch")
        return flat
