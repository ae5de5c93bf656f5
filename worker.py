"""Environments, in processes of their own, their observations in shared memory.

A process steps several environments. Per step it gets one message (which group of environments to step) and answers
with one (what finished episodes report); everything else goes through shared memory. An episode is determined by its
reset seed and its actions, so that one whose process died, or whose run was interrupted, is brought back by replaying.
The user's code runs there alone: what it does to its process does not reach the trainer.
"""

import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import chdir, suppress
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
from environments.section import Section
from utils import EnvironmentFailure, UserError, create_env, training_seed

# A frame, a vector, or both by these names.
Observation = np.ndarray | dict[str, np.ndarray]
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
    """What W environments and the trainer tell each other, in anonymous shared memory.

    The memory has no name: it disappears with the last process that maps it, however that process ends. Each array has
    a row per environment. Digests are of whole observations, and of their frames.

    Args:
        n_workers: W.
        task: gives the shapes; what it does not have is None.
        context: multiprocessing context.
    """

    frames: np.ndarray | None  # (W, H, W, C), as convolutions want them and most environments make them
    vectors: np.ndarray | None  # (W, n)
    digests: np.ndarray
    frame_digests: np.ndarray
    final_frames: np.ndarray | None  # this and the next: at the end of an episode that was truncated
    final_vectors: np.ndarray | None
    final_digests: np.ndarray
    final_frame_digests: np.ndarray
    masks: np.ndarray | None  # (W, sum of branches): which actions are allowed
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    episode: np.ndarray  # number of the running one
    steps: np.ndarray  # that it has had
    at_work: np.ndarray  # whether it is this environment that its process is busy with

    def __init__(self, n_workers: int, task: Task, context: Any = CONTEXT) -> None:
        layout: dict[str, tuple[tuple[int, ...], Any]] = {
            "rewards": ((), np.float64), "episode": ((), np.int64), "steps": ((), np.int64),
            "actions": ((task.action_size,), np.float32 if task.continuous else np.int64),
        } | dict.fromkeys(("terminated", "truncated", "at_work"), ((), np.bool_))  # fmt: skip
        if task.masked:
            layout["masks"] = (sum(task.branches),), np.bool_
        for prefix in ("", "final_"):
            layout |= dict.fromkeys((f"{prefix}digests", f"{prefix}frame_digests"), ((DIGEST_SIZE,), np.uint8))
            if task.frame is not None:
                layout[f"{prefix}frames"] = (*task.frame[1:], task.frame[0]), np.uint8
            if task.vector:
                layout[f"{prefix}vectors"] = (task.vector,), np.float32
        memory = {}
        for name, (shape, dtype) in layout.items():
            size = n_workers * math.prod(shape) * np.dtype(dtype).itemsize
            memory[name] = (n_workers, *shape), dtype, context.RawArray("b", size)
        self.__setstate__(memory)

    def __getstate__(self) -> dict:
        return self.memory

    def __setstate__(self, memory: dict) -> None:
        self.memory = memory
        self.frames = self.vectors = self.final_frames = self.final_vectors = self.masks = None
        for name, block in memory.items():
            setattr(self, name, np.ndarray(*block))

    def show(self, index: int, observation: Observation, mask: np.ndarray | None = None, final: bool = False) -> None:
        """Write what environment `index` shows, its digest, and which actions are allowed (sum of actions,)."""
        names = ("frames", "frame_digests", "vectors", "digests")
        frames, frame_digests, vectors, digests = (getattr(self, f"final_{name}" if final else name) for name in names)
        frame: Any = observation
        vector: Any = observation
        if isinstance(observation, dict):
            frame, vector = observation["frame"], observation["vector"]
        digest = b""
        if frames is not None:
            frames[index] = frame.transpose(1, 2, 0)
            digest = xxhash.xxh3_128_digest(frames[index])
            frame_digests[index] = np.frombuffer(digest, np.uint8)
        if vectors is not None:
            vectors[index] = vector
            digest = xxhash.xxh3_128_digest(vectors[index].tobytes() + digest)
        digests[index] = np.frombuffer(digest, np.uint8)
        if self.masks is not None:
            self.masks[index] = True if mask is None else mask
        elif mask is not None:
            raise BrokenContract("gives an action_mask, but gave none with its first observations")


