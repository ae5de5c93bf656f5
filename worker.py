"""Environments in processes of their own, their observations in shared memory.

A process steps several environments. Per step it gets one message (which group of environments to step) and answers
with one (what finished episodes report); everything else goes through shared memory. An episode is determined by its
reset seed and its actions, so that one whose process died, or whose run was interrupted, is brought back by replaying.
"""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import xxhash

from utils import Task, UserError, check_observation, checked_step, create_env

# How often the processes may be restarted at the same step before the run gives up.
MAX_RESTARTS = 3
DIGEST_SIZE = 16


class EnvironmentFailure(Exception):
    """An environment raised an exception; the message holds its traceback, id, seed and step."""


class SharedArrays:
    """What a group of environments and the trainer tell each other, in anonymous shared memory.

    The memory has no name: it disappears with the last process that maps it, however that process ends.

    Args:
        n_workers: number of environments.
        task: gives the shapes.
        context: multiprocessing context.
    """

    def __init__(self, n_workers: int, task: Task, context) -> None:
        shape, dtype = task.observation_shape, np.float32
        if task.visual:  # channels last in memory, as convolutions want them and most environments make them
            shape, dtype = (*shape[1:], shape[0]), np.uint8
        self.layout = {
            "observations": ((n_workers, *shape), dtype),
            "final_observations": ((n_workers, *shape), dtype),
            "digests": ((n_workers, DIGEST_SIZE), np.uint8),
            "final_digests": ((n_workers, DIGEST_SIZE), np.uint8),
            "rewards": ((n_workers,), np.float64),
            "terminated": ((n_workers,), np.bool_),
            "truncated": ((n_workers,), np.bool_),
            "actions": ((n_workers, len(task.branches)), np.int64),
        }
        self.memory = {
            name: context.RawArray("b", int(np.prod(shape)) * np.dtype(dtype).itemsize)
            for name, (shape, dtype) in self.layout.items()
        }
        self.view()

    def view(self) -> None:
        """Make each array an attribute."""
        for name, (shape, dtype) in self.layout.items():
            setattr(self, name, np.frombuffer(self.memory[name], dtype).reshape(shape))

    def __getstate__(self) -> dict:
        return {"layout": self.layout, "memory": self.memory}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.view()

    def show(self, index: int, observation: np.ndarray, final: bool = False) -> None:
        """Write an observation of environment `index` and its 128-bit digest."""
        observations, digests = self.observations, self.digests
        if final:
            observations, digests = self.final_observations, self.final_digests
        observations[index] = observation.transpose(1, 2, 0) if observation.ndim == 3 else observation
        digest = xxhash.xxh3_128_digest(observations[index])
        digests[index] = np.frombuffer(digest, np.uint8)


@dataclass
class Episode:
    """The running episode of one environment: all that is needed to bring it back.

    Attributes:
        number: how many episodes the environment finished before.
        actions: (branches,) int64 of each step, as bytes.
        digest: of the current observation, empty before the first one.
        midway: whether it is brought back in the middle of a rollout, which has to be told if that fails.
    """

    number: int = 0
    actions: list[bytes] = field(default_factory=list)
    digest: bytes = b""
    midway: bool = False


