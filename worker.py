"""Environments in processes of their own, their observations in shared memory.

A process steps several environments. Per step it gets one message (which group of environments to step) and answers
with one (what finished episodes report); everything else goes through shared memory. An episode is determined by its
reset seed and its actions, so that one whose process died, or whose run was interrupted, is brought back by replaying.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import xxhash

from environments import BrokenContract
from environments.numbers import episode_numbers
from environments.section import Section
from utils import EnvironmentFailure, Task, UserError, check_observation, checked_step, create_env

# How often the processes may be restarted at the same step before the run gives up.
MAX_RESTARTS = 3
DIGEST_SIZE = 16

# A frame, a vector, or both by these names.
Observation = np.ndarray | dict[str, np.ndarray]


class SharedArrays:
    """What a group of environments and the trainer tell each other, in anonymous shared memory.

    The memory has no name: it disappears with the last process that maps it, however that process ends. What a task
    does not have is None. Digests, 128 bits wide, are of whole observations; frames beside vectors have their own.

    Args:
        n_workers: number of environments.
        task: gives the shapes.
        context: multiprocessing context.
    """

    frames: np.ndarray | None
    vectors: np.ndarray | None
    final_frames: np.ndarray | None
    final_vectors: np.ndarray | None
    digests: np.ndarray
    final_digests: np.ndarray
    frame_digests: np.ndarray
    final_frame_digests: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    actions: np.ndarray
    masks: np.ndarray | None

    def __init__(self, n_workers: int, task: Task, context: Any) -> None:
        digest = (n_workers, DIGEST_SIZE), np.uint8
        self.layout: dict[str, tuple[tuple[int, ...], Any]] = {
            "digests": digest,
            "final_digests": digest,
            "rewards": ((n_workers,), np.float64),
            "terminated": ((n_workers,), np.bool_),
            "truncated": ((n_workers,), np.bool_),
            "actions": ((n_workers, task.action_size), np.float32 if task.continuous else np.int64),
        }
        if task.frame is not None:  # channels last in memory, as convolutions want them and most environments make them
            frame = (n_workers, *task.frame[1:], task.frame[0]), np.uint8
            self.layout |= {"frames": frame, "final_frames": frame}
        if task.vector:
            vector = (n_workers, task.vector), np.float32
            self.layout |= {"vectors": vector, "final_vectors": vector}
        if task.frame is not None and task.vector:
            self.layout |= {"frame_digests": digest, "final_frame_digests": digest}
        if task.masked:
            self.layout["masks"] = (n_workers, sum(task.branches)), np.bool_
        self.memory = {
            name: context.RawArray("b", int(np.prod(shape)) * np.dtype(dtype).itemsize)
            for name, (shape, dtype) in self.layout.items()
        }
        self.view()

    def view(self) -> None:
        """Make each array an attribute."""
        self.frames = self.vectors = self.final_frames = self.final_vectors = self.masks = None
        for name, (shape, dtype) in self.layout.items():
            setattr(self, name, np.frombuffer(self.memory[name], dtype).reshape(shape))
        if "frame_digests" not in self.layout:
            self.frame_digests, self.final_frame_digests = self.digests, self.final_digests

    def __getstate__(self) -> dict:
        return {"layout": self.layout, "memory": self.memory}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.view()

    def show(self, index: int, observation: Observation, mask: np.ndarray | None = None, final: bool = False) -> None:
        """Write what environment `index` shows, its digest, and which actions are allowed (sum of actions,)."""
        frames, vectors = (self.final_frames, self.final_vectors) if final else (self.frames, self.vectors)
        digests, own = (self.final_digests, self.final_frame_digests) if final else (self.digests, self.frame_digests)
        both = isinstance(observation, dict)
        if frames is not None:
            frames[index] = (observation["frame"] if both else observation).transpose(1, 2, 0)
            own[index] = np.frombuffer(xxhash.xxh3_128_digest(frames[index]), np.uint8)
        if vectors is not None:
            vectors[index] = observation["vector"] if both else observation
            content = vectors[index].tobytes() + (own[index].tobytes() if both else b"")
            digests[index] = np.frombuffer(xxhash.xxh3_128_digest(content), np.uint8)
        if self.masks is not None:
            self.masks[index] = True if mask is None else mask

    def copy_to_final(self, index: int) -> None:
        """Take what environment `index` shows now for what it showed at the end of its episode."""
        for name in ("frames", "vectors", "digests", "frame_digests"):
            if getattr(self, name) is not None:
                getattr(self, f"final_{name}")[index] = getattr(self, name)[index]


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
                raise UserError(f"{type(self.envs[index]).__name__}: episode longer than max_episode_steps, {limit}")
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


def serve(connection: Connection, make_runner: Callable[[], EnvironmentRunner]) -> None:
    """Run in a process of its own: step environments as told until the trainer is gone.

    Args:
        connection: receives ("replay", episodes) or ("step", group); answers ("done", result) or
            ("failed", what went wrong).
        make_runner: creates this process's environments.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's
    # Environments may start processes of their own; those are found by their group and end with this one.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.setpgid(0, 0)
    runner = None
    try:
        while True:
            command, argument = connection.recv()
            try:
                runner = runner or make_runner()
                answer = ("done", getattr(runner, command)(argument))
            except (UserError, BrokenContract) as error:
                answer = ("failed", f"{runner.where() if runner else 'creation'}: {error}")
            except Exception:
                answer = ("failed", f"{runner.where() if runner else 'creation'}:\n{traceback.format_exc().rstrip()}")
            connection.send(answer)
    except (EOFError, OSError):
        pass  # the trainer is gone
    finally:
        for env in runner.envs.values() if runner else ():
            with suppress(Exception):
                env.close()
        kill_group(os.getpid())


