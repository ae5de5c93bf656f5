"""Learning curves that others have published, to be drawn beside one's own."""

import numpy as np

from utils import UserError, reason_of

COLUMNS = ("environment", "task", "run", "metric", "steps", "mean", "std_over_runs", "iqm_over_episodes", "runs")


def read_references(texts: list[str], metric: str, tasks: list[str]) -> dict[str, np.ndarray]:
    """Return the curves of a metric that --reference names, each text `<file>:<task>/<run>,<task>/<run>…`.

    They are rows (n,) of `COLUMNS` in order of steps, by task/run; UserError where `tasks` have no such curve.
    """
    curves = {}
    for text in texts:
        file, _, names = text.rpartition(":")
        try:
            rows = np.genfromtxt(file, delimiter=",", names=True, dtype=None, encoding="utf-8")[[*COLUMNS]]
        except (OSError, ValueError, KeyError, IndexError) as error:
            wanted = f"<file>:<task>/<run>,… of a file with the columns {', '.join(COLUMNS)}"
            raise UserError(f"--reference: {text!r} should be {wanted} ({reason_of(error)})") from error
        rows = rows[(rows["metric"] == metric) & np.isin(rows["environment"], tasks)]
        known = np.array([f"{row['task']}/{row['run']}" for row in rows])
        for name in map(str.strip, names.split(",")):
            if name not in known:
                there = ", ".join(dict.fromkeys(known)) or "nothing"
                tried = f"{metric} in {', '.join(dict.fromkeys(tasks))}"
                raise UserError(f"--reference: {file} has no {name}; for {tried} it has {there}")
            curves[name] = np.sort(rows[known == name], order="steps")
    return curves
