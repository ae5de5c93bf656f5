"""Any observation space as a frame, a vector or both; any action space as branches or numbers; any picture as RGB.

A picture becomes the frame: uint8, (channels, height, width). All the rest is strung together to one float32 vector, in
the order of the space: Discrete and MultiDiscrete one-hot, MultiBinary and numbers as they are, whole numbers with
bounds brought to 0..1.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from environments import BrokenContract

# The smallest picture that passes the encoder's three convolutions; smaller frames pass other ones.
SMALLEST_PICTURE = 36
SMALLEST_GRID = 3
# Whole numbers with bounds further apart have none that mean something: they are those of the data type.
WIDEST_RANGE = 2**31 - 1
# A drawn vector: cells side by side, and the shortest side in pixels.
MOST_COLUMNS, SHORTEST_SIDE, SMALLEST_CELL = 16, 96, 12

Path = tuple[Any, ...]


def leaves(space: gymnasium.Space, path: Path = ()) -> Iterator[tuple[Path, gymnasium.Space]]:
    """Return the spaces inside nested Dicts and Tuples, each with the keys that lead to it."""
    if isinstance(space, spaces.Dict):
        parts: Iterable = space.spaces.items()
    elif isinstance(space, spaces.Tuple):
        parts = enumerate(space.spaces)
    else:
        yield path, space
        return
    for key, part in parts:
        yield from leaves(part, (*path, key))


def path_name(path: Path, root: str) -> str:
    """Return how a part of a space is called: `root`, `key`, `key.inner` or, in a Tuple, `root[0]`."""
    name = "" if path and isinstance(path[0], str) else root
    for key in path:
        name += f"[{key}]" if not isinstance(key, str) else f".{key}" if name else key
    return name


def indexed(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return a name for each element of an array: `name[0]`, `name[1,2]`, or `name` where there is only a number."""
    return [f"{name}[{','.join(map(str, index))}]" if index else name for index in np.ndindex(*shape)]


def short(space: Any) -> str:
    """Return the description of a space on one short line."""
    text = " ".join(str(space).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def pixel_scale(space: Any) -> float | None:
    """Return what turns the values of a Box into those of pixels, a factor; None if they are no pixels."""
    if space.dtype == np.uint8:
        return 1.0
    if not np.all(space.low == 0):
        return None
    return 255.0 if np.all(space.high == 1) else 1.0 if np.all(space.high == 255) else None


def picture_axes(space: gymnasium.Space) -> tuple[int, ...] | None:
    """Return the axes of a picture's height, width and, if it has three, channels; None if a space holds no pictures.

    Pictures are uint8, or bounded by 0..1 or 0..255, and at least 36×36. From 3×3 on, uint8 and bool of three
    dimensions are pictures too. Where two neighbouring dimensions are equal and the third is not, that one is the
    channels; else the smaller of the first and the last, and the last where these are equal.
    """
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3) or pixel_scale(space) is None:
        return None
    first, last = space.shape[0], space.shape[-1]
    if len(space.shape) == 2:
        axes: tuple[int, ...] = (0, 1)
    elif (space.shape[1] == last) != (space.shape[1] == first):
        axes = (1, 2, 0) if space.shape[1] == last else (0, 1, 2)
    else:
        axes = (1, 2, 0) if first < last else (0, 1, 2)
    is_grid = len(axes) == 3 and space.dtype in (np.uint8, np.bool_)
    smallest = SMALLEST_GRID if is_grid else SMALLEST_PICTURE
    return axes if min(space.shape[axes[0]], space.shape[axes[1]]) >= smallest else None