@dataclass
class Episode:
    """The running episode of one environment: all that is needed to bring it back.

    Attributes:
        number: how many episodes the environment finished before.
        actions: of each step, a byte per branch where that suffices.
        digest: of the current observation, empty before the first one.
    """

    number: int = 0
    actions: bytearray = field(default_factory=bytearray)
    digest: bytes = b""


def packed_type(task: Task) -> np.dtype:
    """Return how the entries of an action are kept: as small as they fit."""
    return np.dtype(np.float32) if task.continuous else np.min_scalar_type(max(task.branches) - 1)


# ------------------------------------------------------------------------------------------------------ in the process


class Generators:
    """The global generators of a worker process, `random`'s, NumPy's and PyTorch's, with a state for each environment.

    So what an environment draws depends on its episode alone, not on who else is in its process. To save and restore
    their states would take 22 µs (`random`) and 165 µs (NumPy) a step. Pointing to another generator takes less than 1;
    only PyTorch's, where an environment has imported it, is restored, in 2.
    """

    def __init__(self) -> None:
        self.index = -1
        self.python: dict[int, random.Random] = defaultdict(random.Random)
        self.numpy: dict[int, np.random.MT19937] = defaultdict(np.random.MT19937)
        self.torch: dict[int, Any] = {}
        for name in random.__all__:
            if name.islower():
                setattr(random, name, partial(self._draw, name))

    def _draw(self, name: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self.python[self.index], name)(*arguments, **options)

    def use(self, index: int) -> None:
        """Let the generators be those of an environment."""
        if torch := sys.modules.get("torch"):
            self.torch[self.index] = torch.default_generator.get_state()
            if index in self.torch:
                torch.default_generator.set_state(self.torch[index])
        np.random.set_bit_generator(self.numpy[index])  # type: ignore[attr-defined]
        self.index = index

    def seed(self, *numbers: int) -> None:
        """Seed those that are in use, by all of the numbers."""
        seed = xxhash.xxh3_64_intdigest(repr(numbers).encode())
        self.python[self.index].seed(seed)
        np.random.seed(seed % 2**32)
        if torch := sys.modules.get("torch"):
            torch.default_generator.manual_seed(seed)


