"""Numbers for a paper: what many episodes of many models come to, as a table, as files and as learning curves."""

import csv
import glob
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, t, trim_mean

from environments.numbers import count_missing_success, metrics_of
from utils import UserError, training_seeds

# With fewer runs there is no interval: the runs themselves are shown.
FEWEST = 3
# What has nothing to do with what a run learns; runs that agree in all the rest differ in their seed only.
BOOKKEEPING = (
    "updates", "checkpoint_interval", "model_interval", "video_interval", "histogram_interval", "eval_interval",
)  # fmt: skip
STATISTICS = ("mean", "low", "high", "iqm", "std")
# With references this many times as long as our own curves, steps are drawn on a logarithmic scale.
LOGARITHMIC = 4
# Which of them the confidence interval belongs to, by what is aggregated.
INTERVAL_OF = {"runs": "mean", "episodes": "iqm"}


@dataclass
class Evaluated:
    """What one model did."""

    path: str  # its file
    environment: str  # name of its task
    config: dict  # as plain values
    run: dict  # what is known about its training: run_id, seed, steps, commit, …
    episodes: list[dict[str, float]]  # of `play_episodes`
    max_steps: int | None = None  # after how many steps episodes were cut, None where they were not
    label: str = ""  # name of the group that --group puts it into, "" where its config and commit decide

    def scores(self, metric: str) -> np.ndarray:
        """Return (seeds, repetitions) of a metric: NaN where an episode lacks it."""
        found = [episode.get(metric, math.nan) for episode in self.episodes]
        return np.reshape(found, (-1, 1 + int(max(episode["repetition"] for episode in self.episodes))))


class Point:
    """One place on a learning curve: models of several runs after the same number of steps, or one model.

    By metric, `statistics` hold what `summarise` returns, each run's mean (`runs`), and how many episodes report it
    (`episodes`) out of how many (`of`). They aggregate "runs", averaged first, or "episodes", which are pooled.
    """

    def __init__(self, models: list[Evaluated], aggregate: str) -> None:
        self.models, self.aggregate, self.steps = models, aggregate, models[0].run["steps"]
        self.singles = [Point([model], aggregate) for model in models] if len(models) > 1 else [self]
        self.episodes = [episode for model in models for episode in model.episodes]
        self.cut = sum(episode.get("cut", 0) > 0 for episode in self.episodes)
        self.over = f"over {len({episode['seed'] for episode in self.episodes}):,} seeds"
        if aggregate == "episodes":
            self.over = f"over {len(self.episodes):,} episodes"
        elif len(models) > 1:
            self.over = f"over {len(models)} runs"
        self.statistics = {metric: self._statistics(metric) for metric in metrics_of(self.episodes)}

    def _statistics(self, metric: str) -> dict[str, Any]:
        scores = np.stack([model.scores(metric) for model in self.models])
        runs = np.ma.masked_invalid(scores).mean(axis=2).mean(axis=1).filled(math.nan).tolist()
        counts = {"runs": runs, "episodes": int((~np.isnan(scores)).sum()), "of": scores.size}
        return summarise(scores, self.aggregate) | counts


# By name, groups of runs that differ in nothing but their seed: the learning curve of each, by steps.
Groups = dict[str, list[Point]]


def summarise(scores: np.ndarray, aggregate: str = "runs") -> dict[str, float]:
    """Return mean, 95 % confidence interval, interquartile mean (IQM) and standard deviation (divided by n - 1).

    With "runs", each run is averaged, and all are over the runs' averages; where there is one run, they are over those
    of its environment seeds. The interval is of the mean. With "episodes", all are over the episodes of all runs, and
    the interval is of the IQM (Agarwal et al. 2021), which is 1 where 80 % succeed: there it says little.

    Scores that are all 0 or 1 have a mean between these: its interval ends there. Where the averages of such scores are
    all the same, or each is of one episode, the interval is Wilson's for a share of the seeds.

    Args:
        scores: (runs, seeds, repetitions); NaN, which is left out, where an episode does not report the metric.

    Returns:
        By `STATISTICS`; what would need more runs or seeds is NaN.
    """
    masked = np.ma.masked_invalid(scores)
    episodes, seeds = masked.compressed(), masked.mean(axis=2)
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
    """Return the 95 % confidence interval of the mean of independent numbers (n,), NaN for fewer than `FEWEST`.

    It is the t interval, on either side as wide as the t interval corrected for skewness (Hall 1992) where that is
    wider: docs/notebook/2026-11-29-intervals.md says how often it holds the mean, and what others do.
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

    "50" asks for 50 that training has seen in none of the `environment` sections, after leaving out the first `skip`;
    "0:10" asks for 0 to 9, seen or not; anything else is a UserError.
    """
    trained = [training_seeds(section) for section in sections]
    match = re.fullmatch(r"(?:([0-9]{1,10}):)?([0-9]{1,10})", text)
    first, end = (int(part or 0) for part in match.groups()) if match else (0, 0)
    if not first < end < 2**31 or end - first > 10**6:
        raise UserError(f"--seeds: {text!r} should be how many unseen ones, such as 50, or which ones, such as 0:10")
    unseen = 0 if ":" in text else skip + max(seeds.stop for seeds in trained)
    seeds = list(range(first + unseen, end + unseen))
    seen = sum(any(seed in range_ for range_ in trained) for seed in seeds)
    return seeds, f"--seeds: training may have drawn {seen:,} of these {len(seeds):,}" if seen else ""


