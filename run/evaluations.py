"""Evaluations while a run trains: which model is played next, by a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from run.checkpoint import write_file

ROOT = Path(__file__).parents[1]


class Evaluations:
    """Has models of a run played beside its training, one at a time; of those that come meanwhile, the newest waits.

    Args:
        folder: takes models until they have been played.
        summaries: where TensorBoard finds what comes of it.
        best: the file of the best model so far.
    """

    def __init__(self, folder: Path, summaries: Path, best: Path) -> None:
        self.folder, self.options = folder, [f"--summaries={summaries}", f"--best={best}"]
        self.process: subprocess.Popen | None = None
        self.played, self.waiting = Path(), Path()
        self.wanted: set[str] = set()
        for left in folder.glob("evaluated-*.pt"):  # by a run that was killed
            left.unlink()

    def offer(self, update: int, model: bytes, wanted: set[str]) -> None:
        """Have a model played as soon as none other is.

        Args:
            update: finished updates.
            model: of `model_file`.
            wanted: some of --episodes and --video.
        """
        self.waiting.unlink(missing_ok=True) if self.wanted else None
        self.waiting, self.wanted = self.folder / f"evaluated-{update:09d}.pt", self.wanted | wanted
        write_file(self.waiting, model)
        self.go_on()

    def go_on(self) -> None:
        """Start what waits, unless there is nothing or a model is being played."""
        if self.process is not None and self.process.poll() is None:
            return
        self.end()
        if self.wanted:
            self.played, options = self.waiting, [*self.options, *self.wanted]
            self.wanted = set()
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            # It ends when its standard input does, that is with this process at the latest.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "evaluation.during", str(self.played), *options],
                stdin=subprocess.PIPE,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Wait until all has been played, or until `stopped`."""
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
            with suppress(OSError):
                self.played.unlink()
