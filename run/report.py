"""What is logged of an update, by TensorBoard tag: losses, gradients, the rollout, the schedules, speed, episodes."""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from environments.numbers import count_missing_success, episode_scalars

if TYPE_CHECKING:
    from trainer import PPOTrainer

# Episode statistics are means over this many of the latest episodes.
EPISODES_KEPT = 100


def collect_episodes(trainer: "PPOTrainer") -> None:
    """Add what all processes' episodes reported during this update, in the order in which they ended."""
    ended = [report for reports in trainer.world.gather(trainer.ended) for report in reports]
    trainer.finished += [report for _, _, report in sorted(ended, key=lambda report: report[:2])]
    count_missing_success(trainer.finished)
    trainer.ended.clear()
    del trainer.finished[:-EPISODES_KEPT]


def update_scalars(trainer: "PPOTrainer", statistics: Tensor, seconds: np.ndarray) -> dict[str, float]:
    """Return all that is logged of the update that a trainer has just finished.

    Args:
        trainer: whose update it was.
        statistics: (minibatches, names) of `PPOTrainer.optimise`.
        seconds: that sampling and optimisation took.
    """
    buffer, config = trainer.buffer, trainer.config
    names = [f"losses/{name}" for name in trainer.reports]
    names += [f"gradients/{module}" for module in (*trainer.optimizer.modules, "all")]
    scalars = dict(zip(names, statistics.mean(dim=0).tolist(), strict=True))
    for name in ("kl", "clip_fraction"):
        scalars[f"training/{name}"] = scalars.pop(f"losses/{name}")
    if "losses/predictable" in scalars:
        predicted, predictable = scalars.pop("losses/predicted"), scalars.pop("losses/predictable")
        scalars["training/prediction_accuracy"] = predicted / max(predictable, 1e-8)
    scalars["losses/policy"] *= -1  # what is minimised
    values, advantages = trainer.world.join_rows(buffer.values), buffer.all_advantages.view(config.n_workers, -1)
    returns = values + advantages
    scalars["training/value"] = values.mean().item()
    scalars["training/advantage"] = advantages.mean().item()
    variance = returns.var()
    scalars["training/explained_variance"] = (1 - (returns - values).var() / variance.clamp(min=1e-8)).item()
    for name in ("learning_rate", "clip_range", "beta", "novelty", "gamma", "lamda"):
        scalars[f"training/{name}"] = config.scheduled(name, trainer.update - 1)
    scalars["performance/distinct_observations"] = len(buffer.observations)
    for name, duration in zip(("sampling", "optimisation", "update"), (*seconds, seconds.sum()), strict=True):
        scalars[f"performance/{name}_steps_per_second"] = trainer.samples / duration
    return scalars | episode_scalars(trainer.finished)
