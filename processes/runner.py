"""The environments of one process: they step as told, and an episode that was lost is brought back."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from environments import BrokenContract
from environments.contract import Task, check_observation, checked_step
from environments.numbers import episode_numbers
from environments.section import Section
from processes.arrays import SharedArrays
from utils import create_env


@dataclass
class Episode:
    """The running episode of one environment: all that is needed to bring it back.

    Attributes:
        number: how many episodes the environment finished before.
        actions: of each step, a byte per branch where that suffices.
        digest: of the current observation, empty before the first one.
        midway: whether it is brought back in the middle of a rollout, which has to be told if that fails.
    """

    number: int = 0
    actions: bytearray = field(default_factory=bytearray)
    digest: bytes = b""
    midway: bool = False


def packed_type(task: Task) -> np.dtype:
    """Return how the entries of an action are kept: as small as they fit."""
    if task.continuous:
        return np.dtype(np.float32)
    return np.min_scalar_type(max(task.branches) - 1)


class EnvironmentRunner:
    """The environments of one process.

    Args:
        section: the `environment` section of a config.
        task: what the environment is like.
        arrays: shared with the trainer.
        episode_seed: (environment, episode) → reset seed.
        first: number of the run's environment that has index 0 here.
        max_steps: after how many steps an episode is cut and its report marked so, None where only its end ends it.
        indices: of the environments that this process steps.
    """

    def __init__(
        self,
        section: Section,
        task: Task,
        arrays: SharedArrays,
        episode_seed: Callable[[int, int], int],
        first: int,
        max_steps: int | None,
        indices: list[int],
    ) -> None:
        self.task, self.arrays, self.episode_seed, self.first = task, arrays, episode_seed, first
        self.max_steps = max_steps
        self.envs = {index: create_env(section) for index in indices}
        self.episode = dict.fromkeys(indices, 0)
        self.steps = dict.fromkeys(indices, 0)
        self.cut: set[int] = set()  # environments whose next step was lost with an episode that cannot be repeated
        self.current = indices[0]

    def reset(self, index: int) -> None:
        """Begin the episode of an environment that its number says."""
        self.steps[index] = 0
        observation, info = self.envs[index].reset(seed=self.episode_seed(self.first + index, self.episode[index]))
        check_observation(self.envs[index], observation, self.task)
        self.arrays.show(index, observation, info.get("action_mask"))

    def replay(self, episodes: dict[int, Episode]) -> list[int]:
        """Bring running episodes back; return the environments where that failed and a fresh episode began."""
        return [index for index, episode in episodes.items() if not self._replay(index, episode)]

    def _replay(self, index: int, episode: Episode) -> bool:
        self.current, self.episode[index] = index, episode.number
        if episode.midway:
            self.arrays.copy_to_final(index)
        self.reset(index)
        task, env = self.task, self.envs[index]
        actions = np.frombuffer(episode.actions, packed_type(task)).reshape(-1, task.action_size)
        for action in actions.astype(self.arrays.actions.dtype):
            self.steps[index] += 1
            observation, _, terminated, truncated, info = checked_step(env, action, task)
            if terminated or truncated:
                break
            self.arrays.show(index, observation, info.get("action_mask"))
        if self.steps[index] == len(actions) and (
            not episode.digest or self.arrays.digests[index].tobytes() == episode.digest
        ):
            return True
        if episode.midway:
            self.cut.add(index)
            self.arrays.final_digests[index] = np.frombuffer(episode.digest, np.uint8)
        self.episode[index] += 1
        self.reset(index)
        return False

    def step(self, group: range) -> list[tuple[int, dict]]:
        """Step this process's environments of a group; return (environment, info) of episodes that ended."""
        return [ended for index in self.envs if index in group for ended in self._step(index)]

    def _step(self, index: int) -> list[tuple[int, dict]]:
        self.current, arrays = index, self.arrays
        if index in self.cut:
            self.cut.remove(index)
            arrays.rewards[index], arrays.terminated[index], arrays.truncated[index] = 0.0, False, True
            return []
        self.steps[index] += 1
        observation, arrays.rewards[index], terminated, truncated, info = checked_step(
            self.envs[index], arrays.actions[index].copy(), self.task
        )
        cut = self.steps[index] == self.max_steps and not (terminated or truncated)
        truncated |= cut
        arrays.terminated[index], arrays.truncated[index] = terminated, truncated and not terminated
        if not (terminated or truncated):
            limit = self.task.max_episode_steps
            if limit is not None and self.steps[index] >= limit:
                raise BrokenContract(
                    f"{type(self.envs[index]).__name__}: episode longer than max_episode_steps, {limit}"
                )
            arrays.show(index, observation, info.get("action_mask"))
            return []
        if arrays.truncated[index]:
            arrays.show(index, observation, final=True)
        report = self.envs[index].numbers_so_far() | {"cut": 1.0} if cut else episode_numbers(info)
        self.episode[index] += 1
        self.reset(index)
        return [(index, report)]

    def where(self) -> str:
        """Name the environment, the episode and the step at work."""
        number = self.first + self.current
        seed = self.episode_seed(number, self.episode[self.current])
        return f"environment {number}, reset seed {seed}, step {self.steps[self.current]}"
