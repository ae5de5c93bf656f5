"""Numbers for a paper: what many episodes of many models come to, as a table, as files and as learning curves."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import trim_mean

from environments.numbers import count_missing_success, metrics_of
from evaluation.published import Reference
from utils import UserError, seed_range

# Bootstrap resamples behind each confidence interval.
RESAMPLES = 2000
# What --aggregate allows: runs are averaged before they are aggregated, or all episodes are pooled.
AGGREGATES = ("runs", "episodes")
# What has nothing to do with what a run learns; runs that agree in all the rest differ in their seed only.
BOOKKEEPING = ("updates", "checkpoint_interval", "model_interval", "video_interval", "histogram_interval")
STATISTICS = ("mean", "low", "high", "iqm", "std")
# Okabe and Ito 2008: told apart by colour-blind eyes. The yellow one is left out: it is too bright for paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Dashed lines are those of others.
LINES, MARKERS, DASHED = ("-", "-.", ":"), "os^Dv", "--"
# With references this many times as long as our own curves, steps are drawn on a logarithmic scale.
LOGARITHMIC = 4


@dataclass
class Evaluated:
    """What one model did.

    Attributes:
        path: its file.
        environment: name of its task.
        config: its config as plain values.
        run: what is known about its training: run_id, seed, steps, …
        episodes: of `play_episodes`.
        max_steps: after how many steps episodes were cut, None where they were not.
    """

    path: str
    environment: str
    config: dict
    run: dict
    episodes: list[dict[str, float]]
    max_steps: int | None = None

    @property
    def cut(self) -> int:
        """How many episodes were cut."""
        return sum(episode.get("cut", 0) > 0 for episode in self.episodes)

    def scores(self, metric: str) -> np.ndarray:
        """Return (seeds, repetitions) of a metric: NaN where an episode lacks it, but 0 for success."""
        missing = 0.0 if metric == "success" else math.nan
        repetitions = 1 + int(max(episode["repetition"] for episode in self.episodes))
        scores = np.array([episode.get(metric, missing) for episode in self.episodes], np.float64)
        return np.where(np.isfinite(scores), scores, missing).reshape(-1, repetitions)


@dataclass
class Point:
    """One place on a learning curve: all runs of a group after the same number of steps.

    Attributes:
        steps: environment steps of training.
        models: one per run.
        aggregate: one of `AGGREGATES`.
    """

    steps: int
    models: list[Evaluated]
    aggregate: str = "runs"

    @cached_property
    def singles(self) -> list["Point"]:
        """Each model on its own."""
        return [Point(self.steps, [model], self.aggregate) for model in self.models]

    @property
    def episodes(self) -> list[dict[str, float]]:
        """Those of all runs."""
        return [episode for model in self.models for episode in model.episodes]

    @property
    def over(self) -> str:
        """What the statistics are over, in words."""
        if self.aggregate == "episodes":
            return f"over {len(self.episodes):,} episodes"
        if len(self.models) > 1:
            return f"over {len(self.models)} runs"
        return f"over {len({episode['seed'] for episode in self.episodes}):,} seeds"

    @cached_property
    def statistics(self) -> dict[str, dict[str, float]]:
        """Of each metric: `summarise`, and how many `episodes` report it, `of` how many."""
        found = {}
        for metric in metrics_of(self.episodes):
            scores = np.stack([model.scores(metric) for model in self.models])
            reported = int((~np.isnan(scores)).sum())
            if reported:
                found[metric] = summarise(scores, self.aggregate) | {"episodes": reported, "of": scores.size}
        return found


@dataclass
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        name: for tables and legends.
        points: its learning curve, in order of steps.
        aggregate: one of `AGGREGATES`.
    """

    name: str
    points: list[Point] = field(default_factory=list)
    aggregate: str = "runs"

    @property
    def runs(self) -> list[str]:
        """The ids of its runs."""
        return list(dict.fromkeys(model.run["run_id"] for point in self.points for model in point.models))


