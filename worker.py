"""Environments, in processes of their own, their observations in shared memory.

A process steps several environments. Per step it gets one message (which group of environments to step) and answers
with one (what finished episodes report); everything else goes through shared memory. An episode is determined by its
reset seed and its actions, so that one whose process died, or whose run was interrupted, is brought back by replaying.
The user's code runs there alone: what it does to its process does not reach the trainer.
"""

import multiprocessing
import os
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
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
from environments.contract import Task, check_observation, checked_step, try_out
from environments.numbers import episode_numbers
from environments.section import Section
from utils import EnvironmentFailure, UserError, create_env, derived_seed, reason_of

# A frame, a vector, or both by these names.
Observation = np.ndarray | dict[str, np.ndarray]
DIGEST_SIZE = 16
# How often the processes may be restarted at the same step before the run gives up.
MAX_RESTARTS = 3
# Seconds: between two looks whether the run is to stop, and that a step may still take then; that closing may take.
LOOK_SECONDS, STOP_SECONDS, CLOSE_SECONDS = 0.5, 10.0, 5.0
ROOT = Path(__file__).resolve().parent
# Processes are forked from a server that has imported our modules once, and neither our threads nor a CUDA context.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["worker", "gymnasium"])


class SharedArrays:
    """What W environments and the trainer tell each other, in anonymous shared memory.

    The memory has no name: it disappears with the last process that maps it, however that process ends. What a task
    does not have is None. `final_…` are what an episode that was truncated showed at its end. Digests are of whole
    observations; frames beside vectors have their own.

    Args:
        n_workers: W.
        task: gives the shapes.
        context: multiprocessing context.
    """

    frames: np.ndarray | None  # (W, H, W, C), as convolutions want them and most environments make them
    vectors: np.ndarray | None  # (W, n)
    digests: np.ndarray
    frame_digests: np.ndarray
    final_frames: np.ndarray | None
    final_vectors: np.ndarray | None
    final_digests: np.ndarray
    final_frame_digests: np.ndarray
    masks: np.ndarray | None  # (W, sum of branches), which actions are allowed
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    episode: np.ndarray  # number of the running one
    steps: np.ndarray  # of it
    at_work: np.ndarray  # whether its process is busy with this environment

    def __init__(self, n_workers: int, task: Task, context: Any = CONTEXT) -> None:
        shown: dict[str, tuple[tuple[int, ...], Any]] = {"digests": ((DIGEST_SIZE,), np.uint8)}
        if task.frame is not None:
            shown["frames"] = (*task.frame[1:], task.frame[0]), np.uint8
        if task.vector:
            shown["vectors"] = (task.vector,), np.float32
        if task.frame is not None and task.vector:
            shown["frame_digests"] = shown["digests"]
        kinds: dict[str, Any] = {"rewards": np.float64, "episode": np.int64, "steps": np.int64}
        kinds |= dict.fromkeys(("terminated", "truncated", "at_work"), np.bool_)
        layout = shown | {f"final_{name}": entry for name, entry in shown.items()}
        layout |= {name: ((), kind) for name, kind in kinds.items()}
        layout["actions"] = (task.action_size,), np.float32 if task.continuous else np.int64
        if task.masked:
            layout["masks"] = (sum(task.branches),), np.bool_
        memory = {}
        for name, (shape, dtype) in layout.items():
            size = n_workers * int(np.prod(shape)) * np.dtype(dtype).itemsize
            memory[name] = (n_workers, *shape), dtype, context.RawArray("b", size)
        self.__setstate__(memory)

    def __getstate__(self) -> dict:
        return self.memory

    def __setstate__(self, memory: dict) -> None:
        """Make each array an attribute."""
        self.memory = memory
        self.frames = self.vectors = self.final_frames = self.final_vectors = self.masks = None
        for name, (shape, dtype, block) in memory.items():
            setattr(self, name, np.frombuffer(block, dtype).reshape(shape))
        if "frame_digests" not in memory:
            self.frame_digests, self.final_frame_digests = self.digests, self.final_digests

    def show(self, index: int, observation: Observation, mask: np.ndarray | None = None, final: bool = False) -> None:
        """Write what environment `index` shows, its digest, and which actions are allowed (sum of actions,)."""
        frames, vectors = (self.final_frames, self.final_vectors) if final else (self.frames, self.vectors)
        digests, own = (self.final_digests, self.final_frame_digests) if final else (self.digests, self.frame_digests)
        if both := isinstance(observation, dict):
            frame, vector = observation["frame"], observation["vector"]
        else:
            frame = vector = observation
        if frames is not None:
            frames[index] = frame.transpose(1, 2, 0)
            own[index] = np.frombuffer(xxhash.xxh3_128_digest(frames[index]), np.uint8)
        if vectors is not None:
            vectors[index] = vector
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
    """

    number: int = 0
    actions: bytearray = field(default_factory=bytearray)
    digest: bytes = b""


def packed_type(task: Task) -> np.dtype:
    """Return how the entries of an action are kept: as small as they fit."""
    return np.dtype(np.float32) if task.continuous else np.min_scalar_type(max(task.branches) - 1)


# ------------------------------------------------------------------------------------------------------ in the process


class Generators:
    """The global generators of a worker process, `random`'s, NumPy's and PyTorch's: each environment has its own state.

    So what an environment draws depends on its episode alone, not on who else is in its process. To save and restore
    states would take 22 µs (`random`) and 165 µs (NumPy) a step; to point to another takes 1 µs, and PyTorch's, which
    are restored where an environment has imported it, 2 µs.

    Args:
        indices: of the environments.
    """

    def __init__(self, indices: Iterable[int]) -> None:
        self.python = {index: random.Random() for index in indices}
        self.numpy = {index: np.random.MT19937() for index in indices}
        self.torch: dict[int, Any] = {}
        self.index = next(iter(self.python))
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
        self.index = index
        np.random.set_bit_generator(self.numpy[index])  # type: ignore[attr-defined]

    def seed(self, seed: int) -> None:
        """Seed those that are in use."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if torch := sys.modules.get("torch"):
            torch.default_generator.manual_seed(seed)