def check_same_episodes(models: list[Evaluated], seeds: list[int], repetitions: int) -> None:
    """Raise UserError naming a file whose episodes are not those of the other models of its task.

    Models without episodes are about to play `seeds`, each so many times.
    """
    planned, expected = {(seed, repetition) for seed in seeds for repetition in range(repetitions)}, dict[str, set]()
    for model in sorted(models, key=lambda model: len(model.episodes)):
        played = {(episode["seed"], episode["repetition"]) for episode in model.episodes} or planned
        if expected.setdefault(model.environment, played) != played:
            raise UserError(f"{model.path}: was evaluated on other episodes than the other models of its task")


def group_runs(models: list[Evaluated], aggregate: str = "runs") -> Groups:
    """Return models, all of which were evaluated on the same seeds, in groups.

    Runs of one group are of one task and have the same label or, without one, the same config, but for bookkeeping,
    and commit. A second model with one seed and as many steps is of another group. Where any model of a task reports
    success, episodes that do not are completed by a success of 0.
    """
    for task in {model.environment for model in models}:
        count_missing_success([e for model in models if model.environment == task for e in model.episodes])
    curves: dict[tuple[str, int], dict[int, list[Evaluated]]] = {}
    times = Counter[tuple[str, int, int]]()
    for model in models:
        relevant = {key: value for key, value in model.config.items() if key not in BOOKKEEPING}
        alike = [model.environment, model.label or [relevant, model.run.get("commit")]]
        seen = json.dumps(alike, sort_keys=True, default=str), model.run["steps"], model.run["seed"]
        curves.setdefault((seen[0], times[seen]), {}).setdefault(model.run["steps"], []).append(model)
        times[seen] += 1
    groups: Groups = {}
    for curve in curves.values():
        points = [Point(curve[steps], aggregate) for steps in sorted(curve)]
        first, runs = points[0].models[0], runs_of(points)
        common = runs[0].rstrip("0123456789").rstrip("-_.") if len(runs) > 1 else ""
        name = first.label or common or runs[0]
        others = (f"{name} #{number}" for number in itertools.count(2))
        names = itertools.chain([name, f"{name} @{short_commit(first.run)}"], others)
        groups[next(name for name in names if name not in groups)] = points
    return groups


def runs_of(points: list[Point]) -> list[str]:
    """Return the ids of the runs of a curve."""
    return list(dict.fromkeys(model.run["run_id"] for point in points for model in point.models))


def short_commit(run: dict) -> str:
    """Return the code that a run was trained by; it ends in -dirty where that code was never committed."""
    commit, _, dirty = run.get("commit", "unknown").partition("-")
    return commit[:7] + ("-dirty" if dirty else "")


def table(groups: Groups) -> Iterator[str]:
    """Yield the lines of a table of 80 columns: every model, and every group of several."""
    for name, points in groups.items():
        for point in points:
            for single in point.singles:
                yield from _rows(single.models[0].path, single)
            if len(point.models) > 1:
                yield from _rows(name, point)


def _rows(title: str, point: Point) -> Iterator[str]:
    runs, episodes, task = len(point.models), len(point.episodes), point.models[0].environment
    yield f"{title}: {runs} {'run' if runs == 1 else 'runs'} ({task}), {point.steps:,} steps, {episodes:,} episodes"
    commits = {short_commit(model.run) for model in point.models}
    if dirty := sorted(commit for commit in commits if commit.endswith("-dirty")):
        yield f"    trained by {', '.join(dirty)}"
    if point.cut:
        limit = max(model.max_steps or 0 for model in point.models)
        yield f"    {point.cut:,} of {episodes:,} episodes cut after {limit:,} steps"
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


def contents(groups: Groups, protocol: dict) -> dict:
    """Return everything as JSON takes it: protocol, groups with their statistics, every episode of every model.

    What is not finite becomes None: JSON has no word for it.
    """
    aggregate = next(iter(groups.values()))[0].aggregate
    found = protocol | {"aggregate": aggregate, "interval_of": INTERVAL_OF[aggregate], "groups": [], "models": []}
    for name, points in groups.items():
        curve = [
            {"steps": point.steps, "models": [model.path for model in point.models], "statistics": point.statistics}
            for point in points
        ]
        found["groups"].append({"name": name, "runs": runs_of(points), "points": curve})
        found["models"] += [
            vars(single.models[0]) | {"group": name, "cut": single.cut, "statistics": single.statistics}
            for point in points
            for single in point.singles
        ]
    return json.loads(json.dumps(found, default=str), parse_constant=lambda name: None)


