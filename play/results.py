"""Numbers for a paper: what many episodes of many models come to, as a table, as files and as learning curves."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from rliable.library import get_interval_estimates
from rliable.metrics import aggregate_iqm

from utils import UserError

# Bootstrap resamples behind each confidence interval.
RESAMPLES = 2000
# What has nothing to do with what a run learns; runs that agree in all the rest differ in their seed only.
BOOKKEEPING = ("updates", "checkpoint_interval", "model_interval", "video_interval", "histogram_interval")
STATISTICS = ("iqm", "low", "high", "mean", "std")
# Okabe and Ito 2008: told apart by colour-blind eyes. The yellow one is left out: it is too bright for paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES, MARKERS = ("-", "--", "-.", ":"), "os^Dv"


@dataclass
class Evaluated:
    """What one model did.

    Attributes:
        path: its file.
        environment: name of its task.
        config: its config.
        run: what is known about its training: run_id, seed, steps, …
        episodes: of `play.play_episodes`.
    """

    path: str
    environment: str
    config: dict
    run: dict
    episodes: list[dict[str, float]]

    @property
    def metrics(self) -> list[str]:
        """What all of its episodes report, reward, success and length first."""
        names = [name for name in self.episodes[0] if all(name in episode for episode in self.episodes)]
        names = [name for name in names if name not in ("seed", "repetition")]
        first = [name for name in ("reward", "success", "length") if name in names]
        return first + [name for name in names if name not in first]

    def scores(self, metric: str) -> np.ndarray:
        """Return (seeds, repetitions) of a metric."""
        repetitions = 1 + max(episode["repetition"] for episode in self.episodes)
        return np.array([episode[metric] for episode in self.episodes]).reshape(-1, repetitions)

    @cached_property
    def statistics(self) -> dict[str, dict[str, float]]:
        """Of each metric over all episodes; environment seeds are resampled: how sure it is for this model."""
        return {metric: summarise(self.scores(metric)) for metric in self.metrics}


@dataclass
class Point:
    """One place on a learning curve: all runs of a group after the same number of steps.

    Attributes:
        steps: environment steps of training.
        models: one per run.
    """

    steps: int
    models: list[Evaluated]

    @cached_property
    def statistics(self) -> dict[str, dict[str, float]]:
        """Of each metric over all episodes of all runs; runs are resampled: how sure it is for the method.

        Where there is only one run, they are those of its model.
        """
        if len(self.models) == 1:
            return self.models[0].statistics
        metrics = [name for name in self.models[0].metrics if all(name in model.metrics for model in self.models)]
        return {name: summarise(np.stack([model.scores(name).flatten() for model in self.models])) for name in metrics}


@dataclass
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        name: for tables and legends.
        points: its learning curve, in order of steps.
    """

    name: str
    points: list[Point] = field(default_factory=list)

    @property
    def runs(self) -> list[str]:
        """The ids of its runs."""
        return list(dict.fromkeys(model.run["run_id"] for point in self.points for model in point.models))


def summarise(scores: np.ndarray) -> dict[str, float]:
    """Return interquartile mean, its 95 % confidence interval, mean and standard deviation of all scores.

    The interval is rliable's bootstrap (Agarwal et al. 2021). What is resampled are whole rows, since the scores within
    a row belong to the same seed or run and are not independent.

    Args:
        scores: (rows, episodes of each).
    """
    np.random.seed(0)  # rliable draws from NumPy's global generator, whatever random_state it is given
    _, intervals = get_interval_estimates(
        {"": np.arange(len(scores))[:, None]},
        lambda rows: np.array([aggregate_iqm(scores[rows[:, 0]])]),
        reps=RESAMPLES,
    )
    low, high = intervals[""][:, 0]
    numbers = (aggregate_iqm(scores), low, high, scores.mean(), scores.std())
    return {name: float(number) for name, number in zip(STATISTICS, numbers, strict=True)}


def group_runs(models: list[Evaluated]) -> list[Group]:
    """Put runs whose configs agree, but for bookkeeping, into groups, and their models into points by steps.

    A model that was given twice, by its run, seed and steps, counts once.
    """
    groups: dict[str, dict[int, dict[tuple, Evaluated]]] = {}
    for model in models:
        relevant = {key: value for key, value in model.config.items() if key not in BOOKKEEPING}
        points = groups.setdefault(json.dumps(relevant, sort_keys=True), {})
        runs = points.setdefault(model.run["steps"], {})
        runs.setdefault((model.run["run_id"], model.run["seed"]), model)
    result = []
    for points in groups.values():
        first = next(iter(next(iter(points.values())).values()))
        name = first.run["run_id"]
        if len({run for runs in points.values() for run in runs}) > 1:
            name = name.rstrip("0123456789").rstrip("-_.") or name
        taken = sum(name == other.name.split(" #")[0] for other in result)
        ordered = [Point(steps, list(points[steps].values())) for steps in sorted(points)]
        result.append(Group(f"{name} #{taken + 1}" if taken else name, ordered))
    return result


