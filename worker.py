"""Environments, in processes of their own, their observations in shared memory.

A process steps several environments. Per step it gets one message (which group of environments to step) and answers
with one (what finished episodes report); everything else goes through shared memory. An episode is determined by its
reset seed and its actions, so that one whose process died, or whose run was interrupted, is brought back by replaying.
The user's code runs there alone: what it does to its process does not reach the trainer.
"""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import chdir, closing, suppress
from dataclasses import astuple, dataclass, field
from functools import cache, partial
from importlib.machinery import PathFinder
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import xxhash

from environments import BrokenContract
from environments.contract import Task, failure_of, try_out
from environments.gymnasium_env import GymnasiumSection
from environments.section import Section
from utils import EnvironmentFailure, UserError, create_env, training_seed

DIGEST_SIZE = 16
# How often the processes may be restarted at the same step before the run gives up.
MAX_RESTARTS = 3
# Seconds: between two looks whether the run is to stop; that a step may still take then; that closing may take.
LOOK_SECONDS, STOP_SECONDS, CLOSE_SECONDS = 0.5, 10, 5
ROOT = Path(__file__).resolve().parent
# Processes are forked from a server that has imported our modules once, and has neither our threads nor a CUDA context.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["worker", "gymnasium"])


class SharedArrays:
    """What W environments and the trainer tell each other, a row per environment, in anonymous shared memory.

    The memory has no name: it disappears with the last process that maps it, however that process ends. What a task
    does not have is None.
    """

    frames: np.ndarray | None  # (W, H, W, C), as convolutions want them and most environments make them
    vectors: np.ndarray | None  # (W, n)
    masks: np.ndarray | None  # (W, sum of branches): which actions are allowed
    digests: np.ndarray  # of whole observations
    frame_digests: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    episode: np.ndarray  # number of the running one
    steps: np.ndarray  # that it has had
    current: np.ndarray  # of the first environment of a process: which one the process is busy with

    def __init__(self, n_workers: int, task: Task) -> None:
        layout: dict[str, tuple[tuple[int, ...], Any]] = {
            "actions": ((task.action_size,), np.float32 if task.continuous else np.int64), "rewards": ((), np.float64),
            **dict.fromkeys(("digests", "frame_digests"), ((DIGEST_SIZE,), np.uint8)),
            **dict.fromkeys(("terminated", "truncated"), ((), np.bool_)),
            **dict.fromkeys(("episode", "steps", "current"), ((), np.int64)),
        }  # fmt: skip
        if task.frame is not None:
            layout["frames"] = (*task.frame[1:], task.frame[0]), np.uint8
        if task.vector:
            layout["vectors"] = (task.vector,), np.float32
        if task.masked:
            layout["masks"] = (sum(task.branches),), np.bool_
        self.__setstate__({
            name: ((n_workers, *shape), dtype, CONTEXT.RawArray("b", np.empty((n_workers, *shape), dtype).nbytes))
            for name, (shape, dtype) in layout.items()
        })  # fmt: skip

    def __getstate__(self) -> dict:
        return self.memory

    def __setstate__(self, memory: dict) -> None:
        self.memory = memory
        self.frames = self.vectors = self.masks = None
        for name, block in memory.items():
            setattr(self, name, np.ndarray(*block))

    def show(self, index: int, observation: Any, mask: np.ndarray | None = None) -> None:
        """Write what a `GymnasiumEnv` shows, its digest, and which actions are allowed (sum of branches,)."""
        parts = observation if isinstance(observation, dict) else dict.fromkeys(("frame", "vector"), observation)
        digest = b""
        if self.frames is not None:
            self.frames[index] = parts["frame"].transpose(1, 2, 0)
            digest = xxhash.xxh3_128_digest(self.frames[index])
            self.frame_digests[index] = np.frombuffer(digest, np.uint8)
        if self.vectors is not None:
            self.vectors[index] = parts["vector"]
            digest = xxhash.xxh3_128_digest(self.vectors[index].tobytes() + digest)
        self.digests[index] = np.frombuffer(digest, np.uint8)
        if self.masks is not None:
            self.masks[index] = True if mask is None else mask
        elif mask is not None:
            raise BrokenContract("gives an action_mask, but gave none with its first observations")


