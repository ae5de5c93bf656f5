"""Numbers for a paper: what many episodes of many models come to, as a table, as files and as learning curves."""

import csv
import glob
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, t, trim_mean

from environments.numbers import count_missing_success, metrics_of
from evaluation.published import Reference
from utils import UserError, seed_range

# Of fewer runs nothing can be said but what they are: they are shown themselves.
FEWEST = 3
# What has nothing to do with what a run learns; runs that agree in all the rest differ in their seed only.
BOOKKEEPING = (
    "updates", "checkpoint_interval", "model_interval", "video_interval", "histogram_interval", "eval_interval",
)  # fmt: skip
STATISTICS = ("mean", "low", "high", "iqm", "std")
# Okabe and Ito 2008: told apart by colour-blind eyes. The yellow one is left out: it is too bright for paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^DvPX"
# With references this many times as long as our own curves, steps are drawn on a logarithmic scale.
LOGARITHMIC = 4


@dataclass
class Evaluated:
    """What one model did.

    Attributes:
        path: its file.
        environment: name of its task.
        config: its config as plain values.
        run: what is known about its training: run_id, seed, steps, commit, …
        episodes: of `play_episodes`.
        max_steps: after how many steps episodes were cut, None where they were not.
        label: name of the group that --group puts it into, "" where its config and commit decide.
    """

    path: str
    environment: str
    config: dict
    run: dict
    episodes: list[dict[str, float]]
    max_steps: int | None = None
    label: str = ""

    @property
    def cut(self) -> int:
        """How many episodes were cut."""
        return sum(episode.get("cut", 0) > 0 for episode in self.episodes)

    @property
    def commit(self) -> str:
        """The code that it was trained by, short; it ends in -dirty where that code was never committed."""
        commit, _, dirty = self.run.get("commit", "unknown").partition("-")
        return commit[:7] + ("-dirty" if dirty else "")

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
        aggregate: "runs", which are averaged first, or "episodes", which are pooled.
        repeated: models that are shown and not counted, for `models` has their seed already.
    """

    steps: int
    models: list[Evaluated]
    aggregate: str = "runs"
    repeated: list[Evaluated] = field(default_factory=list)

    @cached_property
    def singles(self) -> list["Point"]:
        """Each model on its own."""
        return [Point(self.steps, [model], self.aggregate) for model in self.models + self.repeated]

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
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Of each metric: `summarise`, the mean of each of the `runs`, and in how many `episodes`, `of` all, it is."""
        found = {}
        for metric in metrics_of(self.episodes):
            scores = np.stack([model.scores(metric) for model in self.models])
            reported = int((~np.isnan(scores)).sum())
            if reported:
                runs = np.ma.masked_invalid(scores).mean(axis=2).mean(axis=1).filled(math.nan).tolist()
                counts = {"runs": runs, "episodes": reported, "of": scores.size}
                found[metric] = summarise(scores, self.aggregate) | counts
        return found


