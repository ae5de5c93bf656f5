"""Learning curves that others have published, to be drawn beside one's own."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils import UserError, reason_of

NUMBERS = ("steps", "mean", "std_over_runs", "iqm_over_episodes", "runs")
COLUMNS = ("environment", "task", "run", "metric", *NUMBERS)


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
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        curves = {(f"{row['task']}/{row['run']}", row["metric"]): row["environment"] for row in rows}
        own = [row for row in rows if (f"{row['task']}/{row['run']}", row["metric"]) == (name, metric)]
        numbers = sorted([float(row[column]) for column in NUMBERS] for row in own)
    except KeyError as error:
        raise UserError(f"--reference: {path}: should have the columns {', '.join(COLUMNS)}") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"--reference: {path}: {reason_of(error)}") from error
    if not numbers:
        there = ", ".join(f"{name} ({metric})" for name, metric in curves)
        raise UserError(f"--reference: {path}: has no {name} of {metric}; there are {there}")
    steps, mean, std, iqm, runs = map(list, zip(*numbers, strict=True))
    return Reference(name, curves[name, metric], steps, mean, std, iqm, round(runs[0]))