@dataclass
class Episode:
    """The running episode of one environment: all that is needed to bring it back."""

    number: int = 0  # how many the environment finished before
    actions: bytearray = field(default_factory=bytearray)  # of each step, a byte per branch where that suffices
    digest: bytes = b""  # of the current observation, empty before the first one


def packed_type(task: Task) -> np.dtype:
    """Return how the entries of an action are kept: as small as they fit."""
    return np.dtype(np.float32) if task.continuous else np.min_scalar_type(max(task.branches) - 1)


# ------------------------------------------------------------------------------------------------------ in the process


def seed_generators(*numbers: int) -> None:
    """Seed the global generators, `random`'s, NumPy's and PyTorch's where it is imported, by all of the numbers.

    Before every step of an environment that the user brings, so that what it draws depends on its episode and its step
    alone. The other types draw from their own generators, and are spared the 8 µs.
    """
    seed = xxhash.xxh3_64_intdigest(repr(numbers).encode())
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(seed)


@dataclass
class EnvironmentRunner:
    """The environments of one process: they go on with the episodes that they are in, and step as told."""

    section: Section
    task: Task
    arrays: SharedArrays  # shared with the trainer
    final: SharedArrays  # in which is shown what ends an episode that is truncated
    episode_seed: Callable[[int, int], int]  # (environment, episode) → reset seed
    first: int  # number of the run's environment that has index 0 here
    max_steps: int | None  # after how many an episode is cut and its report marked so; None where only its end ends it
    episodes: dict[int, Episode]  # of the environments that this process steps
    midway: bool  # whether a rollout is running, in which an episode that cannot be repeated counts as truncated

    def __post_init__(self) -> None:
        self.envs: dict[int, Any] = {}
        self.identity: dict[int, tuple[int, int, int]] = {}  # of each one's episode: seed, environment, number
        for index in self.episodes:
            self._turn_to(index, 0)
            self.envs[index] = create_env(self.section)
        fresh = [index for index, episode in self.episodes.items() if not self._replay(index, episode)]
        self.lost = fresh if self.midway else []  # environments whose next step was lost with their episode

    def _turn_to(self, index: int, episode: int) -> int:
        """Go on with an environment at the start of an episode; return its reset seed."""
        number, arrays = self.first + index, self.arrays
        arrays.current[min(self.episodes)], arrays.episode[index], arrays.steps[index] = index, episode, 0
        self.identity[index] = self.episode_seed(number, episode), number, episode
        seed_generators(*self.identity[index])
        return self.identity[index][0]

    def _reset(self, index: int, episode: int) -> None:
        observation, info = self.envs[index].reset(seed=self._turn_to(index, episode))
        self.arrays.show(index, observation, info.get("action_mask"))

    def _take(self, index: int, action: np.ndarray) -> tuple[Any, float, bool, bool, Mapping]:
        """Take the next step of an environment; return what it returns."""
        arrays = self.arrays
        arrays.current[min(self.episodes)] = index
        arrays.steps[index] += 1
        if isinstance(self.section, GymnasiumSection):
            seed_generators(*self.identity[index], int(arrays.steps[index]))
        return self.envs[index].step(action)

    def _replay(self, index: int, episode: Episode) -> bool:
        """Bring a running episode back; return False where that fails, for it is not deterministic, and begin anew."""
        arrays, task = self.arrays, self.task
        for name in arrays.memory:  # its last observation counts as its final one if it cannot be brought back
            getattr(self.final, name)[index] = getattr(arrays, name)[index]
        self._reset(index, episode.number)
        actions = np.frombuffer(episode.actions, packed_type(task)).reshape(-1, task.action_size)
        for action in actions.astype(arrays.actions.dtype):
            observation, _, terminated, truncated, info = self._take(index, action)
            if terminated or truncated:
                break
            arrays.show(index, observation, info.get("action_mask"))
        same = not episode.digest or arrays.digests[index].tobytes() == episode.digest
        if same and arrays.steps[index] == len(actions):
            return True
        self._reset(index, episode.number + 1)
        return False

    def step(self, index: int) -> list[tuple[int, dict | None]]:
        """Step an environment; if that ends its episode, return its index and report, None for a lost episode."""
        arrays, env = self.arrays, self.envs[index]
        if index in self.lost:
            self.lost.remove(index)
            arrays.rewards[index], arrays.terminated[index], arrays.truncated[index] = 0.0, False, True
            return [(index, None)]
        result = self._take(index, arrays.actions[index].copy())
        observation, arrays.rewards[index], terminated, truncated, info = result
        steps, limit = arrays.steps[index], self.task.max_episode_steps
        cut = steps == self.max_steps and not (terminated or truncated)
        truncated |= cut
        arrays.terminated[index], arrays.truncated[index] = terminated, truncated and not terminated
        if not (terminated or truncated):
            if limit is not None and steps >= limit:
                raise BrokenContract(f"episode longer than max_episode_steps, {limit}")
            arrays.show(index, observation, info.get("action_mask"))
            return []
        if arrays.truncated[index]:
            self.final.show(index, observation)
        report = env.numbers_so_far() | {"cut": 1.0} if cut else info
        self._reset(index, int(arrays.episode[index]) + 1)
        return [(index, {name: float(number) for name, number in report.items()})]

    def close(self) -> None:
        """Close the environments; where that fails, it was told when one was inspected."""
        for env in self.envs.values():
            with suppress(Exception):
                env.close()


