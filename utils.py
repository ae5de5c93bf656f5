"""What every other module needs and nothing of learning: errors, environments by name, seeds, schedules."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import kernels.allocator  # noqa: F401  (sets what PyTorch reads when it is loaded)
from environments.contract import failure_of
from environments.section import Schedule, Section


class UserError(Exception):
    """Something that the user can put right; command lines print it without a traceback and exit with code 2."""


class EnvironmentFailure(Exception):
    """An environment failed while it was played; the message says which, its seed, its step and how."""


class NonFinite(Exception):
    """A loss, a gradient or a value is not a number."""


def own_rows(state: Any, rows: range) -> Any:
    """Return those entries of nested dicts of lists and tensors, one entry per environment, that `rows` names."""
    if isinstance(state, dict):
        return {name: own_rows(part, rows) for name, part in state.items()}
    return state[rows.start : rows.stop]


def create_env(section: Section, render_mode: str | None = None) -> Any:
    """Return a new `GymnasiumEnv`, to render with "rgb_array"; UserError if it does not exist or cannot be played."""
    if "" not in sys.path:  # the current folder, where the user's own environments lie
        sys.path.append("")
    try:
        return section.create(render_mode)
    except Exception as error:
        is_memory_gym = isinstance(error, ModuleNotFoundError) and error.name == "memory_gym"
        hint = "; pip install --no-deps memory-gym==1.0.2" if is_memory_gym else ""
        raise UserError(f"environment: {failure_of(error)}{hint}") from error


def training_seeds(section: Section) -> range:
    """Return the episode seeds that training draws from, by default the first 100,000; `stop` is the first unseen."""
    start = section.reset_params.get("start-seed", 0)
    return range(start, start + section.reset_params.get("num-seeds", 100_000))


def training_seed(seed: int, section: Section, index: int, episode: int) -> int:
    """Return the reset seed of an environment's episode, by the run's `seed` and the seeds that the section allows."""
    seeds = training_seeds(section)
    return seeds[int(np.random.SeedSequence((seed, index, episode)).generate_state(1)[0]) % len(seeds)]


def planned_seed(seeds: Sequence[Sequence[int]], index: int, episode: int) -> int:
    """Return the reset seed of an environment's episode; after the last one that counts, the list begins anew."""
    # It is here because the processes of environments import it, and do without PyTorch.
    return seeds[index][episode % len(seeds[index])]


def derived_seed(*numbers: int) -> int:
    """Return a seed that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def reason_of(error: BaseException) -> str:
    """Return what an error says on one short line, or what it is called where it says nothing."""
    return " ".join(str(error).split())[:100] or type(error).__name__


def polynomial_decay(schedule: Schedule, update: int) -> float:
    """Return the value of a schedule after so many updates."""
    if update >= schedule.max_decay_steps:
        return schedule.final
    remaining = (1 - update / schedule.max_decay_steps) ** schedule.power
    return (schedule.initial - schedule.final) * remaining + schedule.final
