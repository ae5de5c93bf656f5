"""What episodes report: numbers under clean names, whatever a task puts into its infos, and their means."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# What the program itself says of an episode; a task's own number of that name goes by another, `info_reward`.
COUNTED = ("reward", "length")
PLAYED = ("seed", "repetition", "cut")
# The longest name of a number, and how deep in nested dictionaries numbers are looked for.
NAME_LENGTH, DEPTH = 64, 8


def task_numbers(info: Any) -> dict[str, float]:
    """Return the numbers in a task's own info, to which reward and length as counted here can be added."""
    return _clean(info, COUNTED + PLAYED)


def episode_numbers(info: Any) -> dict[str, float]:
    """Return the numbers in the info that an environment of this package gives at the end of an episode.

    Numbers are bools, NumPy scalars, arrays and tensors of one element, too. Those in nested dictionaries are named by
    their path, `score/left`. Whatever else there is, NaN and infinity included, is left out. Names keep letters,
    digits, `_`, `-`, `.` and `/`, which TensorBoard and spreadsheets can take, and have 64 characters at most.

    Args:
        info: a dictionary, or anything else, which holds no numbers.
    """
    return _clean(info, PLAYED)


def _clean(info: Any, reserved: tuple[str, ...]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for key, name, value in _leaves(info, (), DEPTH):
        number = _number(value)
        if number is None or key == ("action_mask",):  # that of one action looks like a number
            continue
        name = f"info_{name}" if name in reserved else name
        numbers[_distinct(name, key) if name in numbers or len(name) > NAME_LENGTH else name] = number
    return numbers


def _leaves(info: Any, path: tuple, depth: int) -> list[tuple[tuple, str, Any]]:
    """Return (path, clean name, value) of all that lies in nested dictionaries, which may contain themselves."""
    if not isinstance(info, Mapping) or depth == 0:
        return []
    found = []
    for key, value in info.items():
        inner = (*path, key)
        if isinstance(value, Mapping):
            found += _leaves(value, inner, depth - 1)
        else:
            found.append((inner, _clean_name("/".join(map(str, inner))), value))
    return found


def _clean_name(name: str) -> str:
    return re.sub(r"/+", "/", re.sub(r"[^\w./-]+", "_", name)).strip("/") or "_"


def _distinct(name: str, key: tuple) -> str:
    """Return a name that is short enough and that no other key has: its beginning and a digest of the key."""
    digest = hashlib.sha256(repr(key).encode(errors="replace")).hexdigest()[:8]
    return f"{name[: NAME_LENGTH - 9]}_{digest}"


def _number(value: Any) -> float | None:
    """Return a single finite number as a float, None for anything else."""
    try:
        if hasattr(value, "item"):  # of NumPy or any library of tensors; fails where there are several elements
            value = value.item()
        number = float(value) if hasattr(value, "__float__") else math.nan
    except Exception:  # whatever a task's own objects do when they are asked
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class EpisodeMean:
    """What a number comes to over some episodes.

    Attributes:
        mean: over the episodes that report it.
        std: their standard deviation.
        reported: how many report it.
        episodes: how many there are.
    """

    mean: float
    std: float
    reported: int
    episodes: int

    @property
    def note(self) -> str:
        """Say how many episodes report it, where some do not."""
        return "" if self.reported == self.episodes else f"in {self.reported:,} of {self.episodes:,} episodes"


def count_missing_success(episodes: Sequence[dict[str, float]]) -> None:
    """Set `success` to 0 where an episode lacks it, if any of them reports it: some tasks say only that it is there.

    Whoever forgets episodes should call this before, so that the successes that go by leave that knowledge behind.

    Args:
        episodes: of one task; changed in place.
    """
    if any("success" in episode for episode in episodes):
        for episode in episodes:
            episode.setdefault("success", 0.0)


def metrics_of(episodes: Sequence[dict[str, float]]) -> list[str]:
    """Return the names of what any episode reports; reward, success and length come first."""
    names = {name: None for episode in episodes for name in episode if name not in PLAYED}
    first = [name for name in ("reward", "success", "length") if name in names]
    return first + [name for name in names if name not in first]


def episode_means(episodes: Sequence[dict[str, float]]) -> dict[str, EpisodeMean]:
    """Return the mean of every number that any of the episodes reports; success counts as 0 where it is missing.

    Args:
        episodes: of one task, each with what `episode_numbers` found.
    """
    means = {}
    for name in metrics_of(episodes):
        values = [episode[name] for episode in episodes if name in episode]
        values = [value for value in values if math.isfinite(value)]
        if name == "success":
            values += [0.0] * (len(episodes) - len(values))
        if values:
            with np.errstate(over="ignore", invalid="ignore"):  # a task may report 1e308
                mean, std = float(np.mean(values)), float(np.std(values))
            means[name] = EpisodeMean(mean, std, len(values), len(episodes))
    return means


def episode_scalars(episodes: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return `episode_means` by TensorBoard tag.

    The tags are `episode/<name>_mean`, `_std` for reward and length, and, where some episodes lack a number, `_share`:
    how many of them report it, as a share.
    """
    scalars = {}
    for name, found in episode_means(episodes).items():
        scalars[f"episode/{name}_mean"] = found.mean
        if name in COUNTED:
            scalars[f"episode/{name}_std"] = found.std
        if found.reported < found.episodes:
            scalars[f"episode/{name}_share"] = found.reported / found.episodes
    return scalars
