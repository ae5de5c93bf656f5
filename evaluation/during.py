"""Evaluate a model while its run trains: what `eval_interval` and `video_interval` of a config start.

Usage:
    during.py <model> --summaries=<folder> --best=<file> [--eval] [--video]

Options:
    --summaries=<folder>  Where TensorBoard finds what comes of it.
    --best=<file>         The best model so far; this one takes its place if it is better.
    --eval                Play the fixed set of unseen episodes.
    --video               Draw an episode.
    -h --help             Show this.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch.utils.tensorboard import SummaryWriter

from environments.numbers import episode_means
from evaluation.agent import first_unseen_seed, play_episodes
from evaluation.watch import episode_summary
from run.checkpoint import load, load_model, model_file, write_file
from run.cli import Arguments, arguments_of, command_line, step_limit
from utils import UserError, reason_of

EPISODES = 100
# So far from the first unseen seed they begin: a best model is evaluated on others than it was chosen on.
DISTANCE = 1_000_000


class Given(Arguments):
    """What the docstring says."""

    model: Path = Field(alias="<model>")
    summaries: Path
    best: Path
    eval: bool
    video: bool


def main() -> None:
    """Parse the command line and play; whoever started this process closes its standard input to end it."""
    arguments = arguments_of(__doc__, Given)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    os.nice(10)
    torch.set_num_threads(1)
    model, config, task, run = load_model(arguments.model, torch.device("cpu"))
    writer: Any = SummaryWriter(arguments.summaries)
    if arguments.eval:
        first = first_unseen_seed(config.environment) + DISTANCE
        seeds = list(range(first, first + EPISODES))
        means = episode_means(play_episodes(model.eval(), config, task, seeds, max_steps=step_limit(None, task)))
        found = {name: mean.mean for name, mean in means.items()}
        for name, mean in found.items():
            writer.add_scalar(f"evaluation/{name}_mean", mean, run["steps"])
        if ranking(found) > ranking(best_so_far(arguments.best)):
            state = load(arguments.model, "model")
            write_file(arguments.best, model_file(state, run | {"evaluation": found | {"seeds": [first, EPISODES]}}))
    if arguments.video:
        try:
            summary = episode_summary(model.eval(), config, task, "episode")
        except Exception as error:  # whatever an environment's own drawing does
            print(f"video_interval: drawing an episode failed ({reason_of(error)})", file=sys.stderr)
        else:
            writer.file_writer.add_summary(summary, run["steps"])
    writer.close()


def best_so_far(path: Path) -> dict[str, float]:
    """Return the evaluation of the best model, nothing where there is none."""
    try:
        return load(path, "model")["run"]["evaluation"]
    except (UserError, KeyError, TypeError):
        return {}


def ranking(means: dict[str, float]) -> tuple[float, float]:
    """Return what models are ordered by: success, then reward."""
    return means.get("success", -1.0), means.get("reward", -float("inf"))


if __name__ == "__main__":
    command_line(main)
