"""Evaluate a model while its run trains: what `eval_interval` and `video_interval` of a config start."""

import os
import sys
import threading
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from environments.numbers import episode_means
from evaluation.agent import play_episodes
from evaluation.watch import episode_summary
from run.checkpoint import load, load_model, model_file, write_file
from run.cli import command_line, step_limit
from utils import reason_of, training_seeds

EPISODES = 100
# So far from the first unseen seed they begin: a best model is evaluated on others than it was chosen on.
DISTANCE = 1_000_000


def main() -> None:
    """Play a model; whoever started this process closes its standard input to end it.

    The command line is the model, where TensorBoard finds what comes of it, the best model so far, whose place this one
    takes if it is better, and what is wanted: eval, the fixed set of unseen episodes, and video, a drawn episode.
    """
    path, summaries, best, wanted = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    os.nice(10)
    torch.set_num_threads(1)
    model, config, task, run = load_model(path, torch.device("cpu"))
    writer = SummaryWriter(summaries)
    if "eval" in wanted:
        first = training_seeds(config.environment).stop + DISTANCE
        seeds = list(range(first, first + EPISODES))
        episodes = play_episodes(model.eval(), config, task, seeds, max_steps=step_limit(None, task))
        found = {name: mean.mean for name, mean in episode_means(episodes).items()}
        for name, mean in found.items():
            writer.add_scalar(f"evaluation/{name}_mean", mean, run["steps"])
        if not best.exists() or ranking(found) > ranking(load(best, "model")["run"]["evaluation"]):
            evaluated = run | {"evaluation": found | {"seeds": [first, EPISODES]}}
            write_file(best, model_file(load(path, "model") | {"run": evaluated}))
    if "video" in wanted:
        try:
            summary = episode_summary(model.eval(), config, task, "episode")
        except Exception as error:  # whatever an environment's own drawing does
            print(f"video_interval: drawing an episode failed ({reason_of(error)})", file=sys.stderr)
        else:
            writer.file_writer.add_summary(summary, run["steps"])  # type: ignore[attr-defined]
    writer.close()


def ranking(means: dict[str, float]) -> tuple[float, float]:
    """Return what models are ordered by: success, then reward."""
    return means.get("success", -1.0), means.get("reward", -float("inf"))


if __name__ == "__main__":
    command_line(main)