def stepped(make: Callable[[], EnvironmentRunner], groups: Iterator[range]) -> Iterator[list[tuple[int, dict | None]]]:
    """Let a runner step group after group; yield its answers."""
    with closing(make()) as runner:
        for group in groups:
            yield [ended for index in runner.envs if index in group for ended in runner.step(index)]


def inspected(section: Section, _: Iterator) -> Iterator[tuple[tuple, list[str]]]:
    """Create an environment, play a step of it and close it; yield the entries of its `Task`, and notices."""
    seed = training_seed(0, section, 0, 0)
    seed_generators(seed, 0, 0)
    env = create_env(section)
    try:
        task = try_out(env, seed)
    except Exception as error:
        raise UserError(f"environment: {failure_of(error)}") from error
    notices = [f"environment: {notice}" for notice in env.notices]
    try:
        env.close()
    except Exception as error:
        notices.append(f"environment: close() fails, which is ignored: {failure_of(error)}")
    yield astuple(task), notices


def serve(connection: Any, work: Callable[[Iterator], Generator], folder: str) -> None:
    """Run in a process of its own: answer each message by ("done", answer), or at last ("refused" or "failed", why).

    What is sent has only Python's types: the user may have a module that is called as that of ours which has another.
    The current folder is that of the trainer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's
    # Environments may start processes of their own; those are found by their group and end with this one.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.setpgid(0, 0)
    threading.Thread(target=outlive, args=(multiprocessing.parent_process(),), daemon=True).start()
    os.chdir(folder)
    sys.argv = ["worker"]  # for modules that parse their command line when they are imported
    put_first([folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    try:
        with closing(work(received(connection))) as answers:
            for answer in answers:
                connection.send(("done", answer))
    except (UserError, BrokenContract) as error:
        connection.send(("refused", str(error)))
    except SystemExit as error:
        connection.send(("failed", failure_of(error)))
    except BaseException:
        connection.send(("failed", f"it raised\n{traceback.format_exc().rstrip()}"))
    finally:
        kill_group(os.getpid())


def received(connection: Any) -> Iterator[Any]:
    """Yield what comes, until the other end is closed."""
    with suppress(EOFError, OSError):
        while True:
            yield connection.recv()


def outlive(trainer: Any) -> None:
    """Wait for the trainer's end, and end this process some time later if an environment hangs."""
    trainer.join()
    time.sleep(CLOSE_SECONDS)
    kill_group(os.getpid())


def put_first(folders: list[str]) -> None:
    """Let modules of the user's folders be found before ours, also those that are called as one of ours is."""
    theirs = [folder for folder in folders if folder and Path(folder).resolve() != ROOT]
    sys.path[:0] = theirs
    files = {name: Path(getattr(module, "__file__", None) or "/") for name, module in sys.modules.items()}
    for ours in [name for name, path in files.items() if path in (ROOT / f"{name}.py", ROOT / name / "__init__.py")]:
        found = PathFinder.find_spec(ours, theirs)
        if found is not None and found.origin is not None:  # not a folder without Python
            for name in [name for name in files if name.split(".")[0] == ours]:
                del sys.modules[name]  # those who have imported it keep it


