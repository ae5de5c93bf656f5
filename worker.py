"""Environments, in processes of their own, their observations in shared memory.

A process steps several environments. Per step it gets one message (which group of environments to step) and answers
with one (what finished episodes report); everything else goes through shared memory. An episode is determined by its
reset seed and its actions, so that one whose process died, or whose run was interrupted, is brought back by replaying.
"""

import sys
from collections.abc import Callable
from functools import partial

import numpy as np

from environments.contract import Task
from environments.section import Section
from processes.arrays import SharedArrays
from processes.process import Died, Process, process_context
from processes.runner import EnvironmentRunner, Episode, packed_type
from utils import EnvironmentFailure, inspect_environment  # noqa: F401

# How often the processes may be restarted at the same step before the run gives up.
MAX_RESTARTS = 3


class Workers:
    """The environments of a run, or this process's share under torchrun, spread over processes.

    Results do not depend on the number of processes: every environment has episodes of its own, and groups are given.

    Args:
        section: the `environment` section of a config.
        task: what the environment is like.
        n_workers: number of environments.
        episode_seed: (environment, episode) → reset seed; picklable.
        processes: number of processes, at most `n_workers`.
        groups: number of groups of neighbouring environments that are stepped independently.
        first: number of the run's environment that has index 0 here.
        max_steps: after how many steps an episode is cut, None where only its end ends it.
    """

    def __init__(
        self,
        section: Section,
        task: Task,
        n_workers: int,
        episode_seed: Callable[[int, int], int],
        processes: int,
        groups: int = 1,
        first: int = 0,
        max_steps: int | None = None,
    ) -> None:
        context = process_context()
        self.arrays = SharedArrays(n_workers, task, context)
        edges = [n_workers * group // groups for group in range(groups + 1)]
        self.groups = [range(low, high) for low, high in zip(edges, edges[1:], strict=False) if low < high]
        self.episodes = [Episode() for _ in range(n_workers)]
        make_runner = partial(EnvironmentRunner, section, task, self.arrays, episode_seed, first, max_steps)
        count = min(processes, n_workers)
        self.processes = [Process(context, make_runner, list(range(own, n_workers, count))) for own in range(count)]
        self.restarts, self.first = 0, first
        self.packed = packed_type(task)

    def start(self) -> list[int]:
        """Start all processes and bring `episodes` back; return the environments that had to begin a fresh one."""
        for process in self.processes:
            self._launch(process)
        fresh = sorted(index for process in self.processes for index in self._replayed(process))
        self._tell_of(fresh)
        for index in fresh:
            self.episodes[index] = Episode(self.episodes[index].number + 1)
        for episode, digest in zip(self.episodes, self.arrays.digests, strict=True):
            episode.digest = digest.tobytes()
        return fresh

    def send(self, group: range, actions: np.ndarray) -> None:
        """Let the environments of a group step with actions (n, branches)."""
        self.arrays.actions[group.start : group.stop] = actions
        for index, action in zip(group, actions.astype(self.packed), strict=True):
            self.episodes[index].actions += action.tobytes()
        for process in self.processes:
            if any(index in group for index in process.indices):
                process.pending.append(group)
                process.tell("step", group)

    def receive(self, group: range) -> list[tuple[int, dict]]:
        """Wait for a group; return (environment, info) of ended episodes by environment; the rest is in `arrays`."""
        ended = []
        for process in self.processes:
            if group in process.pending:
                ended += self._answer(process)
                process.pending.remove(group)
        arrays = self.arrays
        for index in group:
            episode = self.episodes[index]
            if arrays.terminated[index] or arrays.truncated[index]:
                self.episodes[index] = episode = Episode(episode.number + 1)
            episode.digest = arrays.digests[index].tobytes()
        self.restarts = 0
        return sorted(ended, key=lambda pair: pair[0])

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.let_go()
        for process in self.processes:
            process.end()

    def _launch(self, process: Process) -> None:
        """Start a process and let it replay its episodes without the step that is still pending."""
        episodes = {}
        for index in process.indices:
            episode, midway = self.episodes[index], bool(process.pending)
            pending = any(index in group for group in process.pending)
            size = len(episode.actions) - pending * self.packed.itemsize * self.arrays.actions.shape[1]
            episodes[index] = Episode(episode.number, episode.actions[:size], episode.digest, midway)
        process.start(episodes)

    def _replayed(self, process: Process) -> list[int]:
        """Wait until a process has replayed its episodes; return the environments where that failed."""
        while True:
            try:
                return process.read()
            except Died:
                self._replace(process)

    def _tell_of(self, fresh: list[int]) -> None:
        """Say which environments could not be brought back."""
        if fresh:
            numbers = [self.first + index for index in fresh]
            print(f"environments {numbers} are not deterministic and began fresh episodes", file=sys.stderr)

    def _answer(self, process: Process) -> list[tuple[int, dict]]:
        """Return a process's answer to a step; where it died, its successor replays and is told all it was told."""
        while True:
            try:
                return process.read()
            except Died:
                self._replace(process)
                self._tell_of(self._replayed(process))
                for group in process.pending:
                    process.tell("step", group)

    def _replace(self, process: Process) -> None:
        """Start a process anew that died, unless that goes on and on."""
        death = process.bury()
        self.restarts += 1
        if self.restarts > MAX_RESTARTS:
            raise EnvironmentFailure(f"{death} {self.restarts} times at the same step")
        print(f"\n{death}; replaying its episodes", file=sys.stderr)
        self._launch(process)