class FramePart:
    """The picture of an observation.

    Attributes:
        shape: (channels, height, width) of the frame.
    """

    def __init__(self, space: Any, name: str) -> None:
        """
        Args:
            space: of the pictures.
            name: what the picture is called in error messages.
        """
        self._name, self._declared, self._dtype = name, space.shape, space.dtype
        self._axes = picture_axes(space)
        height, width = (space.shape[axis] for axis in self._axes[:2])
        is_binary = space.dtype == np.uint8 and np.all(space.high == 1) and min(height, width) >= SMALLEST_PICTURE
        self._scale = 255.0 if is_binary else pixel_scale(space)
        self.shape = (space.shape[self._axes[2]] if len(self._axes) == 3 else 1, height, width)

    def __call__(self, value: Any) -> np.ndarray:
        """Return a copy of a picture as uint8 of shape (channels, height, width), channels last in memory."""
        picture = np.asarray(value)
        if picture.shape != self._declared:
            raise BrokenContract(f"{self._name} has the shape {picture.shape}, its space says {self._declared}")
        if picture.dtype != np.uint8 or self._scale != 1:
            picture = self._to_bytes(picture)
        picture = picture[:, :, None] if len(self._axes) == 2 else picture.transpose(self._axes)
        # Always a copy: environments may write their next observation into the same array.
        return np.array(picture, order="C").transpose(2, 0, 1)

    def _to_bytes(self, picture: np.ndarray) -> np.ndarray:
        allowed = "biu" if self._dtype == np.uint8 else "biuf"
        if picture.dtype.kind not in allowed:
            raise BrokenContract(f"{self._name} is {picture.dtype}, its space says {self._dtype}")
        pixels = np.rint(picture * self._scale)
        if not (pixels.min() >= 0 and pixels.max() <= 255):  # NaN included
            raise BrokenContract(f"{self._name} holds values outside of its bounds, or NaN")
        return pixels.astype(np.uint8)


class OneHotPart:
    """Choices of a vector: Discrete and MultiDiscrete of any shape and start, one-hot.

    Attributes:
        size: number of entries of the vector.
    """

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete, name: str) -> None:
        """
        Args:
            space: Discrete or MultiDiscrete.
            name: what the part is called.
        """
        self._name = name
        self._choices = np.atleast_1d(np.asarray(getattr(space, "nvec", getattr(space, "n", None)))).ravel()
        self._starts = np.broadcast_to(np.ravel(getattr(space, "start", 0)), self._choices.shape)
        self._offsets = np.cumsum(self._choices) - self._choices
        self._names = indexed(name, space.shape)
        self.size = int(self._choices.sum())

    def names(self) -> list[str]:
        """Return what each entry is: `name=2`, `name[0]=2`."""
        triples = zip(self._names, self._starts, self._choices, strict=True)
        return [f"{name}={start + choice}" for name, start, choices in triples for choice in range(choices)]

    def write(self, value: Any, out: np.ndarray) -> None:
        """Write the entries into `out`, shape (size,), which holds zeros."""
        chosen = np.asarray(value).ravel()
        if chosen.shape != self._choices.shape or chosen.dtype.kind not in "biuf":
            raise BrokenContract(f"{self._name} is {shorten(value)}, should be {len(self._choices)} whole number(s)")
        chosen = chosen.astype(np.int64) - self._starts
        if (chosen < 0).any() or (chosen >= self._choices).any():
            raise BrokenContract(f"{self._name} is {shorten(value)}, which its space does not contain")
        out[self._offsets + chosen] = 1.0


class NumbersPart:
    """Numbers of a vector: Box of any shape and type, and MultiBinary; whole numbers with bounds are brought to 0..1.

    Attributes:
        size: number of entries of the vector.
    """

    def __init__(self, space: spaces.Box | spaces.MultiBinary, name: str) -> None:
        """
        Args:
            space: Box or MultiBinary.
            name: what the part is called.
        """
        self._name, self._shape = name, space.shape
        self.size = math.prod(space.shape)
        self._low: np.ndarray | None = None
        if isinstance(space, spaces.Box) and space.dtype.kind in "biu":
            low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
            if self.size and (high - low).max() < WIDEST_RANGE:
                self._low, self._range = low, np.maximum(high - low, 1.0)

    def names(self) -> list[str]:
        """Return what each entry is: `name[0]`, `name[1,2]`, or `name` where there is only one number."""
        return indexed(self._name, self._shape)

    def write(self, value: Any, out: np.ndarray) -> None:
        """Write the entries into `out`, shape (size,)."""
        numbers = np.asarray(value)
        if numbers.dtype.kind not in "biuf":
            raise BrokenContract(f"{self._name} is {shorten(value)}, should be numbers")
        if numbers.shape != self._shape and not numbers.size == self.size == 1:
            raise BrokenContract(f"{self._name} has the shape {numbers.shape}, its space says {self._shape}")
        numbers = numbers.ravel()
        out[:] = numbers if self._low is None else (numbers.astype(np.float64) - self._low) / self._range


