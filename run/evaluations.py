"""Evaluations while a run trains: which model is played next, by a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from run.checkpoint import write_file

ROOT = Path(__file__).parents[1]


class Evaluations:
    """Has models of a run played beside its training, one at a time; of those that come meanwhile, the newest waits."""

    def __init__(self, summaries: Path, best: Path) -> None:
        self.summaries, self.best, self.played = summaries, best, summaries / ".played.nn"
        self.process: subprocess.Popen | None = None
        self.waiting, self.wanted = b"", set[str]()

    def offer(self, model: bytes, wanted: set[str]) -> None:
        """Have a `model_file` played for eval, video or both, as soon as none other is."""
        self.waiting, self.wanted = model, self.wanted | wanted

    def go_on(self) -> None:
        """Start what waits, unless there is nothing or a model is being played."""
        if self.process is not None and self.process.poll() is None:
            return
        self.end()
        if self.wanted:
            write_file(self.played, self.waiting)
            wanted, self.wanted = sorted(self.wanted), set()
            paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            # It ends when its standard input does, that is with this process at the latest.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "evaluation.during", self.played, self.summaries, self.best, *wanted],
                stdin=subprocess.PIPE, start_new_session=True,
                env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Wait until all has been played, or somebody asks to stop."""
        while self.process is not None and not stopped():
            time.sleep(0.05)
            self.go_on()

    def end(self) -> None:
        """End the process that there may be."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process = None
            self.played.unlink(missing_ok=True)
