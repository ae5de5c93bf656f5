"""What episodes report: numbers under clean names, whatever a task puts into its infos, and their means."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# What the program itself says of an episode; a task's own number of that name goes by another, `info_reward`.
COUNTED = ("reward", "length")
PLAYED = ("seed", "repetition", "cut")


def task_numbers(info: Any) -> dict[str, float]:
    """Return the finite numbers in a task's own info, a dictionary or None; those in nested ones as `score/left`.

    Names keep what TensorBoard and spreadsheets can take; `is_success` is called `success`.
    """
    numbers = {}
    for path, value in _leaves(info or {}):
        number = _number(value)
        if number is not None and path != "action_mask":  # that of one action looks like a number
            name = "success" if path == "is_success" else re.sub(r"[^\w./-]+", "_", path)
            numbers[f"info_{name}" if name in COUNTED + PLAYED else name[:64]] = number
    return numbers


def _leaves(info: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of all that lies in nested dictionaries."""
    for key, value in info.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


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
    """Mean and standard deviation of a number over those of some episodes that report it."""

    mean: float
    std: float
    reported: int
    episodes: int


def count_missing_success(episodes: Sequence[dict[str, float]]) -> None:
    """Set `success` to 0 where an episode lacks it, if any of the task reports it: some tell only successes.

    Whoever forgets episodes should call this before, so that what they knew of successes stays.
    """
    if any("success" in episode for episode in episodes):
        for episode in episodes:
            episode.setdefault("success", 0.0)


def metrics_of(episodes: Sequence[dict[str, float]]) -> list[str]:
    """Return the names of what any episode reports; reward, success and length come first."""
    names = {name: None for episode in episodes for name in episode if name not in PLAYED}
    return [name for name in dict.fromkeys(("reward", "success", "length", *names)) if name in names]


def episode_means(episodes: Sequence[dict[str, float]]) -> dict[str, EpisodeMean]:
    """Return the mean of every number that any of the episodes reports; success counts as 0 where it is missing."""
    means = {}
    for name in metrics_of(episodes):
        values = [episode[name] for episode in episodes if name in episode]
        if name == "success":
            values += [0.0] * (len(episodes) - len(values))
        mean, std = float(np.mean(values)), float(np.std(values, ddof=min(1, len(values) - 1)))
        means[name] = EpisodeMean(mean, std, len(values), len(episodes))
    return means


def episode_scalars(episodes: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the means by TensorBoard tag, of reward and length deviations too, and shares of episodes that report."""
    scalars = {}
    for name, found in episode_means(episodes).items():
        scalars[f"episode/{name}_mean"] = found.mean
        if name in COUNTED:
            scalars[f"episode/{name}_std"] = found.std
        if found.reported < found.episodes:
            scalars[f"episode/{name}_share"] = found.reported / found.episodes
    return scalars
