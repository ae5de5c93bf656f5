"""Train all of POPGym's tasks, evaluate them, and set them beside published figures.

Usage:
    popgym_table [options]

<output>.md has a line for each task, means over runs. Where a config's updates are too few,
UPDATES in tools/popgym_table.py says how many there are by default.
Example: python -m tools.popgym_table --seeds=1 --tasks=Easy

Options:
    --config=<file>     Setting of all runs; by default popgym_control.yaml for CartPole and
                        Pendulum, and popgym.yaml for the others.
    --output=<file>     [default: docs/results/popgym]."""

import itertools
from functools import partial
from pathlib import Path

import numpy as np

from run.checkpoint import write_file
from run.cli import arguments_of, command_line
from run.logger import EPISODES_KEPT
from tools.runs import CONFIGS, OPTIONS, Given, Row, Trial, chosen, digest, fill, make_trial, read_rows, scalars
from utils import UserError

PUBLISHED = CONFIGS.parent / "docs" / "published" / "popgym.csv"
CONTROL = ("Cart", "Pendulum")
UPDATES = {"CountRecallHard": 490, "HigherLowerHard": 490, "RepeatFirstEasy": 490, "RepeatFirstMedium": 735}
COLUMNS = ("task", "seed", "steps", "mmer", "mmer_65536", "reward_mean", "reward_low", "reward_high", "seconds",
           "setting")  # fmt: skip
# What is set beside published figures, and by what of it a task is counted.
FIGURES = {"mmer_65536": "mean over 65,536 steps", "reward_mean": "final evaluation", "mmer": "MMER"}
COUNTED, TOLERANCE = ("mmer_65536", "reward_mean"), 0.005
# With 100 episodes, the final evaluation of a bandit is only known to .08.
EPISODES = 1000
# Steps of one of POPGym's updates: the best of many short means is larger than the best of few long ones.
PUBLISHED_UPDATE = 65_536


def main() -> None:
    """Parse the command line, carry out the runs that are missing, and write the table."""
    arguments = arguments_of(__doc__ + OPTIONS, Given)
    published = {row["task"]: row for row in read_rows(PUBLISHED)}
    tasks, seeds = chosen(arguments.tasks, published, "--tasks"), range(1, arguments.seeds + 1)
    trials = []
    for seed, task in itertools.product(seeds, tasks):
        name = "popgym_control" if any(part in task for part in CONTROL) else "popgym"
        config, updates = arguments.config or CONFIGS / f"{name}.yaml", arguments.updates or UPDATES.get(task)
        changes, setting = [f"environment.name=popgym:popgym-{task}-v0"], f"{config.stem}-{digest(config)}"
        trials.append(make_trial((task, str(seed)), config, changes, updates, setting))
    fill(trials, COLUMNS, measure, partial(write_table, published), arguments, EPISODES)


def measure(trial: Trial, found: Row) -> dict:
    """Return steps, seconds, the best mean episodic return of a run by its summaries, and what it was evaluated at."""
    tags = "performance/update_steps_per_second", "episode/reward_mean", "episode/length_mean"
    speed, rewards, lengths = (scalars(trial.run_id, tag) for tag in tags)
    means = np.array([reward for step, reward in rewards.items() if step >= EPISODES_KEPT * lengths[step]])
    if len(means) == 0:
        raise UserError(f"fewer than {EPISODES_KEPT} episodes have ended")
    size = min(speed)  # steps of an update
    width = min(max(1, PUBLISHED_UPDATE // size), len(means))
    wide = np.convolve(means, np.full(width, 1 / width), mode="valid")
    figures = {"mmer": means.max(), "mmer_65536": wide.max()}
    figures |= {name: float(found[name]) for name in ("reward_mean", "reward_low", "reward_high")}
    counts = {"steps": max(speed), "seconds": round(sum(size / value for value in speed.values()))}
    return counts | {name: f"{figure:.4f}" for name, figure in figures.items()}


def write_table(published: dict[str, Row], rows: list[Row], output: Path) -> None:
    """Write a Markdown table with a line for each task and setting, and how many tasks come to the best published."""
    headings = ["task", "config", "runs", "steps", *FIGURES.values(), "published GRU", "published best"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    reached = dict.fromkeys(COUNTED, 0)
    for task, known in published.items():
        own = [row for row in rows if row["task"] == task]
        for setting in sorted({row["setting"] for row in own}):
            found = [row for row in own if row["setting"] == setting]
            steps = "–".join(f"{steps:,}" for steps in sorted({int(row["steps"]) for row in found}))
            figures = [mean_and_deviation([float(row[name]) for row in found]) for name in FIGURES]
            best = f"{known['best']} {known['method']}"
            cells = [task, setting.rsplit("-", 1)[0], str(len(found)), steps, *figures, known["gru_2023"] or "–", best]
            lines.append(f"| {' | '.join(cells)} |")
        for name in COUNTED if own else ():
            mean = float(np.mean([float(row[name]) for row in own]))
            reached[name] += round(mean, 3) >= round(float(known["best"]) - TOLERANCE, 3)
    counts = " and ".join(f"{count} by the {FIGURES[name]}" for name, count in reached.items())
    lines += ["", f"Not more than {TOLERANCE} below the best published figure, of {len(published)} tasks: {counts}.\n"]
    write_file(output.with_name(f"{output.name}.md"), "\n".join(lines).encode())


def mean_and_deviation(figures: list[float]) -> str:
    """Return mean and standard deviation over runs, as text."""
    return f"{np.mean(figures):.3f}" + (f" ± {np.std(figures, ddof=1):.3f}" if len(figures) > 1 else "")


if __name__ == "__main__":
    command_line(main)
