"""Learning curves that others have published, to be drawn beside one's own."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import UserError, reason_of

NUMBERS = ("steps", "mean", "std_over_runs", "iqm_over_episodes", "runs")
COLUMNS = ("environment", "task", "run", "metric", *NUMBERS)


@dataclass(frozen=True)
class Reference:
    """One published curve, an entry for each of n numbers of environment steps, in order."""

    name: str  # task/run
    steps: np.ndarray
    mean: np.ndarray  # over runs
    std: np.ndarray  # of the runs
    iqm: np.ndarray  # over the episodes of all runs
    runs: np.ndarray  # how many

    def plot(self, axes, statistic: str) -> None:
        """Draw the curve; its deviation is one of means and no band around an interquartile mean."""
        is_mean = statistic == "mean"
        label = f"{self.name} (published, {self.runs[0]:.0f} runs{' ± std' * is_mean})"
        (line,) = axes.plot(self.steps, self.mean if is_mean else self.iqm, ".--", label=label)
        if is_mean:
            low, high = self.mean - self.std, self.mean + self.std
            axes.fill_between(self.steps, low, high, color=line.get_color(), alpha=0.1, linewidth=0)


def read_references(texts: list[str], metric: str, tasks: Sequence[str]) -> list[Reference]:
    """Return the curves that --reference names, each `<file>:<task>/<run>`, several of them separated by commas.

    Args:
        texts: one per --reference; after a comma, a curve without a file is of the same file.
        metric: what they have to be of.
        tasks: names of the environments that they may be of.

    Raises:
        UserError: if there is no such file or curve, or it is of something else.
    """
    references = []
    for text in texts:
        file = ""
        for part in text.split(","):
            before, _, name = part.strip().rpartition(":")
            file = before or file
            if not file or not name:
                raise UserError(f"--reference: {part!r} should be <file>:<task>/<run>")
            references.append(_curve(Path(file), name, metric, tasks))
    return references


def _curve(path: Path, name: str, metric: str, tasks: Sequence[str]) -> Reference:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{column: row[column] for column in COLUMNS} for row in csv.DictReader(file)]
        rows = [row for row in rows if row["environment"] in tasks and row["metric"] == metric]
        own = [row for row in rows if f"{row['task']}/{row['run']}" == name]
        numbers = np.array(sorted([float(row[column]) for column in NUMBERS] for row in own))
    except KeyError as error:
        raise UserError(f"--reference: {path}: should have the columns {', '.join(COLUMNS)}") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"--reference: {path}: {reason_of(error)}") from error
    if not own:
        there = ", ".join(dict.fromkeys(f"{row['task']}/{row['run']}" for row in rows)) or "none"
        raise UserError(f"--reference: {path}: of {metric} in {', '.join(dict.fromkeys(tasks))} it has {there}")
    return Reference(name, *numbers.T)