def kill_group(leader: int) -> None:
    """Kill what is left of a worker process and of the processes that its environments started."""
    with suppress(OSError):
        os.killpg(leader, signal.SIGKILL)


@dataclass
class Process:
    """One process and what it owes."""

    indices: list[int]
    handle: BaseProcess | None = None
    connection: Connection | None = None
    pending: list[range] = field(default_factory=list)  # groups it was told to step and has not answered for


class Workers:
    """All environments of a run, spread over processes.

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
        methods = multiprocessing.get_all_start_methods()
        # Neither copies the trainer's threads or CUDA context; the fork server imports the environments only once.
        self.context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self.context.set_forkserver_preload(["environments", "worker", "gymnasium"])
        self.arrays = SharedArrays(n_workers, task, self.context)
        edges = [n_workers * group // groups for group in range(groups + 1)]
        self.groups = [range(low, high) for low, high in zip(edges, edges[1:], strict=False) if low < high]
        self.episodes = [Episode() for _ in range(n_workers)]
        self.make_runner = partial(EnvironmentRunner, section, task, self.arrays, episode_seed, first, max_steps)
        count = min(processes, n_workers)
        self.processes = [Process(list(range(first, n_workers, count))) for first in range(count)]
        self.restarts, self.first = 0, first
        self.packed = packed_type(task)

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
        if fresh:
            print(f"environments {sorted(fresh)} are not deterministic and began fresh episodes", file=sys.stderr)
        return fresh

    def send(self, group: range, actions: np.ndarray) -> None:
        """Let the environments of a group step with actions (n, branches)."""
        self.arrays.actions[group.start : group.stop] = actions
        for index, action in zip(group, actions.astype(self.packed), strict=True):
            self.episodes[index].actions += action.tobytes()
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
                kill_group(process.handle.pid)
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
        size = len(episode.actions) - pending * self.packed.itemsize * self.arrays.actions.shape[1]
        return Episode(episode.number, episode.actions[:size], episode.digest, midway)

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
            kill_group(process.handle.pid)
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
