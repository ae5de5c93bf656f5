"""A process that steps environments: how it is started, spoken to, missed and ended."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from environments import BrokenContract
from processes.runner import EnvironmentRunner, Episode
from utils import EnvironmentFailure, UserError


class Died(Exception):
    """A process is gone, whoever ended it."""


def process_context() -> Any:
    """Return how processes are started: copying neither the trainer's threads nor its CUDA context."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # the fork server imports the environments only once
        context.set_forkserver_preload(["environments", "worker", "gymnasium"])
    return context


class Process:
    """One process and what it owes.

    Args:
        context: of `process_context`.
        make_runner: creates environments of the given numbers; picklable.
        indices: of the environments that it steps.
    """

    def __init__(self, context: Any, make_runner: Callable[[list[int]], EnvironmentRunner], indices: list[int]) -> None:
        self.context, self.make_runner, self.indices = context, make_runner, indices
        self.pending: list[range] = []  # groups that it was told to step and has not answered for
        self.handle: BaseProcess | None = None
        self.connection: Connection | None = None

    def start(self, episodes: dict[int, Episode]) -> None:
        """Start it and let it replay episodes by environment; the answer is to be read."""
        self.connection, theirs = self.context.Pipe()
        arguments = (theirs, partial(self.make_runner, self.indices))
        self.handle = self.context.Process(target=serve, args=arguments, daemon=True)
        self.handle.start()
        theirs.close()
        self.tell("replay", episodes)

    def tell(self, command: str, argument: Any) -> None:
        """Send a command; that the process is dead is noticed when its answer is read."""
        with suppress(OSError):
            self.connection.send((command, argument))

    def read(self) -> list:
        """Wait for the next answer.

        Raises:
            Died: if there will be none.
            EnvironmentFailure: if an environment failed.
        """
        try:
            kind, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise Died from error
        if kind == "failed":
            raise EnvironmentFailure(answer)
        return answer

    def bury(self) -> str:
        """Clear away what is left of it when it died; return what happened, in words."""
        self.handle.join(timeout=5)
        kill_group(self.handle.pid)
        self.connection.close()
        return f"the process of environments {self.indices} died (exit code {self.handle.exitcode})"

    def let_go(self) -> None:
        """Let it end by itself."""
        if self.handle is not None:
            self.connection.close()

    def end(self) -> None:
        """Wait for its end, and end it where it does not."""
        if self.handle is not None:
            self.handle.join(timeout=5)
            self.handle.kill()
            self.handle.join()
            kill_group(self.handle.pid)
            self.handle = None


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