def kill_group(leader: int) -> None:
    """Kill what is left of a worker process and of the processes that its environments started."""
    with suppress(OSError):
        os.killpg(leader, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------ in the trainer


class Process:
    """One process that does some work, see `serve`, for its environments; it begins with the pending groups at once."""

    def __init__(self, work: Callable[[Iterator], Iterator], indices: range, pending: Sequence[range] = ()) -> None:
        start_server()
        self.indices, self.pending = indices, list[range]()
        self.connection, theirs = CONTEXT.Pipe()
        self.handle = CONTEXT.Process(target=serve, args=(theirs, work, os.getcwd()), daemon=True)
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:  # otherwise the process would import it, PyTorch and all
            self.handle.start()
        finally:
            sys.modules["__main__"] = main
        theirs.close()
        for group in pending:
            self.send(group)

    def send(self, group: range) -> None:
        """Let it step a group; that the process is dead is noticed when its answer is read."""
        self.pending.append(group)
        with suppress(OSError):
            self.connection.send(group)

    def read(self) -> tuple[str, Any]:
        """Wait for the next answer of `serve`; or return ("died", how)."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.end(time.monotonic() + CLOSE_SECONDS)
            return "died", f"its process died (exit code {self.handle.exitcode})"

    def end(self, deadline: float) -> None:
        """Let it end by itself until a time of `time.monotonic`, then kill it."""
        self.connection.close()
        self.handle.join(timeout=max(0.0, deadline - time.monotonic()))
        self.handle.kill()
        self.handle.join()
        kill_group(self.handle.pid)


@cache
def start_server() -> None:
    """Start what processes are forked from, where it finds our modules and not others of their names.

    Once, before there are threads that might open a file in the current folder.
    """
    with chdir(ROOT):
        forkserver.ensure_running()


def inspect_environment(section: Section) -> tuple[Task, list[str]]:
    """Create an environment in a process of its own, play one step; return what it is like, and notices for its user.

    Raises:
        UserError: if it cannot be created or breaks the contract.
        EnvironmentFailure: if it ends its process.
    """
    process = Process(partial(inspected, section), range(1))
    try:
        kind, answer = process.read()
    finally:
        process.end(time.monotonic() + CLOSE_SECONDS)
    if kind == "refused":
        raise UserError(answer)
    if kind != "done":
        raise EnvironmentFailure(f"environment: {answer}")
    return Task(*answer[0]), answer[1]


class Workers:
    """The environments of a run, or this rank's share of them, spread over processes.

    Results do not depend on the number of processes: every environment has episodes of its own, and groups are given.

    Args:
        n_workers: number of environments.
        episode_seed: (environment, episode) → reset seed; picklable.
        groups: number of groups of neighbouring environments that are stepped independently.
        first: number of the run's environment that has index 0 here.
        max_steps: after how many steps an episode is cut, None where only its end ends it.
        stop: says whether the run was asked to stop, so that environments have `STOP_SECONDS` left. It is asked only
            while they are waited for, twice a second.
    """

    def __init__(
        self, section: Section, task: Task, n_workers: int, episode_seed: Callable[[int, int], int], processes: int,
        groups: int = 1, first: int = 0, max_steps: int | None = None, stop: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.arrays, self.final = SharedArrays(n_workers, task), SharedArrays(n_workers, task)
        edges = [n_workers * group // groups for group in range(groups + 1)]
        self.groups = [range(low, high) for low, high in zip(edges, edges[1:], strict=False) if low < high]
        self.episodes = [Episode() for _ in range(n_workers)]
        self.episode_seed, self.first, self.stop = episode_seed, first, stop
        self.restarts, self.packed = 0, packed_type(task)
        self.deadline = np.inf  # of the environments, once a stop was asked
        self.make = partial(EnvironmentRunner, section, task, self.arrays, self.final, episode_seed, first, max_steps)
        count = min(processes, n_workers)
        self.shares = [range(own, n_workers, count) for own in range(count)]
        self.processes: list[Process] = []

    def state_dict(self) -> dict[str, list]:
        """Return the running episodes: number, actions and digest, each a list with an entry per environment."""
        import torch  # which the processes, that import this module, do without

        actions = [np.frombuffer(episode.actions, dtype=np.uint8).copy() for episode in self.episodes]
        return {
            "number": [episode.number for episode in self.episodes],
            "actions": [torch.from_numpy(taken) for taken in actions],
            "digest": [episode.digest.hex() for episode in self.episodes],
        }

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Take running episodes from what `state_dict` returned; `start` brings them back."""
        self.episodes = [
            Episode(number, bytearray(actions.numpy().tobytes()), bytes.fromhex(digest))
            for number, actions, digest in zip(state["number"], state["actions"], state["digest"], strict=True)
        ]

    def start(self) -> list[int]:
        """Start all processes and bring `episodes` back; return the environments that had to begin a fresh one."""
        nothing = range(0)
        self.processes = [self._launched(share, [nothing]) for share in self.shares]
        for place in range(len(self.shares)):
            self._answer(place, nothing)
        fresh = [index for index, episode in enumerate(self.episodes) if self.arrays.episode[index] != episode.number]
        self._tell_of(fresh)
        for index, digest in enumerate(self.arrays.digests):
            if index in fresh:
                self.episodes[index] = Episode(self.episodes[index].number + 1)
            self.episodes[index].digest = digest.tobytes()
        return fresh

    def send(self, group: range, actions: np.ndarray) -> None:
        """Let the environments of a group step with actions (n, branches)."""
        self.arrays.actions[group.start : group.stop] = actions
        for process in self.processes:
            if any(index in group for index in process.indices):
                process.send(group)

    def receive(self, group: range) -> list[tuple[int, dict]]:
        """Wait for a group; return (environment, info) of ended episodes by environment; the rest is in `arrays`.

        Raises:
            EnvironmentFailure: if one fails, or hangs when the run is to stop; it says which, its seed and its step.
        """
        places = [place for place, process in enumerate(self.processes) if group in process.pending]
        ended = dict(sorted(pair for place in places for pair in self._answer(place, group)))
        self._tell_of([index for index, report in ended.items() if report is None])
        arrays = self.arrays
        for index in group:
            if arrays.terminated[index] or arrays.truncated[index]:
                self.episodes[index] = Episode(self.episodes[index].number + 1)
            else:
                self.episodes[index].actions += arrays.actions[index].astype(self.packed).tobytes()
            self.episodes[index].digest = arrays.digests[index].tobytes()
        self.restarts = 0
        return [(index, report) for index, report in ended.items() if report is not None]

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.connection.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for process in self.processes:
            process.end(deadline)

    def _launched(self, indices: range, pending: list[range]) -> Process:
        """Return a new process that brings its episodes back, and then steps the groups that are pending."""
        self.arrays.current[indices[0]] = indices[0]
        episodes = {index: self.episodes[index] for index in indices}
        return Process(partial(stepped, partial(self.make, episodes, any(pending))), indices, pending)

    def _answer(self, place: int, group: range) -> list:
        """Return a process's answer of a group; where it died, its successor is told all that it was told."""
        while True:
            process = self.processes[place]
            self._wait_for(process)
            kind, answer = process.read()
            if kind == "done":
                process.pending.remove(group)
                return answer
            what = f"{self._where(process)}: {answer}"
            if kind != "died":
                raise EnvironmentFailure(what)
            self.restarts += 1
            if self.restarts > MAX_RESTARTS:
                raise EnvironmentFailure(f"{what} {self.restarts} times at the same step")
            print(f"\n{what}; replaying its episodes", file=sys.stderr)
            self.processes[place] = self._launched(process.indices, process.pending)

    def _wait_for(self, process: Process) -> None:
        """Wait for a process; raise EnvironmentFailure where it takes too long after a stop was asked for."""
        while not process.connection.poll(LOOK_SECONDS):
            if self.stop():
                self.deadline = min(self.deadline, time.monotonic() + STOP_SECONDS)
            if time.monotonic() > self.deadline:
                for late in self.processes:
                    late.end(0.0)
                raise EnvironmentFailure(f"{self._where(process)}: hangs, {STOP_SECONDS} s after a stop was asked for")

    def _tell_of(self, fresh: list[int]) -> None:
        if fresh:
            numbers = [self.first + index for index in fresh]
            print(f"environments {numbers} are not deterministic and began fresh episodes", file=sys.stderr)

    def _where(self, process: Process) -> str:
        """Name the environment that a process is busy with, its episode and its step."""
        arrays = self.arrays
        index = int(arrays.current[process.indices[0]])
        seed = self.episode_seed(self.first + index, int(arrays.episode[index]))
        return f"environment {self.first + index}, reset seed {seed}, step {arrays.steps[index]}"