def summarise(scores: np.ndarray, aggregate: str = "runs") -> dict[str, float]:
    """Return mean, 95 % confidence interval, interquartile mean (IQM) and standard deviation (divided by n - 1).

    With "runs", each run is averaged, and all are over the runs' averages; where there is one run, they are over those
    of its environment seeds. The interval is of the mean. With "episodes", all are over the episodes of all runs, and
    the interval is of the IQM (Agarwal et al. 2021), which is 1 where 80 % succeed: there it says little.

    Scores that are all 0 or 1 have a mean between these: its interval ends there. Where the averages of such scores are
    all the same, or each is of one episode, the interval is Wilson's for a share of the seeds.

    Args:
        scores: (runs, seeds, repetitions); NaN, which is left out, where an episode does not report the metric.
        aggregate: "runs" or "episodes".

    Returns:
        By `STATISTICS`; what would need more runs or seeds is NaN.
    """
    masked = np.ma.masked_invalid(scores)
    episodes = masked.compressed()
    with np.errstate(over="ignore", invalid="ignore"):  # a task may report 1e308
        seeds = masked.mean(axis=2)
        values = (seeds.mean(axis=1) if len(scores) > 1 else seeds[0]).compressed()
        if aggregate == "episodes":
            iqm = trim_mean(episodes, 0.25)
            low, high = interval(pulls_on_iqm(masked.reshape(len(scores), -1) if len(scores) > 1 else masked[0], iqm))
            values = episodes
        else:
            iqm = trim_mean(values, 0.25) if len(scores) > 1 else values.mean()
            low, high = interval(values)
        mean, std = values.mean(), values.std(ddof=1) if len(values) > 1 else math.nan
    if np.isin(episodes, (0, 1)).all() and math.isfinite(low):
        if aggregate == "runs" and (np.ptp(values) == 0 or len(values) == len(episodes)):
            n = max(len(values), scores.shape[1])
            low, high = binomtest(round(mean * n), n).proportion_ci(method="wilson")
        low, high = max(low, 0.0), min(high, 1.0)
    return {name: float(value) for name, value in zip(STATISTICS, (mean, low, high, iqm, std), strict=True)}


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of independent numbers, NaN for fewer than `FEWEST`.

    It is the t interval, on either side as wide as the t interval corrected for skewness (Hall 1992) where that is
    wider: docs/notebook/2026-11-29-intervals.md says how often it holds the mean, and what others do.

    Args:
        values: (n,) one per run or seed.
    """
    n = len(values)
    if n < FEWEST:
        return math.nan, math.nan
    mean, std, reach = values.mean(), values.std(ddof=1), t.ppf(0.975, n - 1)
    if std == 0:
        return mean, mean
    slant = (((values - mean) / std) ** 3).sum() * math.sqrt(n) / ((n - 1) * (n - 2))  # skewness / √n
    below, above = reach, reach
    if abs(slant) > 1e-6:
        below, above = 3 / slant * (np.cbrt(1 + slant * (np.array([reach, -reach]) - slant / 6)) - 1) * (1, -1)
    error = std / math.sqrt(n)
    return mean - max(reach, below) * error, mean + max(reach, above) * error


def pulls_on_iqm(rows: np.ma.MaskedArray, iqm: float) -> np.ndarray:
    """Return a number per row whose mean is an interquartile mean: how far the row's scores pull it.

    What a score does to it ends at the quartiles (Tukey and McLaughlin 1963); rows are independent, scores are not.
    """
    ends = np.ma.masked_array(np.clip(rows.data, *np.quantile(rows.compressed(), (0.25, 0.75))), rows.mask)
    pulls = 2 * (ends - ends.mean()).sum(axis=1) * len(rows) / rows.count()
    return iqm + pulls.compressed()


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


def group_runs(models: list[Evaluated], aggregate: str = "runs") -> dict[str, list[Point]]:
    """Return, by name, groups of runs that differ in nothing but their seed: the learning curve of each, by steps.

    Runs of one group have the same label or, without one, the same config, but for bookkeeping, and commit. Of several
    models with one seed and as many steps, the first counts. Where any model of a task reports success, episodes that
    do not are completed by a success of 0.

    Args:
        models: all that were evaluated, on the same seeds.
        aggregate: "runs" or "episodes".
    """
    for task in {model.environment for model in models}:
        count_missing_success([e for model in models if model.environment == task for e in model.episodes])
    curves: dict[str, dict[int, Point]] = {}
    for model in models:
        steps = model.run["steps"]
        relevant = {key: value for key, value in model.config.items() if key not in BOOKKEEPING}
        alike = [model.environment, relevant, model.run.get("commit")]
        curve = curves.setdefault(model.label or json.dumps(alike, sort_keys=True, default=str), {})
        point = curve.setdefault(steps, Point(steps, [], aggregate))
        again = model.run["seed"] in [other.run["seed"] for other in point.models]
        (point.repeated if again else point.models).append(model)
    groups: dict[str, list[Point]] = {}
    for curve in curves.values():
        points = [curve[steps] for steps in sorted(curve)]
        first, runs = points[0].models[0], runs_of(points)
        name = first.label or runs[0]
        if len(runs) > 1 and not first.label:
            name = name.rstrip("0123456789").rstrip("-_.") or name
        names = itertools.chain([name, f"{name} @{first.commit}"], (f"{name} #{k}" for k in itertools.count(2)))
        groups[next(name for name in names if name not in groups)] = points
    return groups


def runs_of(points: list[Point]) -> list[str]:
    """Return the ids of the runs of a curve."""
    return list(dict.fromkeys(model.run["run_id"] for point in points for model in point.models))


def table(groups: dict[str, list[Point]]) -> Iterator[str]:
    """Yield the lines of a table of 80 columns: every model, and every group of several."""
    for name, points in groups.items():
        for point in points:
            for single in point.singles:
                yield from _rows(single.models[0].path, single)
            if len(point.singles) > 1:
                yield from _rows(name, point)


def _rows(title: str, point: Point) -> Iterator[str]:
    runs, episodes = len(point.models), len(point.episodes)
    title = f"{title}: {runs} {'run' if runs == 1 else 'runs'} ({point.models[0].environment})"
    yield f"{title}, {point.steps:,} steps, {episodes:,} episodes"
    commits = list(dict.fromkeys(model.commit for model in point.models))
    if len(commits) > 1 or commits[0].endswith("-dirty"):
        yield f"    trained by {', '.join(commits)}"
    for model in point.repeated:
        yield f"    not counted, for seed {model.run['seed']} comes again: {model.path}"
    cut = sum(model.cut for model in point.models)
    if cut:
        limit = max(model.max_steps or 0 for model in point.models)
        yield f"    {cut:,} of {episodes:,} episodes cut after {limit:,} steps"
    first, last = ("IQM", "mean") if point.aggregate == "episodes" else ("mean", "IQM")
    few = 1 < runs < FEWEST
    yield f"    {point.over:<20}{first:>10}  {'the runs' if few else '95 % interval':^22}{last:>10}{'std':>10}"
    for metric, found in point.statistics.items():
        numbers = {name: f"{found[name]:.3f}" if math.isfinite(found[name]) else "–" for name in STATISTICS}
        bounds = f"[{numbers['low']}, {numbers['high']}]" if math.isfinite(found["low"]) else "–"
        bounds = ", ".join(f"{mean:.3f}" for mean in found["runs"]) if few else bounds
        left, right = numbers[first.lower()], numbers[last.lower()]
        yield f"    {metric[:20]:<20}{left:>10}  {bounds:^22}{right:>10}{numbers['std']:>10}"
        if found["episodes"] < found["of"]:
            yield f"    {'':<20}  in {found['episodes']:,} of {found['of']:,} episodes"


def to_json(groups: dict[str, list[Point]], protocol: dict) -> bytes:
    """Return everything: protocol, groups with their statistics, and every episode of every model.

    What is not finite becomes null: JSON has no word for it.
    """
    aggregate = next(iter(groups.values()))[0].aggregate
    content = protocol | {"aggregate": aggregate, "interval_of": interval_of(aggregate), "groups": [], "models": []}
    for name, points in groups.items():
        found = [
            {"steps": point.steps, "models": [model.path for model in point.models], "statistics": point.statistics}
            for point in points
        ]
        content["groups"].append({"name": name, "runs": runs_of(points), "points": found})
        for single in (single for point in points for single in point.singles):
            model = single.models[0]
            more = {"group": name, "cut": model.cut, "statistics": single.statistics}
            content["models"].append(vars(model) | more)
    finite = json.loads(json.dumps(content, default=str), parse_constant=lambda name: None)
    return (json.dumps(finite, indent=1) + "\n").encode()


def from_json(path: Path, label: str = "") -> list[Evaluated]:
    """Return the models whose episodes a file of `to_json` holds, with a label; UserError where it is none."""
    names = ("path", "environment", "config", "run", "episodes", "max_steps")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["models"]
        models = [Evaluated(**{name: model[name] for name in names}, label=label) for model in stored]
        for episode in (episode for model in models for episode in model.episodes):
            episode |= {name: math.nan for name, number in episode.items() if number is None}
        return models
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: should be a file that evaluate.py --output wrote ({error})") from error


def interval_of(aggregate: str) -> str:
    """Return which statistic the confidence interval belongs to."""
    return "iqm" if aggregate == "episodes" else "mean"


def to_csv(groups: dict[str, list[Point]]) -> bytes:
    """Return a row per model: what it is, then of each metric the statistics and how many episodes report it."""
    rows = []
    for name, point in ((name, single) for name, points in groups.items() for p in points for single in p.singles):
        model = point.models[0]
        row: dict[str, Any] = {"model": model.path, "group": name, "environment": model.environment}
        row |= {"run_id": model.run["run_id"], "seed": model.run["seed"], "commit": model.commit, "steps": point.steps}
        row |= {"aggregate": point.aggregate, "interval_of": interval_of(point.aggregate)}
        row |= {"episodes": len(model.episodes), "cut": model.cut}
        for metric, found in point.statistics.items():
            row |= {f"{metric}_{kind}": found[kind] if math.isfinite(found[kind]) else "" for kind in STATISTICS}
            row[f"{metric}_episodes"] = found["episodes"]
        rows.append(row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def plot(groups: dict[str, list[Point]], metric: str, suffix: str, references: Sequence[Reference] = ()) -> bytes:
    """Return a figure of the learning curves over environment steps.

    Lines are means over runs with their confidence band, or with the runs themselves where these are fewer than
    `FEWEST`; under --aggregate=episodes, interquartile means. Published curves are dashed, their band is ± std.

    Args:
        groups: one line each.
        metric: what is drawn; groups that do not report it are left out.
        suffix: .png, .pdf or .svg.
        references: published curves of the same metric.
    """
    import matplotlib
    from matplotlib.figure import Figure

    statistic = interval_of(next(iter(groups.values()))[0].aggregate)
    style: dict[Any, Any] = {"font.size": 11, "svg.hashsalt": "fixed", "axes.axisbelow": True}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.set_prop_cycle(color=COLOURS, marker=list(MARKERS))
        for name, points in groups.items():
            if reporting := [point for point in points if metric in point.statistics]:
                _plot_group(axes, name, reporting, metric, statistic)
        for reference in references:
            _plot_reference(axes, reference, statistic)
        _scale_steps(axes, groups, references)
        axes.set_xlabel("environment steps")
        axes.set_ylabel(f"{metric.replace('_', ' ')} ({statistic.replace('iqm', 'IQM')}, 95 % interval)")
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False, handlelength=3)
        stream = io.BytesIO()
        figure.savefig(stream, format=suffix[1:].lower(), dpi=200)
    return stream.getvalue()


def _plot_group(axes, name: str, points: list[Point], metric: str, statistic: str) -> None:
    """Draw one line with its band, or with error bars at a single point; each of few runs is a thin line."""
    steps, found = [point.steps for point in points], [point.statistics[metric] for point in points]
    line, low, high = (np.array([numbers[key] for numbers in found]) for key in (statistic, "low", "high"))
    most = max(points, key=lambda point: len(point.models))
    runs = f"{len(most.models)} runs" if len(most.models) > 1 else f"1 run, band {most.over}"
    (drawn,) = axes.plot(steps, line, markersize=5, markeredgecolor="white", label=f"{name} ({runs})")
    colour = drawn.get_color()
    if len(points) == 1 and np.isfinite(low).all():
        axes.errorbar(steps, line, np.maximum(0, [line - low, high - line]), fmt="none", capsize=4, color=colour)
    axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    if 1 < len(most.models) < FEWEST:
        for seed in [model.run["seed"] for model in most.models]:
            curve = [(point.steps, mean) for point, numbers in zip(points, found, strict=True)
                     for model, mean in zip(point.models, numbers["runs"], strict=True)
                     if model.run["seed"] == seed]  # fmt: skip
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.7, marker=".", markersize=3)


def _plot_reference(axes, reference: Reference, statistic: str) -> None:
    """Draw a published curve; its deviation is one of means and no band around an interquartile mean."""
    mean, std, is_mean = np.array(reference.mean), np.array(reference.std), statistic == "mean"
    label = f"{reference.name} (published, {reference.runs} runs{' ± std' * is_mean})"
    (line,) = axes.plot(reference.steps, mean if is_mean else reference.iqm, "--", marker=".", label=label)
    if is_mean:
        axes.fill_between(reference.steps, mean - std, mean + std, color=line.get_color(), alpha=0.1, linewidth=0)


def _scale_steps(axes, groups: dict[str, list[Point]], references: Sequence[Reference]) -> None:
    """Make steps logarithmic, linear around 0, where published curves would squeeze our own."""
    own = [point.steps for points in groups.values() for point in points if point.steps > 0]
    others = [steps for reference in references for steps in reference.steps]
    if own and others and max(others) > LOGARITHMIC * max(own):
        axes.set_xscale("symlog", linthresh=min(own), linscale=0.5)
        axes.set_xlim(left=0)
        axes.set_xticks([0, *10 ** np.arange(math.ceil(math.log10(min(own))), math.log10(max(others)))])


def find_models(names: Sequence[str]) -> list[Path]:
    """Return the files that files, folders and patterns name, each once; a folder stands for the models in it.

    Raises:
        UserError: if there is no model in a folder.
    """
    paths: list[Path] = []
    for name in names:
        folder = Path(name)
        found = sorted(folder.glob("*.nn")) if folder.is_dir() else sorted(map(Path, glob.glob(name))) or [folder]
        if not found:
            raise UserError(f"{name}: there is no model (.nn) in this folder; train.py writes models/<run-id>.nn, and "
                            "checkpoints/<run-id>/model-<steps>.nn where model_interval is not 0")  # fmt: skip
        paths += found
    return list(dict.fromkeys(paths))