def summarise(scores: np.ndarray, aggregate: str = "runs") -> dict[str, float]:
    """Return mean, 95 % confidence interval, interquartile mean (IQM) and standard deviation.

    With "runs", every run's episodes are averaged, and mean, IQM and deviation are over runs; the interval is of the
    mean. Where there is one run, its mean is the IQM too, and interval and deviation are over its environment seeds.
    With "episodes", all are over the episodes of all runs, and the interval is of the IQM; where episodes succeed or
    fail it says little: the IQM of 80 % is 1.

    Args:
        scores: (runs, seeds, repetitions); NaN, which is left out, where an episode does not report the metric.
        aggregate: one of `AGGREGATES`.

    Returns:
        By `STATISTICS`; what would need a second run or seed is NaN.
    """
    several = len(scores) > 1
    rows = scores.reshape(len(scores), -1) if several else scores[0]
    rows = rows[~np.isnan(rows).all(axis=1)]
    with np.errstate(over="ignore", invalid="ignore"):  # a task may report 1e308
        if aggregate == "episodes":
            episodes = rows[~np.isnan(rows)]
            low, high = interval(rows, lambda chosen: interquartile_mean(chosen[~np.isnan(chosen)]))
            numbers = (episodes.mean(), low, high, interquartile_mean(episodes), episodes.std())
        else:
            averages = np.nanmean(rows, axis=1)
            std = averages.std() if len(averages) > 1 else math.nan
            if several:
                numbers = (averages.mean(), *interval(averages, np.mean), interquartile_mean(averages), std)
            else:
                mean = np.nanmean(rows)
                numbers = (mean, *interval(rows, np.nanmean), mean, std)
    return {name: float(number) for name, number in zip(STATISTICS, numbers, strict=True)}