@dataclass
class EnvironmentRunner:
    """The environments of one process: they step as told, and an episode that was lost is brought back."""

    section: Section
    task: Task
    arrays: SharedArrays  # shared with the trainer
    episode_seed: Callable[[int, int], int]  # (environment, episode) → reset seed
    first: int  # number of the run's environment that has index 0 here
    max_steps: int | None  # after how many an episode is cut and its report marked so; None where only its end ends it
    indices: range  # of the environments that this process steps

    def __post_init__(self) -> None:
        self.generators, self.current = Generators(), self.indices[0]
        self.envs: dict[int, Any] = {}
        self.lost: list[int] = []  # environments whose next step was lost with an episode that cannot be repeated
        for index in self.indices:
            self._turn_to(index)
            self._seed(index)
            self.envs[index] = create_env(self.section)

    def _turn_to(self, index: int) -> None:
        self.arrays.at_work[self.current] = False
        self.arrays.at_work[index] = True
        self.current = index
        self.generators.use(index)

    def _seed(self, index: int) -> int:
        """Seed the global generators for an environment's episode; return its reset seed."""
        number, episode = self.first + index, int(self.arrays.episode[index])
        seed = self.episode_seed(number, episode)
        self.generators.seed(seed, number, episode)
        return seed

    def _reset(self, index: int, episode: int) -> None:
        self.arrays.episode[index], self.arrays.steps[index] = episode, 0
        observation, info = self.envs[index].reset(seed=self._seed(index))
        self.arrays.show(index, observation, info.get("action_mask"))

    def inspect(self, _: None) -> tuple[tuple, list[str]]:
        """Play a step of the first environment and close it; return the entries of its `Task`, and notices."""
        env = self.envs.pop(self.indices[0])
        try:
            task = try_out(env, self.episode_seed(0, 0))
        except Exception as error:
            raise UserError(f"environment: {failure_of(error)}") from error
        notices = [f"environment: {notice}" for notice in env.notices]
        try:
            env.close()
        except Exception as error:
            notices.append(f"environment: close() fails, which is ignored: {failure_of(error)}")
        return astuple(task), notices

    def replay(self, episodes: dict[int, tuple[int, bytearray, bytes]]) -> list[int]:
        """Bring running episodes back, by environment the entries of an `Episode`.

        Returns:
            The environments where that failed, for they are not deterministic, and a fresh episode began.
        """
        return [index for index, episode in episodes.items() if not self._replay(index, *episode)]

    def replay_midway(self, episodes: dict[int, tuple[int, bytearray, bytes]]) -> list[int]:
        """As `replay`, in the middle of a rollout: an episode that is lost is truncated where it was."""
        arrays = self.arrays
        for index, (_, _, digest) in episodes.items():
            for name in ("frames", "frame_digests", "vectors"):
                if getattr(arrays, name) is not None:
                    getattr(arrays, f"final_{name}")[index] = getattr(arrays, name)[index]
            arrays.final_digests[index] = np.frombuffer(digest, np.uint8)
        self.lost = self.replay(episodes)
        return self.lost

    def _replay(self, index: int, number: int, packed: bytearray, digest: bytes) -> bool:
        arrays, task = self.arrays, self.task
        self._turn_to(index)
        self._reset(index, number)
        actions = np.frombuffer(packed, packed_type(task)).reshape(-1, task.action_size)
        for action in actions.astype(arrays.actions.dtype):
            arrays.steps[index] += 1
            observation, _, terminated, truncated, info = self.envs[index].step(action)
            if terminated or truncated:
                break
            arrays.show(index, observation, info.get("action_mask"))
        if arrays.steps[index] == len(actions) and (not digest or arrays.digests[index].tobytes() == digest):
            return True
        self._reset(index, number + 1)
        return False

    def step(self, group: range) -> list[tuple[int, dict]]:
        """Step this process's environments of a group; return (environment, info) of episodes that ended."""
        return [ended for index in self.envs if index in group for ended in self._step(index)]

    def _step(self, index: int) -> list[tuple[int, dict]]:
        arrays, env = self.arrays, self.envs[index]
        if index in self.lost:
            self.lost.remove(index)
            arrays.rewards[index], arrays.terminated[index], arrays.truncated[index] = 0.0, False, True
            return []
        self._turn_to(index)
        arrays.steps[index] += 1
        steps, limit = int(arrays.steps[index]), self.task.max_episode_steps
        observation, arrays.rewards[index], terminated, truncated, info = env.step(arrays.actions[index].copy())
        cut = steps == self.max_steps and not (terminated or truncated)
        truncated |= cut
        arrays.terminated[index], arrays.truncated[index] = terminated, truncated and not terminated
        if not (terminated or truncated):
            if limit is not None and steps >= limit:
                raise BrokenContract(f"episode longer than max_episode_steps, {limit}")
            arrays.show(index, observation, info.get("action_mask"))
            return []
        if arrays.truncated[index]:
            arrays.show(index, observation, final=True)
        report = env.numbers_so_far() | {"cut": 1.0} if cut else info
        self._reset(index, int(arrays.episode[index]) + 1)
        return [(index, {name: float(number) for name, number in report.items()})]

    def close(self) -> None:
        """Close the environments; where that fails, it was told when one was inspected."""
        for env in self.envs.values():
            with suppress(Exception):
                env.close()


