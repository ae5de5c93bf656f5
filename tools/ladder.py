"""How far back can it remember? Train every memory on longer and longer tasks.

Usage:
    ladder [options]

<output>.png shows success against the length of what is remembered.
Example: python -m tools.ladder --tasks=tmaze --lengths=20,50 --seeds=1

Options:
    --lengths=<n>       Only these, with commas between.
    --memories=<names>  Only these: trxl, segments, gru, lstm, none.
    --output=<file>     [default: docs/results/ladder]."""

import itertools
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from run.cli import arguments_of, command_line
from run.config import load_config
from tools.compare import COLOURS, COLUMNS, MEMORIES, grouped, measure, save
from tools.runs import CONFIGS, OPTIONS, Given, Row, Trial, chosen, fill, make_trial

# Task → what its length is called, how much longer an episode is at most, the lengths.
LADDERS = {
    "tmaze": ("corridor_length", 2, (20, 50, 100, 250, 500, 1000, 1500)),
    "key_to_door": ("episode_length", 0, (60, 120, 250, 500)),
}
RUNGS = ("trxl", "segments", "gru", "lstm", "none")


def main() -> None:
    """Parse the command line, carry out the runs that are missing, shortest first, and draw."""
    arguments = arguments_of(__doc__ + OPTIONS, Given)
    memories, seeds = chosen(arguments.memories, RUNGS, "--memories"), range(1, arguments.seeds + 1)
    trials = []
    for task in chosen(arguments.tasks, LADDERS, "--tasks"):
        lengths = map(int, chosen(arguments.lengths, map(str, LADDERS[task][2]), "--lengths"))
        for length, seed, memory in itertools.product(lengths, seeds, memories):
            trials.append(trial(task, length, memory, seed, arguments.updates))
    fill(sorted(trials, key=lambda trial: int(trial.key[1])), COLUMNS, measure, draw, arguments)


def trial(task: str, length: int, memory: str, seed: int, updates: int | None = None) -> Trial:
    """Return a training of the ladder: memory holds a whole episode, recurrent cells are as wide as the transformer."""
    key, more, _ = LADDERS[task]
    path = CONFIGS / f"{task}.yaml"
    config = load_config(path)
    width, changes = config.core.embed_dim, [f"environment.{key}={length}"]
    if memory in ("trxl", "segments"):
        changes.append(f"transformer.memory_length={length + more}")
    elif memory == "none":
        changes += ["transformer=null", f"memoryless={{embed_dim: {width}}}"]
    else:
        cell = f"{{layer_type: {memory}, embed_dim: {width}, hidden_state_size: {width}}}"
        changes += ["transformer=null", f"recurrence={cell}"]
    if memory in ("segments", "gru", "lstm"):  # gradients through as much of a rollout as a minibatch holds
        changes.append(f"segment_length={math.gcd(config.worker_steps, config.samples // config.n_mini_batch)}")
    return make_trial((task, str(length), memory, str(seed)), path, changes, updates)


def draw(rows: list[Row], output: Path) -> None:
    """Write a panel for each task: success against length, a line of means and the single runs of each memory."""
    panels = Figure(figsize=(6 * len(LADDERS), 4), layout="constrained").subplots(1, len(LADDERS))
    for axes, task in zip(panels, LADDERS, strict=True):
        for memory, own in grouped([row for row in rows if row["task"] == task], "memory").items():
            lengths = np.array([int(row["length"]) for row in own])
            success, rungs = np.array([float(row["success"]) for row in own]), np.unique(lengths)
            means = [success[lengths == rung].mean() for rung in rungs]
            axes.plot(rungs, means, label=MEMORIES[memory], color=COLOURS[memory])
            axes.scatter(lengths, success, s=12, color=COLOURS[memory])
        ticks = LADDERS[task][2]
        axes.set(title=task, xlabel=LADDERS[task][0].replace("_", " "), ylabel="success", ylim=(0, 1.05), xscale="log")
        axes.set_xlim(0.9 * ticks[0], 1.1 * ticks[-1])
        axes.set_xticks(ticks, map(str, ticks), fontsize=8)
        axes.minorticks_off()
    save(panels[-1], output.with_name(f"{output.name}.png"))


if __name__ == "__main__":
    command_line(main)