def shorten(value: Any) -> str:
    """Return a value on one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


class Observer:
    """Turns what an environment shows into a frame, a vector or both.

    Attributes:
        frame_shape: (channels, height, width) of the frame, None if there is none.
        size: number of entries of the vector, 0 if there is none.
    """

    def __init__(self, space: gymnasium.Space, observe: list[str] | None = None) -> None:
        """
        Args:
            space: the environment's observation space.
            observe: the entries of a Dict to be seen, None for all of them.

        Raises:
            ValueError: if a space can be neither, or an entry does not exist; the message says what helps.
        """
        space = space if observe is None else chosen_entries(space, observe)
        self._frame: tuple[Path, FramePart] | None = None
        self._parts: list[tuple[Path, OneHotPart | NumbersPart]] = []
        found = list(leaves(space))
        pictures = [path for path, part in found if picture_axes(part)]
        if len(pictures) > 1:
            named = ", ".join(path_name(path, "observation") for path in pictures)
            raise ValueError(
                f"it has {len(pictures)} pictures, {named}: choose one, and what else is to be seen, with `observe`"
            )
        for path, part in found:
            name = path_name(path, "observation")
            if path in pictures:
                self._frame = path, FramePart(part, name)
            else:
                others = [key for key in space.spaces if key != path[0]] if isinstance(space, spaces.Dict) else []
                self._parts.append((path, vector_part(part, name, others)))
        self.frame_shape = None if self._frame is None else self._frame[1].shape
        self.size = sum(part.size for _, part in self._parts)
        if self.frame_shape is None and self.size == 0:
            raise ValueError("there is nothing in it to be seen")

    def names(self) -> list[str]:
        """Return what each entry of the vector is."""
        return [name for _, part in self._parts for name in part.names()]

    def frame(self, observation: Any) -> np.ndarray:
        """Return the frame of an observation, a copy of shape `frame_shape`."""
        path, part = self._frame
        return part(entry(observation, path))

    def write_vector(self, observation: Any, out: np.ndarray) -> None:
        """Write the vector of an observation into `out`, shape (size,), which holds zeros."""
        first = 0
        for path, part in self._parts:
            part.write(entry(observation, path), out[first : first + part.size])
            first += part.size


def entry(value: Any, path: Path) -> Any:
    """Return the part of a nested value to which keys lead."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise BrokenContract(f"observation has no entry {key!r}: {shorten(value)}") from None
    return value


def chosen_entries(space: gymnasium.Space, observe: list[str]) -> spaces.Dict:
    """Return a Dict space without the entries that are not to be seen.

    Raises:
        ValueError: if the space is no Dict, or has no such entry.
    """
    if not isinstance(space, spaces.Dict):
        raise ValueError("observe: there is nothing to choose from, because it is not a Dict")
    there = ", ".join(map(str, space.spaces))
    if not observe:
        raise ValueError(f"observe: [] leaves nothing to be seen; there are {there}")
    for key in observe:
        if key not in space.spaces:
            raise ValueError(f"observe: {key!r} is not there; there are {there}")
    # Pairs keep the space's order, which a mapping would lose: it is sorted.
    return spaces.Dict([(key, part) for key, part in space.spaces.items() if key in observe])