def serve(connection: Any, make: Callable[[], EnvironmentRunner], folder: str) -> None:
    """Run in a process of its own: let a runner do what is told until the trainer is gone.

    Args:
        connection: receives (method, argument); answers (method, result), or ("refused" or "failed", the reason).
        make: creates the runner.
        folder: that the trainer runs in.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's
    # Environments may start processes of their own; those are found by their group and end with this one.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.setpgid(0, 0)
    threading.Thread(target=outlive, args=(multiprocessing.parent_process(),), daemon=True).start()
    os.chdir(folder)
    sys.argv = ["worker"]  # for modules that parse their command line when they are imported
    put_first([folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    runner = None
    try:
        while True:
            command, argument = connection.recv()
            try:
                runner = runner or make()
                answer = command, getattr(runner, command)(argument)
            except (UserError, BrokenContract) as error:
                answer = "refused", str(error)
            except SystemExit as error:
                answer = "failed", failure_of(error)
            except BaseException:
                answer = "failed", f"it raised\n{traceback.format_exc().rstrip()}"
            connection.send(answer)
    except (EOFError, OSError):
        pass  # the trainer is gone
    finally:
        if runner is not None:
            runner.close()
        kill_group(os.getpid())


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
    """One process, which starts at once.

    Args:
        make: creates its runner; picklable.
        indices: of the environments that it steps.
        command: a method of the runner, the first that it is told.
        argument: of the method.
    """

    def __init__(
        self, make: Callable[[range], EnvironmentRunner], indices: range, command: str, argument: Any = None
    ) -> None:
        start_server()
        self.indices = indices
        self.pending: list[range] = []  # groups that it was told to step and has not answered for
        self.connection, theirs = CONTEXT.Pipe()
        self.handle = CONTEXT.Process(target=serve, args=(theirs, partial(make, indices), os.getcwd()), daemon=True)
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:  # otherwise the process would import it, PyTorch and all
            self.handle.start()
        finally:
            sys.modules["__main__"] = main
        theirs.close()
        self.tell(command, argument)

    def tell(self, command: str, argument: Any) -> None:
        """Send a command; that the process is dead is noticed when its answer is read."""
        with suppress(OSError):
            self.connection.send((command, argument))

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
        UserError: if it cannot be created or breaks the contract, naming how.
        EnvironmentFailure: if it ends its process.
    """
    unknown, seed = Task(None, 1, (1,), 0, None), partial(training_seed, 0, section)
    make = partial(EnvironmentRunner, section, unknown, SharedArrays(1, unknown), seed, 0, None)
    process = Process(make, range(1), "inspect")
    try:
        kind, answer = process.read()
    finally:
        process.end(time.monotonic() + CLOSE_SECONDS)
    if kind == "refused":
        raise UserError(answer)
    if kind != "inspect":
        raise EnvironmentFailure(f"environment: {answer}")
    return Task(*answer[0]), answer[1]