class EnvironmentRunner:
    """The environments of one process: they step as told, and an episode that was lost is brought back.

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
        indices: range,
    ) -> None:
        self.task, self.arrays, self.episode_seed, self.first = task, arrays, episode_seed, first
        self.max_steps = max_steps
        self.cut: set[int] = set()  # environments whose next step was lost with an episode that cannot be repeated
        self.generators, self.current = Generators(indices), indices[0]
        self.envs: dict[int, Any] = {}
        for index in indices:
            self._turn_to(index)
            self._seed_generators(index)
            self.envs[index] = create_env(section)

    def _turn_to(self, index: int) -> None:
        self.arrays.at_work[self.current] = False
        self.arrays.at_work[index] = True
        self.current = index
        self.generators.use(index)

    def _seed_generators(self, index: int) -> int:
        """Seed the global generators for an environment's episode; return its reset seed."""
        number, episode = self.first + index, int(self.arrays.episode[index])
        seed = self.episode_seed(number, episode)
        self.generators.seed(derived_seed(seed, number, episode))
        return seed

    def _reset(self, index: int, episode: int) -> None:
        """Begin an episode of the environment whose turn it is."""
        self.arrays.episode[index], self.arrays.steps[index] = episode, 0
        observation, info = self.envs[index].reset(seed=self._seed_generators(index))
        check_observation(self.envs[index], observation, self.task)
        self.arrays.show(index, observation, info.get("action_mask"))

    def replay(self, episodes: dict[int, tuple[int, bytes, bytes, bool]]) -> list[int]:
        """Bring running episodes back; return the environments where that failed and a fresh episode began.

        Args:
            episodes: by environment, number, actions and digest of an `Episode`, and whether it is brought back in the
                middle of a rollout, which has to be told if that fails.
        """
        return [index for index, episode in episodes.items() if not self._replay(index, *episode)]

    def _replay(self, index: int, number: int, packed: bytes, digest: bytes, midway: bool) -> bool:
        arrays, task, env = self.arrays, self.task, self.envs[index]
        self._turn_to(index)
        if midway:
            arrays.copy_to_final(index)
        self._reset(index, number)
        actions = np.frombuffer(packed, packed_type(task)).reshape(-1, task.action_size)
        for action in actions.astype(arrays.actions.dtype):
            arrays.steps[index] += 1
            observation, _, terminated, truncated, info = checked_step(env, action, task)
            if terminated or truncated:
                break
            arrays.show(index, observation, info.get("action_mask"))
        if arrays.steps[index] == len(actions) and (not digest or arrays.digests[index].tobytes() == digest):
            return True
        if midway:
            self.cut.add(index)
            arrays.final_digests[index] = np.frombuffer(digest, np.uint8)
        self._reset(index, number + 1)
        return False

    def step(self, group: range) -> list[tuple[int, dict]]:
        """Step this process's environments of a group; return (environment, info) of episodes that ended."""
        return [ended for index in self.envs if index in group for ended in self._step(index)]

    def _step(self, index: int) -> list[tuple[int, dict]]:
        arrays, env = self.arrays, self.envs[index]
        self._turn_to(index)
        if index in self.cut:
            self.cut.remove(index)
            arrays.rewards[index], arrays.terminated[index], arrays.truncated[index] = 0.0, False, True
            return []
        arrays.steps[index] += 1
        steps, limit = int(arrays.steps[index]), self.task.max_episode_steps
        result = checked_step(env, arrays.actions[index].copy(), self.task)
        observation, arrays.rewards[index], terminated, truncated, info = result
        cut = steps == self.max_steps and not (terminated or truncated)
        truncated |= cut
        arrays.terminated[index], arrays.truncated[index] = terminated, truncated and not terminated
        if not (terminated or truncated):
            if limit is not None and steps >= limit:
                raise BrokenContract(f"{type(env).__name__}: episode longer than max_episode_steps, {limit}")
            arrays.show(index, observation, info.get("action_mask"))
            return []
        if arrays.truncated[index]:
            arrays.show(index, observation, final=True)
        report = env.numbers_so_far() | {"cut": 1.0} if cut else episode_numbers(info)
        self._reset(index, int(arrays.episode[index]) + 1)
        return [(index, report)]

    def close(self) -> None:
        """Close the environments; that some cannot is told when they are inspected."""
        for env in self.envs.values():
            with suppress(Exception):
                env.close()