def vector_part(space: gymnasium.Space, name: str, others: list) -> OneHotPart | NumbersPart:
    """Return what turns a part of observations into entries of the vector.

    Args:
        space: of the part.
        name: what the part is called.
        others: the entries beside it that `observe` can name, if the observation is a Dict.

    Raises:
        ValueError: if there is nothing that does.
    """
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return OneHotPart(space, name)
    is_stack = isinstance(space, spaces.Box) and len(space.shape) > 3 and sorted(space.shape)[-2] >= SMALLEST_PICTURE
    if is_stack and pixel_scale(space) is not None:
        raise ValueError(
            f"{name} {space.shape} is a stack of pictures with channels: make them grey before they are stacked "
            "(GrayscaleObservation, then FrameStackObservation), or stack them along their channels"
        )
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return NumbersPart(space, name)
    kind = "text" if getattr(space.dtype, "kind", "") == "U" or isinstance(space, spaces.Text) else type(space).__name__
    way_out = f"leave it out by `observe: [{', '.join(map(str, others))}]`" if others else "wrap it in numbers"
    raise ValueError(f"{name} is {kind}, which cannot be seen: {way_out}")


class Actor:
    """Turns branches of choices, or numbers, into the actions of an environment.

    Attributes:
        space: Discrete or MultiDiscrete, both from 0, or float32 Box (n,) without bounds.
        branches: how many actions each branch has; empty for numbers.
        size: entries that `features` writes.
        bounds: lowest and highest (n,) of numbers; None where there are branches.
    """

    bounds: tuple[np.ndarray, np.ndarray] | None = None

    def __init__(self, space: gymnasium.Space) -> None:
        """
        Args:
            space: the environment's action space.

        Raises:
            ValueError: if it mixes choices and numbers, or holds anything else.
        """
        self._own = space
        self._leaves = [part for _, part in leaves(space)]
        self.branches: tuple[int, ...] = ()
        if self._leaves and all(isinstance(part, spaces.Box) for part in self._leaves):
            self.size = sum(math.prod(part.shape) for part in self._leaves)
            self.space: gymnasium.Space = spaces.Box(-np.inf, np.inf, (self.size,), np.float32)
            low, high = (
                np.concatenate([np.ravel(getattr(part, end)).astype(np.float64) for part in self._leaves])
                for end in ("low", "high")
            )
            self._whole = np.concatenate(
                [np.full(math.prod(part.shape), part.dtype.kind in "iu") for part in self._leaves]
            )
            # The largest numbers of 64 bits are none of a float, which would be the next one beyond.
            self.bounds = low, np.where(self._whole & (high >= 2.0**63), np.nextafter(high, 0), high)
        else:
            self.branches = tuple(count for part in self._leaves for count in branch_sizes(part))
            self.size = sum(self.branches)
            self.space = spaces.MultiDiscrete(np.array(self.branches, dtype=np.int64))
            if isinstance(space, spaces.Discrete):
                self.space = spaces.Discrete(self.branches[0])
        if self.size == 0:
            raise ValueError("there is nothing in it to choose from")
        self._offsets = np.cumsum(self.branches, dtype=np.int64) - np.array(self.branches, dtype=np.int64)

    def names(self, root: str) -> list[str]:
        """Return what each entry of `features` is: `root=1`, `root[0]=1`, or `root[0]` where actions are numbers."""
        if not self.branches:
            return indexed(root, (self.size,))
        names = [root] if isinstance(self.space, spaces.Discrete) else indexed(root, (len(self.branches),))
        return [f"{name}={c}" for name, count in zip(names, self.branches, strict=True) for c in range(count)]

    def features(self, action: Any, out: np.ndarray) -> None:
        """Write an action into `out`, shape (size,), which holds zeros: one-hot per branch, or numbers as passed on."""
        if self.branches:
            out[self._offsets + np.asarray(action, dtype=np.int64).reshape(len(self.branches))] = 1.0
        else:
            out[:] = self._clipped(action)

    def action(self, action: Any) -> Any:
        """Return the environment's own action.

        Args:
            action: shape (branches,) or, for numbers, (n,); an int where there is only one branch.
        """
        flat = np.asarray(action).reshape(len(self.branches)) if self.branches else self._clipped(action)
        return rebuilt(self._own, iter(flat))

    def mask(self, mask: Any) -> np.ndarray:
        """Return a mask of allowed actions as bool (sum of branches,), branch after branch.

        Args:
            mask: an array over all of them, or nested as the environment's action space is.

        Raises:
            BrokenContract: if it has another length, or if a branch has no allowed action.
        """
        flat = np.array(list(flat_values(mask, self._own)), dtype=bool)
        if len(flat) != self.size:
            raise BrokenContract(f"action_mask has {len(flat)} entries, there are {self.size} actions: {self.branches}")
        if not np.logical_or.reduceat(flat, self._offsets).all():
            raise BrokenContract(f"action_mask allows no action{' of a branch' * (len(self.branches) > 1)}")
        return flat

    def _clipped(self, action: Any) -> np.ndarray:
        clipped = np.clip(np.asarray(action, dtype=np.float64).reshape(self.size), *self.bounds)
        return np.where(self._whole, np.rint(clipped), clipped)