class Workers:
    """The environments of a run, or this rank's share of them, spread over processes.

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
        stop: says whether the run was asked to stop, so that environments have `STOP_SECONDS` left. It is asked only
            while they are waited for, twice a second.
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
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.arrays = SharedArrays(n_workers, task)
        edges = [n_workers * group // groups for group in range(groups + 1)]
        self.groups = [range(low, high) for low, high in zip(edges, edges[1:], strict=False) if low < high]
        self.episodes = [Episode() for _ in range(n_workers)]
        self.episode_seed, self.first, self.stop = episode_seed, first, stop
        self.restarts, self.packed = 0, packed_type(task)
        self.deadline = np.inf  # of the environments, once a stop was asked
        self.make = partial(EnvironmentRunner, section, task, self.arrays, episode_seed, first, max_steps)
        count = min(processes, n_workers)
        self.shares = [range(own, n_workers, count) for own in range(count)]
        self.processes: list[Process] = []

    def state_dict(self) -> dict[str, list]:
        """Return the running episodes: number, actions and digest, each a list with an entry per environment."""
        import torch  # which the processes, that import this module, do without

        return {
            "number": [episode.number for episode in self.episodes],
            "actions": [torch.tensor(episode.actions, dtype=torch.uint8) for episode in self.episodes],
            "digest": [episode.digest.hex() for episode in self.episodes],
        }

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Take running episodes from what `state_dict` returned; `start` brings them back."""
        entries = zip(self.episodes, state["number"], state["actions"], state["digest"], strict=True)
        self.episodes = [
            Episode(number, bytearray(actions.numpy().tobytes()), bytes.fromhex(digest))
            for _, number, actions, digest in entries
        ]

    def start(self) -> list[int]:
        """Start all processes and bring `episodes` back; return the environments that had to begin a fresh one."""
        self.processes = [self._launched(share, []) for share in self.shares]
        fresh = sorted(index for place in range(len(self.shares)) for index in self._answer(place))
        self._tell_of(fresh)
        for index in fresh:
            self.episodes[index] = Episode(self.episodes[index].number + 1)
        for episode, digest in zip(self.episodes, self.arrays.digests, strict=True):
            episode.digest = digest.tobytes()
        return fresh

    def send(self, group: range, actions: np.ndarray) -> None:
        """Let the environments of a group step with actions (n, branches)."""
        self.arrays.actions[group.start : group.stop] = actions
        for process in self.processes:
            if any(index in group for index in process.indices):
                process.pending.append(group)
                process.tell("step", group)

    def receive(self, group: range) -> list[tuple[int, dict]]:
        """Wait for a group; return (environment, info) of ended episodes by environment; the rest is in `arrays`.

        Raises:
            EnvironmentFailure: if an environment fails, or hangs when the run is to stop; the message says which, its
                seed and its step.
        """
        ended, arrays = [], self.arrays
        for place, process in enumerate(self.processes):
            if group in process.pending:
                ended += self._answer(place)
                self.processes[place].pending.remove(group)
        for index in group:
            if arrays.terminated[index] or arrays.truncated[index]:
                self.episodes[index] = Episode(self.episodes[index].number + 1)
            else:
                self.episodes[index].actions += arrays.actions[index].astype(self.packed).tobytes()
            self.episodes[index].digest = arrays.digests[index].tobytes()
        self.restarts = 0
        return sorted(ended, key=lambda pair: pair[0])

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.connection.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for process in self.processes:
            process.end(deadline)

    def _launched(self, indices: range, pending: list[range]) -> Process:
        """Return a new process that replays its episodes, and then steps the groups that are pending."""
        self.arrays.at_work[indices] = False
        episodes = {index: astuple(self.episodes[index]) for index in indices}
        process = Process(self.make, indices, "replay_midway" if pending else "replay", episodes)
        process.pending = pending
        for group in pending:
            process.tell("step", group)
        return process

    def _answer(self, place: int) -> list:
        """Return a process's next answer; where it died, its successor replays and is told all it was told."""
        while True:
            process = self.processes[place]
            self._wait_for(process)
            kind, answer = process.read()
            if kind in ("failed", "refused"):
                raise EnvironmentFailure(f"{self._where(process)}: {answer}")
            if kind == "died":
                self._replace(place, answer)
            elif kind == "replay_midway":
                self._tell_of(answer)
            else:
                return answer

    def _replace(self, place: int, death: str) -> None:
        """Put a new process in the place of one that died, unless that goes on and on."""
        process, self.restarts = self.processes[place], self.restarts + 1
        what = f"{self._where(process)}: {death}"
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
        index = next((index for index in process.indices if arrays.at_work[index]), process.indices[0])
        seed = self.episode_seed(self.first + index, int(arrays.episode[index]))
        return f"environment {self.first + index}, reset seed {seed}, step {arrays.steps[index]}"