def table(groups: list[Group]) -> Iterator[str]:
    """Yield the lines of a table of 80 columns: every model, and every group of several runs."""
    for group in groups:
        for point in group.points:
            for model in point.models:
                yield from _rows(model.path, Point(point.steps, [model]))
            if len(point.models) > 1:
                yield from _rows(f"{group.name}: {len(point.models)} runs", point)


def _rows(title: str, point: Point) -> Iterator[str]:
    episodes = sum(len(model.episodes) for model in point.models)
    yield f"{title} ({point.models[0].environment}), {point.steps:,} steps, {episodes} episodes"
    yield f"    {'':<20}{'IQM':>10}  {'95 % interval':^22}{'mean':>10}{'std':>10}"
    for metric, found in point.statistics.items():
        interval = f"[{found['low']:.3f}, {found['high']:.3f}]"
        yield f"    {metric[:20]:<20}{found['iqm']:>10.3f}  {interval:^22}{found['mean']:>10.3f}{found['std']:>10.3f}"


def to_json(groups: list[Group], protocol: dict) -> bytes:
    """Return everything: protocol, groups with their statistics, and every episode of every model."""
    content = protocol | {"groups": [], "models": []}
    for group in groups:
        points = [
            {"steps": point.steps, "models": [model.path for model in point.models], "statistics": point.statistics}
            for point in group.points
        ]
        content["groups"].append({"name": group.name, "runs": group.runs, "points": points})
        content["models"] += [
            {"path": model.path, "group": group.name, "environment": model.environment, "run": model.run}
            | {"statistics": model.statistics, "episodes": model.episodes, "config": model.config}
            for point in group.points
            for model in point.models
        ]
    return (json.dumps(content, indent=1) + "\n").encode()


def to_csv(groups: list[Group]) -> bytes:
    """Return a row per model: what it is, then the statistics of each metric."""
    rows = []
    for group, point, model in ((g, p, m) for g in groups for p in g.points for m in p.models):
        row = {"model": model.path, "group": group.name, "environment": model.environment}
        row |= {"run_id": model.run["run_id"], "seed": model.run["seed"], "steps": point.steps}
        row["episodes"] = len(model.episodes)
        for metric, found in model.statistics.items():
            row |= {f"{metric}_{name}": number for name, number in found.items()}
        rows.append(row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def plot(groups: list[Group], metric: str, suffix: str) -> bytes:
    """Return a figure of the learning curves: interquartile mean with its confidence band over environment steps.

    Args:
        groups: one line each.
        metric: what is drawn; groups that do not report it are left out.
        suffix: .png, .pdf or .svg.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "fixed"}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
        for index, group in enumerate(groups):
            _plot_group(axes, group, metric, index)
        axes.set_xlabel("environment steps")
        axes.set_ylabel(f"{metric.replace('_', ' ')} (IQM, 95 % interval)")
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, handlelength=3.5)
        stream = io.BytesIO()
        figure.savefig(stream, format=suffix[1:].lower(), dpi=200)
        pyplot.close(figure)
    return stream.getvalue()


def _plot_group(axes, group: Group, metric: str, index: int) -> None:
    """Draw one line; a single point gets error bars instead of a band."""
    points = [point for point in group.points if metric in point.statistics]
    if not points:
        return
    steps = [point.steps for point in points]
    found = [point.statistics[metric] for point in points]
    iqm, low, high = ([numbers[name] for numbers in found] for name in ("iqm", "low", "high"))
    colour = COLOURS[index % len(COLOURS)]
    runs = max(len(point.models) for point in points)
    label = f"{group.name} ({runs} runs)" if runs > 1 else group.name
    look = {"color": colour, "marker": MARKERS[index % len(MARKERS)], "markersize": 5, "markeredgecolor": "white"}
    look |= {"linestyle": LINES[index % len(LINES)], "linewidth": 1.8, "label": label}
    if len(points) == 1:
        below, above = iqm[0] - low[0], high[0] - iqm[0]
        axes.errorbar(steps, iqm, yerr=[[max(0, below)], [max(0, above)]], capsize=4, **look)
        return
    axes.plot(steps, iqm, **look)
    axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def find_models(names: list[str]) -> list[Path]:
    """Return the model files that files and folders name, each once; a folder stands for the models in it.

    Raises:
        UserError: if there is no such file, or no model in a folder.
    """
    paths: list[Path] = []
    for name in map(Path, names):
        found = sorted(name.glob("*.nn")) if name.is_dir() else [name]
        if not found:
            raise UserError(f"{name}: there is no model (.nn) in this folder; train.py writes models/<run-id>.nn, and "
                            "checkpoints/<run-id>/model-<steps>.nn where model_interval is not 0")  # fmt: skip
        paths += found
    return list(dict.fromkeys(paths))