def branch_sizes(space: gymnasium.Space) -> list[int]:
    """Return how many choices there are in each place of a discrete action space.

    Raises:
        ValueError: if the space is another one.
    """
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.ravel().tolist()
    if isinstance(space, spaces.MultiBinary):
        return [2] * math.prod(space.shape)
    if isinstance(space, spaces.Box):
        raise ValueError("choices and numbers (Box) together are not supported: wrap it so that it has one of them")
    raise ValueError(f"{type(space).__name__} is not supported: wrap it in Discrete, MultiDiscrete, MultiBinary or Box")


def rebuilt(space: gymnasium.Space, flat: Iterator) -> Any:
    """Return an action as its space has it.

    Args:
        space: the environment's own action space.
        flat: choices from 0, or numbers, as many as the space takes.
    """
    if isinstance(space, spaces.Dict):
        return {key: rebuilt(part, flat) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(rebuilt(part, flat) for part in space.spaces)
    if isinstance(space, spaces.Discrete):
        return int(next(flat)) + int(space.start)
    values = np.array([next(flat) for _ in range(math.prod(space.shape))]).reshape(space.shape)
    return np.asarray(values.astype(space.dtype) + getattr(space, "start", 0), dtype=space.dtype)


def flat_values(mask: Any, space: gymnasium.Space | None = None) -> Iterator:
    """Return the values inside nested sequences and, in the order of the space, mappings."""
    if isinstance(mask, Mapping):
        parts = space.spaces if isinstance(space, spaces.Dict) else {}
        if set(parts) != set(mask):
            raise BrokenContract(f"action_mask has the entries {list(mask)}, the action space {list(parts)}")
        for key, part in parts.items():
            yield from flat_values(mask[key], part)
    elif isinstance(mask, list | tuple):
        inner = (
            space.spaces if isinstance(space, spaces.Tuple) and len(space.spaces) == len(mask) else [None] * len(mask)
        )
        for value, part in zip(mask, inner, strict=True):
            yield from flat_values(value, part)
    else:
        yield from np.asarray(mask).ravel()


def hidden_entries(hide: Iterable[int | str], size: int) -> np.ndarray:
    """Return which entries of a vector are to be hidden.

    Args:
        hide: indices and slices such as "2:4", "2:" or ":4"; they count from the end where they are below 0.
        size: number of entries of the vector.

    Returns:
        Indices, int64, sorted.

    Raises:
        ValueError: if one is none of these, or beyond the vector.
    """
    hidden: set[int] = set()
    for item in hide:
        ends = re.fullmatch(r"(-?\d+)?:(-?\d+)?|(-?\d+)", str(item))
        if ends is None:
            raise ValueError(f"hide: {item!r} is not allowed; expected an index, or a slice such as '2:4'")
        first = int(ends[3] or ends[1] or 0)
        last = first if ends[3] else int(ends[2] or size) - 1
        first, last = (place + size * (place < 0) for place in (first, last))
        if not 0 <= first <= last < size:
            raise ValueError(f"hide: {item!r} is out of range; the vector has {size} entries, 0 to {size - 1}")
        hidden.update(range(first, last + 1))
    return np.array(sorted(hidden), dtype=np.int64)


def as_picture(rendered: Any, name: str = "the environment") -> np.ndarray:
    """Return whatever an environment's `render` returned as a picture.

    Args:
        rendered: grey, RGB or RGBA, of bytes, whole numbers, bools or floats (0..1 or 0..255), channels first or last,
            as an array or nested lists; of several pictures the last is taken.
        name: what the environment is called in the error message.

    Returns:
        Picture of shape (height, width, 3), uint8, a copy.

    Raises:
        BrokenContract: if it is no picture.
    """
    picture = last_picture(rendered)
    if picture is None or picture.size == 0 or picture.dtype.kind not in "biuf":
        what = shorten(rendered) if picture is None or picture.dtype.kind not in "biuf" else f"shape {picture.shape}"
        raise BrokenContract(f"{name}: render returned {what}, should be a picture (height, width, 3)")
    if picture.dtype != np.uint8:
        low, high = picture.min(), picture.max()
        if not (low >= 0 and high <= 255):  # NaN included
            raise BrokenContract(f"{name}: render returned values from {low} to {high}, should be 0..255 or 0..1")
        is_share = picture.dtype.kind == "b" or (picture.dtype.kind == "f" and high <= 1)
        picture = np.rint(picture * (255.0 if is_share else 1.0)).astype(np.uint8)
    # Grey with a share of opacity, and RGBA: only the colours are looked at.
    channels = picture[:, :, :1].repeat(3, axis=2) if picture.shape[2] <= 2 else picture[:, :, :3]
    return np.array(channels, order="C")


def last_picture(rendered: Any) -> np.ndarray | None:
    """Return the last picture in what was rendered, (height, width, 1 to 4) of any type; None if there is none."""
    if rendered is None or isinstance(rendered, str | bytes | Mapping):
        return None
    if isinstance(rendered, list | tuple) and rendered and np.ndim(getattr(rendered[-1], "shape", None) or 0) == 1:
        last = np.asarray(rendered[-1])
        if last.ndim >= 2:
            return last_picture(last)
    try:
        picture = np.asarray(rendered)
    except ValueError:  # nested sequences of different lengths
        return None
    if picture.ndim == 4:
        picture = picture[-1] if len(picture) else picture[0:0, :, :, 0].reshape(0, 0, 0)
    if picture.ndim == 2:
        return picture[:, :, None]
    if picture.ndim != 3:
        return None
    if 1 <= picture.shape[2] <= 4:
        return picture
    return picture.transpose(1, 2, 0) if picture.shape[0] in (1, 3, 4) else None


def frame_picture(frame: np.ndarray) -> np.ndarray:
    """Return a frame of any number of channels as a picture that can be looked at.

    Stacks show their newest picture: the last three channels where their number is a multiple of three, else the last
    one. Small grids, whose numbers are rather kinds than brightness, are brought to the full range.

    Args:
        frame: (channels, height, width), uint8.

    Returns:
        Picture of shape (height, width, 3), uint8, a copy.
    """
    shown = frame[-3:] if len(frame) % 3 == 0 else frame[-1:].repeat(3, axis=0)
    if min(frame.shape[1:]) < SMALLEST_PICTURE:
        shown = shown * np.uint8(255 // max(int(shown.max()), 1))
    return np.array(shown.transpose(1, 2, 0), order="C")


def vector_picture(vector: np.ndarray) -> np.ndarray:
    """Return a vector as a picture, for environments that draw none: a cell for each entry, black over grey to white.

    Args:
        vector: (n,), float32.

    Returns:
        Picture of shape (height, width, 3), uint8.
    """
    columns = min(len(vector), MOST_COLUMNS)
    rows = -(-len(vector) // columns)
    cell = max(SMALLEST_CELL, -(-SHORTEST_SIDE // min(rows, columns)))
    cells = np.zeros(rows * columns)
    cells[: len(vector)] = np.nan_to_num(vector)
    # 0 is grey, ±1 is three quarters of the way to white and black, however large an entry gets.
    grey = np.uint8(127.5 + 127.5 * np.tanh(cells)).reshape(rows, columns)
    picture = grey.repeat(cell, axis=0).repeat(cell, axis=1)
    picture[cell - 1 :: cell], picture[:, cell - 1 :: cell] = 255, 255
    return picture[:, :, None].repeat(3, axis=2)