def to_csv(content: dict) -> bytes:
    """Return a row per model of `contents`: what it is, then of each metric the statistics and its episodes."""
    rows = []
    for model in content["models"]:
        run = model["run"]
        row = {"model": model["path"], "group": model["group"], "environment": model["environment"]}
        row |= {"run_id": run["run_id"], "seed": run["seed"], "commit": short_commit(run), "steps": run["steps"]}
        row |= {"aggregate": content["aggregate"], "interval_of": content["interval_of"]}
        row |= {"episodes": len(model["episodes"]), "cut": model["cut"]}
        for metric, found in model["statistics"].items():
            row |= {f"{metric}_{name}": found[name] for name in (*STATISTICS, "episodes")}
        rows.append(row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def from_json(path: Path, label: str = "") -> list[Evaluated]:
    """Return the models whose episodes a file of --output holds, with a label; UserError where it is none."""
    names = ("path", "environment", "config", "run", "episodes", "max_steps")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["models"]
        return [Evaluated(**{name: model[name] for name in names}, label=label) for model in stored]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: should be a file that evaluate.py --output wrote ({error})") from error


def plot(groups: Groups, metric: str, suffix: str, references: dict[str, np.ndarray]) -> bytes:
    """Return a figure of the learning curves over environment steps.

    Groups are lines, unless they do not report the metric: means over runs with their confidence band, or with a dot
    for each run where these are fewer than `FEWEST`; under --aggregate=episodes, interquartile means. Published curves,
    of `read_references`, are dashed, their band is ± std. The suffix is .png, .pdf or .svg.
    """
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    statistic = INTERVAL_OF[next(iter(groups.values()))[0].aggregate]
    style: dict[str, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.style.context(["petroff10", style]):  # colours that colour-blind eyes tell apart
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for name, points in groups.items():
            if reported := [point for point in points if metric in point.statistics]:
                _plot_group(axes, name, reported, metric, statistic)
        for name, rows in references.items():
            _plot_reference(axes, name, rows, statistic)
        own = [point.steps for points in groups.values() for point in points if point.steps > 0]
        longest = max((rows["steps"].max() for rows in references.values()), default=0)
        if own and longest > LOGARITHMIC * max(own):  # it would squeeze our own; linear around 0
            axes.set_xscale("symlog", linthresh=min(own), linscale=0.5)
            axes.set_xlim(left=0)
            axes.set_xticks([0, *10 ** np.arange(math.ceil(math.log10(min(own))), math.log10(longest))])
        axes.set_xlabel("environment steps")
        axes.set_ylabel(f"{metric.replace('_', ' ')} ({statistic.replace('iqm', 'IQM')}, 95 % interval)")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False, handlelength=3)
        stream = io.BytesIO()
        figure.savefig(stream, format=suffix[1:].lower(), dpi=200)
    return stream.getvalue()


def _plot_group(axes, name: str, points: list[Point], metric: str, statistic: str) -> None:
    """Draw one line with its band, or with error bars at a single point."""
    steps, found = [point.steps for point in points], [point.statistics[metric] for point in points]
    line, low, high = (np.array([numbers[key] for numbers in found]) for key in (statistic, "low", "high"))
    most = max(points, key=lambda point: len(point.models))
    runs = f"{len(most.models)} runs" if len(most.models) > 1 else f"1 run, band {most.over}"
    colour = axes.plot(steps, line, "o-", markersize=5, label=f"{name} ({runs})")[0].get_color()
    if len(points) == 1 and np.isfinite(low).all():
        axes.errorbar(steps, line, np.maximum(0, [line - low, high - line]), fmt="none", capsize=4, color=colour)
    axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    if 1 < len(most.models) < FEWEST:
        dots = [(point.steps, mean) for point, numbers in zip(points, found, strict=True) for mean in numbers["runs"]]
        axes.plot(*zip(*dots, strict=True), ".", color=colour, markersize=4)


def _plot_reference(axes, name: str, rows: np.ndarray, statistic: str) -> None:
    """Draw a published curve; its deviation is one of means and no band around an interquartile mean."""
    is_mean, steps, mean, std = statistic == "mean", rows["steps"], rows["mean"], rows["std_over_runs"]
    label = f"{name} (published, {rows['runs'][0]} runs{' ± std' * is_mean})"
    (line,) = axes.plot(steps, mean if is_mean else rows["iqm_over_episodes"], ".--", label=label)
    if is_mean:
        axes.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.1, linewidth=0)


def find_models(names: Sequence[str]) -> list[Path]:
    """Return the files that files, folders and patterns name, each once; a folder stands for the models in it."""
    paths: list[Path] = []
    for name in names:
        folder = Path(name)
        found = sorted(folder.glob("*.nn") if folder.is_dir() else map(Path, glob.glob(name))) or [folder]
        if found == [folder] and folder.is_dir():
            raise UserError(f"{name}: there is no model (.nn) in this folder; train.py writes models/<run-id>.nn, and "
                            "checkpoints/<run-id>/model-<steps>.nn where model_interval is not 0")  # fmt: skip
        paths += found
    return list(dict.fromkeys(paths))