def interval(rows: np.ndarray, statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """Return the 95 % interval of a statistic by the stratified bootstrap of Agarwal et al. 2021, with percentiles.

    Whole rows are resampled: the scores within one belong to the same seed or run and are not independent. The draws
    are those of rliable, their package, so that its numbers come out to the last digit.

    Args:
        rows: (runs or seeds, …) their scores; of a single row nothing can be said, the interval is NaN.
        statistic: of rows.
    """
    if len(rows) < 2:
        return math.nan, math.nan
    generator = np.random.RandomState(0)
    found = [statistic(rows[generator.choice(len(rows), len(rows))]) for _ in range(RESAMPLES)]
    low, high = np.percentile(found, (2.5, 97.5))
    return low, high


def interquartile_mean(scores: np.ndarray) -> float:
    """Return the mean of the middle half of all scores, as Agarwal et al. 2021 define it."""
    return float(trim_mean(scores, 0.25, axis=None))


def chosen_seeds(text: str, skip: int, sections: Iterable[Any]) -> tuple[list[int], str]:
    """Return the environment seeds that --seeds asks for, and what is to be said of them, "" if nothing is.

    Args:
        text: "50" for so many that training has not seen; "0:10" for 0 to 9, whether it has or not.
        skip: how many unseen ones are left out first.
        sections: the `environment` sections of the configs.

    Raises:
        UserError: if the text is neither.
    """
    trained = [range(start, start + count) for start, count in map(seed_range, sections)]
    first, colon, end = text.rpartition(":")
    numbers = [int(part) if part.isdecimal() else -1 for part in (first if colon else "0", end)]
    if not 0 <= numbers[0] < numbers[1] < 2**31 or numbers[1] - numbers[0] > 10**6:
        raise UserError(f"--seeds: {text!r} should be how many unseen ones, such as 50, or which ones, such as 0:10")
    if not colon:
        numbers = [number + skip + max(seeds.stop for seeds in trained) for number in numbers]
    seeds = list(range(*numbers))
    seen = sum(any(seed in range_ for range_ in trained) for seed in seeds)
    return seeds, f"--seeds: training may have drawn {seen:,} of these {len(seeds):,}" if seen else ""


def group_runs(models: list[Evaluated], aggregate: str = "runs") -> list[Group]:
    """Put runs whose configs agree, but for bookkeeping, into groups, and their models into points by steps.

    A model that was given twice, by its run, seed and steps, counts once. Where any model of a task reports success,
    episodes that do not are completed by a success of 0.

    Args:
        models: all that were evaluated, on the same seeds.
        aggregate: one of `AGGREGATES`.
    """
    for task in {model.environment for model in models}:
        count_missing_success([e for model in models if model.environment == task for e in model.episodes])
    groups: dict[str, dict[int, dict[tuple, Evaluated]]] = {}
    for model in models:
        relevant = {key: value for key, value in model.config.items() if key not in BOOKKEEPING}
        points = groups.setdefault(json.dumps(relevant, sort_keys=True, default=str), {})
        runs = points.setdefault(model.run["steps"], {})
        runs.setdefault((model.run["run_id"], model.run["seed"]), model)
    result: list[Group] = []
    for points in groups.values():
        first = next(iter(next(iter(points.values())).values()))
        name = first.run["run_id"]
        if len({run for runs in points.values() for run in runs}) > 1:
            name = name.rstrip("0123456789").rstrip("-_.") or name
        taken = sum(name == other.name.split(" #")[0] for other in result)
        ordered = [Point(steps, list(points[steps].values()), aggregate) for steps in sorted(points)]
        result.append(Group(f"{name} #{taken + 1}" if taken else name, ordered, aggregate))
    return result


def table(groups: list[Group]) -> Iterator[str]:
    """Yield the lines of a table of 80 columns: every model, and every group of several runs."""
    for group in groups:
        for point in group.points:
            for single in point.singles:
                yield from _rows(single.models[0].path, single)
            if len(point.models) > 1:
                yield from _rows(f"{group.name}: {len(point.models)} runs", point)


def _rows(title: str, point: Point) -> Iterator[str]:
    yield f"{title} ({point.models[0].environment}), {point.steps:,} steps, {len(point.episodes):,} episodes"
    cut = sum(model.cut for model in point.models)
    if cut:
        limit = max(model.max_steps or 0 for model in point.models)
        yield f"    {cut:,} of {len(point.episodes):,} episodes cut after {limit:,} steps"
    first, last = ("IQM", "mean") if point.aggregate == "episodes" else ("mean", "IQM")
    yield f"    {point.over:<20}{first:>10}  {'95 % interval':^22}{last:>10}{'std':>10}"
    for metric, found in point.statistics.items():
        numbers = {name: f"{found[name]:.3f}" if math.isfinite(found[name]) else "–" for name in STATISTICS}
        bounds = f"[{numbers['low']}, {numbers['high']}]"
        left, right = numbers[first.lower()], numbers[last.lower()]
        yield f"    {metric[:20]:<20}{left:>10}  {bounds:^22}{right:>10}{numbers['std']:>10}"
        if found["episodes"] < found["of"]:
            yield f"    {'':<20}  in {found['episodes']:,} of {found['of']:,} episodes"


def to_json(groups: list[Group], protocol: dict) -> bytes:
    """Return everything: protocol, groups with their statistics, and every episode of every model.

    What is not finite becomes null: JSON has no word for it.
    """
    content = protocol | {"aggregate": groups[0].aggregate, "interval_of": interval_of(groups[0].aggregate)}
    content |= {"groups": [], "models": []}
    for group in groups:
        points = [
            {"steps": point.steps, "models": [model.path for model in point.models], "statistics": point.statistics}
            for point in group.points
        ]
        content["groups"].append({"name": group.name, "runs": group.runs, "points": points})
        for single in (single for point in group.points for single in point.singles):
            model = single.models[0]
            content["models"].append(
                {"path": model.path, "group": group.name, "environment": model.environment, "run": model.run}
                | {"max_steps": model.max_steps, "cut": model.cut, "statistics": single.statistics}
                | {"episodes": model.episodes, "config": model.config}
            )
    return (json.dumps(_finite(content), indent=1, allow_nan=False, default=str) + "\n").encode()


def interval_of(aggregate: str) -> str:
    """Return which statistic the confidence interval belongs to."""
    return "iqm" if aggregate == "episodes" else "mean"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_csv(groups: list[Group]) -> bytes:
    """Return a row per model: what it is, then of each metric the statistics and how many episodes report it."""
    rows = []
    for group, point in ((g, single) for g in groups for p in g.points for single in p.singles):
        model = point.models[0]
        row: dict[str, Any] = {"model": model.path, "group": group.name, "environment": model.environment}
        row |= {"run_id": model.run["run_id"], "seed": model.run["seed"], "steps": point.steps}
        row |= {"aggregate": group.aggregate, "interval_of": interval_of(group.aggregate)}
        row |= {"episodes": len(model.episodes), "cut": model.cut}
        for metric, found in point.statistics.items():
            row |= {f"{metric}_{name}": found[name] if math.isfinite(found[name]) else "" for name in STATISTICS}
            row[f"{metric}_episodes"] = found["episodes"]
        rows.append(row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def plot(groups: list[Group], metric: str, suffix: str, references: Sequence[Reference] = ()) -> bytes:
    """Return a figure of the learning curves over environment steps.

    Lines are means over runs with their confidence band; under --aggregate=episodes, interquartile means with theirs.
    Published curves are dashed; their band is the standard deviation of the runs.

    Args:
        groups: one line each.
        metric: what is drawn; groups that do not report it are left out.
        suffix: .png, .pdf or .svg.
        references: published curves of the same metric.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    statistic = interval_of(groups[0].aggregate)
    style: dict[Any, Any] = {"font.size": 11, "svg.hashsalt": "fixed"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
        for index, group in enumerate(groups):
            _plot_group(axes, group, metric, index)
        for index, reference in enumerate(references, start=len(groups)):
            _plot_reference(axes, reference, statistic, COLOURS[index % len(COLOURS)])
        _scale_steps(axes, groups, references)
        axes.set_xlabel("environment steps")
        axes.set_ylabel(f"{metric.replace('_', ' ')} ({statistic.replace('iqm', 'IQM')}, 95 % interval)")
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        if references:  # their curves leave less room
            figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False, handlelength=3)
        else:
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
    line, low, high = ([numbers[name] for numbers in found] for name in (interval_of(group.aggregate), "low", "high"))
    colour = COLOURS[index % len(COLOURS)]
    runs = max(len(point.models) for point in points)
    label = f"{group.name} ({runs} runs)" if runs > 1 else group.name
    look = {"color": colour, "marker": MARKERS[index % len(MARKERS)], "markersize": 5, "markeredgecolor": "white"}
    look |= {"linestyle": LINES[index % len(LINES)], "linewidth": 1.8, "label": label}
    if len(points) == 1:
        errors = [[max(0.0, line[0] - low[0])], [max(0.0, high[0] - line[0])]]
        axes.errorbar(steps, line, yerr=errors if math.isfinite(low[0]) else None, capsize=4, **look)
        return
    axes.plot(steps, line, **look)
    axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def _plot_reference(axes, reference: Reference, statistic: str, colour: str) -> None:
    """Draw a published curve; its deviation is one of means and no band around an interquartile mean."""
    line = reference.iqm if statistic == "iqm" else reference.mean
    band = "" if statistic == "iqm" else " ± std"
    label = f"{reference.name} (published, {reference.runs} runs{band})"
    look = {"color": colour, "linestyle": DASHED, "linewidth": 1.5, "marker": ".", "markersize": 4, "label": label}
    axes.plot(reference.steps, line, **look)
    if band:
        low = np.subtract(reference.mean, reference.std)
        high = np.add(reference.mean, reference.std)
        axes.fill_between(reference.steps, low, high, color=colour, alpha=0.1, linewidth=0)


def _scale_steps(axes, groups: list[Group], references: Sequence[Reference]) -> None:
    """Make steps logarithmic, linear around 0, where published curves would squeeze our own."""
    own = [point.steps for group in groups for point in group.points if point.steps > 0]
    others = [steps for reference in references for steps in reference.steps]
    if own and others and max(others) > LOGARITHMIC * max(own):
        axes.set_xscale("symlog", linthresh=min(own), linscale=0.5)
        axes.set_xlim(left=0)
        axes.set_xticks([0, *10 ** np.arange(math.ceil(math.log10(min(own))), math.log10(max(others)))])


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
