"""Learning curves that others have published, to be drawn beside one's own."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import UserError, reason_of

# The curve of a file that a row belongs to, by these; then its numbers.
NAMES = ("environment", "task", "run", "metric")
NUMBERS = ("steps", "mean", "std_over_runs", "iqm_over_episodes", "runs")


@dataclass(frozen=True)
class Reference:
    """One published curve.

    Attributes:
        name: task/run.
        environment: name of the task that they were trained on.
        steps: environment steps of training, in order.
        mean: over runs at these steps.
        std: of the runs.
        iqm: over the episodes of all runs.
        runs: how many runs.
    """

    name: str
    environment: str
    steps: list[float]
    mean: list[float]
    std: list[float]
    iqm: list[float]
    runs: int


def read_references(texts: list[str], metric: str) -> list[Reference]:
    """Return the curves that --reference names, each `<file>:<task>/<run>`, several of them separated by commas.

    Args:
        texts: one per --reference; after a comma, a curve without a file is of the same file.
        metric: what they have to be of.

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
            references.append(_curve(Path(file), name, metric))
    return references


def check_task(references: Sequence[Reference], tasks: Sequence[str]) -> None:
    """Raise UserError where a published curve is of a task that is not among those that are plotted."""
    for reference in references:
        if reference.environment not in tasks:
            raise UserError(f"--reference: {reference.name} is of {reference.environment}; the models are of "
                            f"{', '.join(dict.fromkeys(tasks))}")  # fmt: skip


def _curve(path: Path, name: str, metric: str) -> Reference:
    curves: dict[tuple[str, str], dict[str, list[list[float]]]] = {}  # (name, metric) → environment → rows of numbers
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                environment, task, run, kind = (row[column] for column in NAMES)
                numbers = [float(row[column]) for column in NUMBERS]
                curves.setdefault((f"{task}/{run}", kind), {}).setdefault(environment, []).append(numbers)
    except KeyError as error:
        raise UserError(f"--reference: {path}: should have the columns {', '.join(NAMES + NUMBERS)}") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"--reference: {path}: {reason_of(error)}") from error
    if (name, metric) not in curves:
        there = ", ".join(f"{name} ({metric})" for name, metric in curves)
        raise UserError(f"--reference: {path}: has no {name} of {metric}; there are {there}")
    ((environment, rows),) = curves[name, metric].items()
    steps, mean, std, iqm, runs = np.transpose(sorted(rows)).tolist()
    return Reference(name, environment, steps, mean, std, iqm, int(runs[0]))