class EnvironmentRunner:
    """The environments of one process.

    Args:
        environment: the `environment` section of a config.
        task: what the environment is like.
        arrays: shared with the trainer.
        episode_seed: (environment, episode) → reset seed.
        indices: of the environments that this process steps.
    """

    def __init__(
        self, environment: dict, task: Task, arrays: SharedArrays, episode_seed: Callable, indices: list[int]
    ) -> None:
        self.task, self.arrays, self.episode_seed = task, arrays, episode_seed
        self.envs = {index: create_env(environment) for index in indices}
        self.episode = dict.fromkeys(indices, 0)
        self.steps = dict.fromkeys(indices, 0)
        self.cut: set[int] = set()  # environments whose next step was lost with an episode that cannot be repeated
        self.current = indices[0]

    def reset(self, index: int) -> None:
        """Begin the episode of an environment that its number says."""
        seed = self.episode_seed(index, self.episode[index])
        self.steps[index] = 0
        observation, _ = self.envs[index].reset(seed=seed)
        check_observation(self.envs[index], observation, self.task)
        self.arrays.show(index, observation)

    def replay(self, episodes: dict[int, Episode]) -> list[int]:
        """Bring running episodes back; return the environments where that failed and a fresh episode began."""
        return [index for index, episode in episodes.items() if not self._replay(index, episode)]

    def _replay(self, index: int, episode: Episode) -> bool:
        self.current, self.episode[index] = index, episode.number
        last_observation = self.arrays.observations[index].copy()
        self.reset(index)
        for action in episode.actions:
            self.steps[index] += 1
            observation, _, terminated, truncated, _ = checked_step(
                self.envs[index], np.frombuffer(action, np.int64), self.task
            )
            if terminated or truncated:
                break
            self.arrays.show(index, observation)
        if self.steps[index] == len(episode.actions) and (
            not episode.digest or self.arrays.digests[index].tobytes() == episode.digest
        ):
            return True
        if episode.midway:
            self.cut.add(index)
            self.arrays.final_observations[index] = last_observation
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
        arrays.terminated[index], arrays.truncated[index] = terminated, truncated and not terminated
        if not (terminated or truncated):
            limit = self.task.max_episode_steps
            if limit is not None and self.steps[index] >= limit:
                raise UserError(f"{type(self.envs[index]).__name__}: episode longer than max_episode_steps, {limit}")
            arrays.show(index, observation)
            return []
        if arrays.truncated[index]:
            arrays.show(index, observation, final=True)
        self.episode[index] += 1
        self.reset(index)
        numbers = {name: float(value) for name, value in info.items() if isinstance(value, (int, float, np.number))}
        return [(index, numbers)]

    def where(self) -> str:
        """Name the environment, the episode and the step at work."""
        seed = self.episode_seed(self.current, self.episode[self.current])
        return f"environment {self.current}, reset seed {seed}, step {self.steps[self.current]}"