class Inspection:
    """An environment that is only looked at.

    Args:
        section: the `environment` section of a config.
    """

    def __init__(self, section: Section) -> None:
        self.section = section

    def inspect(self, _: None) -> tuple[tuple, list[str]] | str:
        """Return the entries of its `Task` and what its user should know; or, as a text, what is wrong with it."""
        generators = Generators([0])
        generators.use(0)
        generators.seed(0)
        try:
            env = create_env(self.section)
            task, notices = try_out(env)
        except (UserError, BrokenContract) as error:
            return str(error)
        try:
            env.close()
        except Exception as error:
            notices.append(f"environment: close() fails, which is ignored: {type(error).__name__}: {reason_of(error)}")
        return astuple(task), notices

    def close(self) -> None:
        """Do nothing: it is closed already."""


def serve(connection: Any, make: Callable[[], Any], folder: str) -> None:
    """Run in a process of its own: carry out commands until the trainer is gone.

    Args:
        connection: receives (name of a method, its argument); answers ("done", its result) or ("failed", the reason).
        make: creates the object whose methods they are.
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
    served = None
    try:
        while True:
            command, argument = connection.recv()
            try:
                served = served or make()
                answer = "done", getattr(served, command)(argument)
            except (UserError, BrokenContract) as error:
                answer = "failed", f" {error}"
            except SystemExit as leaving:
                answer = "failed", f" it called sys.exit({'' if leaving.code is None else repr(leaving.code)})"
            except BaseException:
                answer = "failed", f"\n{traceback.format_exc().rstrip()}"
            connection.send(answer)
    except (EOFError, OSError):
        pass  # the trainer is gone
    finally:
        if served is not None:
            served.close()
        kill_group(os.getpid())


def outlive(trainer: Any) -> None:
    """Wait for the trainer's end and end this process some time later, although an environment may hang."""
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
        if found is not None and found.origin is not None:  # a folder without Python is none
            for name in [name for name in files if name.split(".")[0] == ours]:
                del sys.modules[name]  # who has imported it, keeps it


