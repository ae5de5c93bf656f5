"""Learning curves that others have published, to be drawn beside one's own."""

import numpy as np

from utils import UserError, reason_of

COLUMNS = ("environment", "task", "run", "metric", "steps", "mean", "std_over_runs", "iqm_over_episodes", "runs")


def read_references(texts: list[str], metric: str, tasks: list[str]) -> dict[str, np.ndarray]:
    """Return the curves that --reference names, each `<file>:<task>/<run>`, several of them separated by commas.

    Args:
        texts: one per --reference; after a comma, a curve without a file is of the same file.
        metric: what they have to be of.
        tasks: names of the environments that they may be of.

    Returns:
        By task/run, rows (n,) of `COLUMNS`, in order of steps.

    Raises:
        UserError: if there is no such file or curve, or it is of something else.
    """
    curves = {}
    for text in texts:
        file = ""
        for part in text.split(","):
            before, _, name = part.strip().rpartition(":")
            file = before or file
            if not file or not name:
                raise UserError(f"--reference: {part!r} should be <file>:<task>/<run>")
            try:
                rows = np.genfromtxt(file, delimiter=",", names=True, dtype=None, encoding="utf-8")[[*COLUMNS]]
            except (OSError, ValueError, KeyError, IndexError) as error:
                columns = f"should have the columns {', '.join(COLUMNS)}"
                raise UserError(f"--reference: {file}: {columns} ({reason_of(error)})") from error
            rows = rows[(rows["metric"] == metric) & np.isin(rows["environment"], tasks)]
            names = np.array([f"{row['task']}/{row['run']}" for row in rows])
            if name not in names:
                there = ", ".join(dict.fromkeys(names)) or "none"
                raise UserError(f"--reference: {file}: of {metric} in {', '.join(dict.fromkeys(tasks))} it has {there}")
            curves[name] = np.sort(rows[names == name], order="steps")
    return curves