def serve(connection: Connection, make_runner: Callable[[], EnvironmentRunner]) -> None:
    """Run in a process of its own: step environments as told until the trainer is gone.

    Args:
        connection: receives ("replay", episodes) or ("step", group); answers ("done", result) or
            ("failed", what went wrong).
        make_runner: creates this process's environments.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's
    runner = None
    try:
        while True:
            command, argument = connection.recv()
            try:
                runner = runner or make_runner()
                answer = ("done", getattr(runner, command)(argument))
            except UserError as error:  # the contract is broken
                answer = ("failed", f"{runner.where() if runner else 'creation'}: {error}")
            except Exception:
                answer = ("failed", f"{runner.where() if runner else 'creation'}:\n{traceback.format_exc().rstrip()}")
            connection.send(answer)
    except (EOFError, OSError):
        pass  # the trainer is gone


@dataclass
class Process:
    """One process and what it owes."""

    indices: list[int]
    handle: multiprocessing.Process | None = None
    connection: Connection | None = None
    pending: list[range] = field(default_factory=list)  # groups it was told to step and has not answered for


class Workers:
    """All environments of a run, spread over processes.

    Results do not depend on the number of processes: every environment has episodes of its own, and groups are given.

    Args:
        environment: the `environment` section of a config.
        task: what the environment is like.
        n_workers: number of environments.
        episode_seed: (environment, episode) → reset seed; picklable.
        processes: number of processes, at most `n_workers`.
        groups: number of groups of neighbouring environments that are stepped independently.
    """

    def __init__(
        self, environment: dict, task: Task, n_workers: int, episode_seed: Callable, processes: int, groups: int = 1
    ) -> None:
        methods = multiprocessing.get_all_start_methods()
        # Neither copies the trainer's threads or CUDA context; the fork server imports the environments only once.
        self.context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self.context.set_forkserver_preload(["environments", "worker", "gymnasium"])
        self.arrays = SharedArrays(n_workers, task, self.context)
        edges = [n_workers * group // groups for group in range(groups + 1)]
        self.groups = [range(low, high) for low, high in zip(edges, edges[1:], strict=False) if low < high]
        self.episodes = [Episode() for _ in range(n_workers)]
        self.make_runner = partial(EnvironmentRunner, environment, task, self.arrays, episode_seed)
        count = min(processes, n_workers)
        self.processes = [Process(list(range(first, n_workers, count))) for first in range(count)]
        self.restarts = 0

    def start(self, episodes: list[Episode] | None = None) -> list[int]:
        """Start all processes and show the first observations.

        Args:
            episodes: running episodes to bring back, by default the first ones.

        Returns:
            The environments whose episode could not be brought back and that began a fresh one.
        """
        if episodes is not None:
            self.episodes = episodes
        for process in self.processes:
            self._launch(process, midway=False)
        fresh = []
        for process in self.processes:
            try:
                fresh += self._read(process)
            except (EOFError, OSError):
                fresh += self._restart(process)
        for index in fresh:
            self.episodes[index] = Episode(self.episodes[index].number + 1)
        for episode, digest in zip(self.episodes, self.arrays.digests, strict=True):
            episode.digest = digest.tobytes()
        return fresh

    def send(self, group: range, actions: np.ndarray) -> None:
        """Let the environments of a group step with actions (n, branches)."""
        self.arrays.actions[group.start : group.stop] = actions
        for index, action in zip(group, actions, strict=True):
            self.episodes[index].actions.append(action.tobytes())
        for process in self.processes:
            if any(index in group for index in process.indices):
                process.pending.append(group)
                self._tell(process, ("step", group))

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
            if process.handle is not None:
                process.connection.close()
        for process in self.processes:
            if process.handle is not None:
                process.handle.join(timeout=5)
                process.handle.kill()
                process.handle.join()
                process.handle = None

    def _launch(self, process: Process, midway: bool) -> None:
        """Start a process and let it replay; its answer is to be awaited."""
        process.connection, theirs = self.context.Pipe()
        arguments = (theirs, partial(self.make_runner, process.indices))
        process.handle = self.context.Process(target=serve, args=arguments, daemon=True)
        process.handle.start()
        theirs.close()
        self._tell(process, ("replay", {index: self._finished(index, process, midway) for index in process.indices}))

    def _finished(self, index: int, process: Process, midway: bool) -> Episode:
        """Return the running episode without the step that is still pending."""
        episode = self.episodes[index]
        pending = any(index in group for group in process.pending)
        return Episode(episode.number, episode.actions[: len(episode.actions) - pending], episode.digest, midway)

    def _tell(self, process: Process, message: tuple) -> None:
        """Send a message; that the process is dead is noticed when its answer is awaited."""
        try:
            process.connection.send(message)
        except OSError:
            pass

    def _read(self, process: Process) -> list:
        """Return the next answer of a process; EOFError or OSError if it died."""
        kind, answer = process.connection.recv()
        if kind == "failed":
            raise EnvironmentFailure(answer)
        return answer

    def _answer(self, process: Process) -> list[tuple[int, dict]]:
        """Return a process's answer to a step, bringing it back to life where it died."""
        while True:
            try:
                return self._read(process)
            except (EOFError, OSError):
                self._restart(process)

    def _restart(self, process: Process) -> list[int]:
        """Replace a dead process, replay its episodes, repeat what it was told; return the episodes that were lost."""
        while True:
            process.handle.join(timeout=5)
            self.restarts += 1
            death = f"the process of environments {process.indices} died (exit code {process.handle.exitcode})"
            if self.restarts > MAX_RESTARTS:
                raise EnvironmentFailure(f"{death} {self.restarts} times at the same step")
            print(f"\n{death}; replaying its episodes", file=sys.stderr)
            process.connection.close()
            self._launch(process, midway=bool(process.pending))
            try:
                fresh = self._read(process)
                break
            except (EOFError, OSError):
                continue
        if fresh:
            print(f"environments {fresh} are not deterministic and began fresh episodes", file=sys.stderr)
        for group in process.pending:
            self._tell(process, ("step", group))
        return fresh
