"""Learning curves that others have published, to be drawn beside one's own."""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import UserError, reason_of

COLUMNS = ("task", "run", "metric", "steps", "mean", "std_over_runs", "iqm_over_episodes", "runs")


@dataclass(frozen=True)
class Reference:
    """One published curve.

    Attributes:
        name: task/run.
        steps: environment steps of training, in order.
        mean: over runs at these steps.
        std: of the runs.
        iqm: over the episodes of all runs.
        runs: how many runs.
        environment: name of the task that they were trained on, None where the file has no such column.
    """

    name: str
    steps: list[float]
    mean: list[float]
    std: list[float]
    iqm: list[float]
    runs: int
    environment: str | None = None


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
        if reference.environment is None:
            print(f"--reference: whether {reference.name} is of the same task is not known: its file has no column "
                  "environment", file=sys.stderr)  # fmt: skip
        elif reference.environment not in tasks:
            raise UserError(f"--reference: {reference.name} is of {reference.environment}; the models are of "
                            f"{', '.join(dict.fromkeys(tasks))}")  # fmt: skip


def _curve(path: Path, name: str, metric: str) -> Reference:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        others = ", ".join(sorted(map(str, path.parent.glob("*.csv")))) or "none"
        raise UserError(f"--reference: {path}: {reason_of(error)}; files there: {others}") from error
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise UserError(f"--reference: {path}: should have the columns {', '.join(COLUMNS)}")
    metrics: dict[str, list[str]] = {}
    for row in rows:
        metrics.setdefault(f"{row['task']}/{row['run']}", []).append(row["metric"])
    if metric not in metrics.get(name, []):
        has = f"is of {' and '.join(dict.fromkeys(metrics[name]))}; --metric is {metric}" if name in metrics else (
            f"is not there; there are {', '.join(metrics)}"
        )  # fmt: skip
        raise UserError(f"--reference: {path}: {name} {has}")
    chosen = [row for row in rows if (f"{row['task']}/{row['run']}", row["metric"]) == (name, metric)]
    try:
        numbers = sorted([float(row[column]) for column in COLUMNS[3:]] for row in chosen)
        if not np.isfinite(numbers).all():
            raise ValueError("nan and inf are none")
    except (TypeError, ValueError) as error:
        raise UserError(f"--reference: {path}: {name}: the columns from steps on should be numbers: {error}") from error
    steps, mean, std, iqm, runs = map(list, zip(*numbers, strict=True))
    return Reference(name, steps, mean, std, iqm, int(runs[0]), chosen[0].get("environment"))