def kill_group(leader: int) -> None:
    """Kill what is left of a worker process and of the processes that its environments started."""
    with suppress(OSError):
        os.killpg(leader, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------ in the trainer


@cache
def start_server() -> None:
    """Start what processes are forked from, where it finds our modules and not others of their names.

    Once, and before any thread may want to write to the current folder.
    """
    with chdir(ROOT):
        forkserver.ensure_running()


class Died(Exception):
    """A process is gone, whoever ended it."""


class Process:
    """One process and what it owes.

    Args:
        make: creates what it serves; picklable.
        indices: of the environments that it steps.
    """

    def __init__(self, make: Callable[[], Any], indices: range = range(0)) -> None:
        start_server()
        self.make, self.indices = make, indices
        self.pending: list[range] = []  # groups that it was told to step and has not answered for
        self.handle: Any = None

    def start(self, command: str, argument: Any) -> None:
        """Start it with a first command, whose answer is to be read."""
        self.connection, theirs = CONTEXT.Pipe()
        self.handle = CONTEXT.Process(target=serve, args=(theirs, self.make, os.getcwd()), daemon=True)
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:  # the process would import it, PyTorch and all
            self.handle.start()
        finally:
            sys.modules["__main__"] = main
        theirs.close()
        self.poll = select.poll()  # ten times faster than the connection's own
        self.poll.register(self.connection.fileno(), select.POLLIN)
        self.tell(command, argument)

    def tell(self, command: str, argument: Any) -> None:
        """Send a command; that the process is dead is noticed when its answer is read."""
        with suppress(OSError):
            self.connection.send((command, argument))

    def answers_within(self, seconds: float) -> bool:
        """Return whether there is something to read, or it has died."""
        return bool(self.poll.poll(1000 * seconds))

    def read(self) -> tuple[str, Any]:
        """Wait for the next answer; raise Died if there will be none."""
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            self.handle.join(timeout=CLOSE_SECONDS)
            kill_group(self.handle.pid)
            self.connection.close()
            raise Died(f"its process died (exit code {self.handle.exitcode})") from error

    def let_go(self) -> None:
        """Let it end by itself."""
        if self.handle is not None:
            self.connection.close()

    def end(self, deadline: float = 0.0) -> None:
        """Wait for its end until a time of `time.monotonic`, then end it."""
        if self.handle is not None:
            self.handle.join(timeout=max(0.0, deadline - time.monotonic()))
            self.handle.kill()
            self.handle.join()
            kill_group(self.handle.pid)
            self.handle = None


def inspect_environment(section: Section) -> tuple[Task, list[str]]:
    """Create an environment in a process of its own, play one step; return what it is like, and notices for its user.

    Raises:
        UserError: if it cannot be created or breaks the contract, naming how.
        EnvironmentFailure: if it ends its process.
    """
    process = Process(partial(Inspection, section))
    try:
        process.start("inspect", None)
        kind, answer = process.read()
    except Died as death:
        kind, answer = "failed", f" {death}"
    finally:
        process.let_go()
        process.end(time.monotonic() + CLOSE_SECONDS)
    if kind == "failed":
        raise EnvironmentFailure(f"environment:{answer}")
    if isinstance(answer, str):
        raise UserError(answer)
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
        stop: says whether the run was asked to stop; then environments have `STOP_SECONDS`. Asked only while they are
            waited for, a few times a second.
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
        stop: Callable[[], bool] = bool,
    ) -> None:
        self.arrays = SharedArrays(n_workers, task)
        edges = [n_workers * group // groups for group in range(groups + 1)]
        self.groups = [range(low, high) for low, high in zip(edges, edges[1:], strict=False) if low < high]
        self.episodes = [Episode() for _ in range(n_workers)]
        self.episode_seed, self.first, self.stop = episode_seed, first, stop
        self.restarts, self.packed = 0, packed_type(task)
        self.deadline: float | None = None  # of the environments, once a stop was asked
        make = partial(EnvironmentRunner, section, task, self.arrays, episode_seed, first, max_steps)
        shares = [range(own, n_workers, min(processes, n_workers)) for own in range(min(processes, n_workers))]
        self.processes = [Process(partial(make, share), share) for share in shares]

    def state_dict(self) -> dict[str, list]:
        """Return the running episodes: number, actions and digest, each a list with an entry per environment."""
        import torch  # which the processes, that import this module, do without

        return {
            "number": [episode.number for episode in self.episodes],
            "actions": [torch.tensor(episode.actions, dtype=torch.uint8) for episode in self.episodes],
            "digest": [episode.digest.hex() for episode in self.episodes],
        }

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Take the running episodes from what `state_dict` returned; `start` brings them back."""
        entries = zip(self.episodes, state["number"], state["actions"], state["digest"], strict=True)
        self.episodes = [
            Episode(number, bytearray(actions.numpy().tobytes()), bytes.fromhex(digest))
            for _, number, actions, digest in entries
        ]

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
        """Wait for a group; return (environment, info) of ended episodes by environment; the rest is in `arrays`.

        Raises:
            EnvironmentFailure: if an environment fails, or hangs when the run is to stop; the message says which, its
                seed and its step.
        """
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
        deadline = time.monotonic() + CLOSE_SECONDS
        for process in self.processes:
            process.end(deadline)

    def _launch(self, process: Process) -> None:
        """Start a process and let it replay its episodes without the step that is still pending."""
        episodes, entries = {}, self.arrays.actions.shape[1]
        self.arrays.at_work[process.indices] = False
        for index in process.indices:
            episode = self.episodes[index]
            pending = any(index in group for group in process.pending)
            done = bytes(episode.actions[: len(episode.actions) - pending * self.packed.itemsize * entries])
            episodes[index] = episode.number, done, episode.digest, bool(process.pending)
        process.start("replay", episodes)

    def _replayed(self, process: Process) -> list[int]:
        """Wait until a process has replayed its episodes; return the environments where that failed."""
        while True:
            try:
                return self._read(process)
            except Died as death:
                self._replace(process, death)

    def _tell_of(self, fresh: list[int]) -> None:
        """Say which environments could not be brought back."""
        if fresh:
            numbers = [self.first + index for index in fresh]
            print(f"environments {numbers} are not deterministic and began fresh episodes", file=sys.stderr)

    def _answer(self, process: Process) -> list[tuple[int, dict]]:
        """Return a process's answer to a step; where it died, its successor replays and is told all it was told."""
        while True:
            try:
                return self._read(process)
            except Died as death:
                self._replace(process, death)
                self._tell_of(self._replayed(process))
                for group in process.pending:
                    process.tell("step", group)

    def _replace(self, process: Process, death: Died) -> None:
        """Start a process anew that died, unless that goes on and on."""
        self.restarts += 1
        if self.restarts > MAX_RESTARTS:
            raise EnvironmentFailure(f"{self._where(process)}: {death} {self.restarts} times at the same step")
        print(f"\n{self._where(process)}: {death}; replaying its episodes", file=sys.stderr)
        self._launch(process)

    def _read(self, process: Process) -> list:
        """Return a process's next answer; raise Died, or EnvironmentFailure."""
        while not process.answers_within(LOOK_SECONDS):
            if self.deadline is None and self.stop():
                self.deadline = time.monotonic() + STOP_SECONDS
            if self.deadline is not None and time.monotonic() > self.deadline:
                for late in self.processes:
                    if late.pending or late is process:
                        late.end()
                asked = f"the run was asked to stop {STOP_SECONDS:.0f} s ago"
                raise EnvironmentFailure(f"{self._where(process)}: hangs; {asked}")
        kind, answer = process.read()
        if kind == "failed":
            raise EnvironmentFailure(f"{self._where(process)}:{answer}")
        return answer

    def _where(self, process: Process) -> str:
        """Name the environment that a process is busy with, its episode and its step."""
        arrays = self.arrays
        index = next((index for index in process.indices if arrays.at_work[index]), process.indices[0])
        seed = self.episode_seed(self.first + index, int(arrays.episode[index]))
        return f"environment {self.first + index}, reset seed {seed}, step {arrays.steps[index]}"
