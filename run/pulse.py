"""Whether all processes of a run are alive: a cable that is cut, or a machine that hangs, closes no connection."""

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

# Seconds between two signs of life, and how many of another process may be missing before it counts as lost.
INTERVAL, LOST_AFTER = 1.0, 20
# Seconds that a last sign of life may take where the network hangs.
LEAVE_SECONDS = 5.0


class Pulse:
    """Gives signs of life through the store in which the processes met, and ends this process where others give none.

    Main threads may be busy or wait for as long as they like; two threads of their own do this. The second never waits
    for the network.

    Args:
        store: PyTorch's key-value store.
        rank: number of this process.
        size: number of processes.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        # A connection of its own: while a thread waits for an entry, no other can use the connection it waits on.
        self.store, self.rank, self.size = store.clone(), rank, size
        self.stopping = False
        self.how_to_go_on = ""  # is added to what is said where a process is lost
        self._calling_off, self._silent, self._over = False, threading.Event(), threading.Event()
        self._missing = [0] * size  # counted, so that a process that was suspended itself blames nobody
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def call_off(self) -> None:
        """Let all processes know that the run is to stop."""
        self._calling_off = True

    def fall_silent(self) -> None:
        """Give no more signs of life: process 0 takes the store with it, which then must not be in use any more."""
        self._silent.set()
        beat, _ = self._threads
        beat.join()  # the other thread ends what hangs

    def end(self) -> None:
        """Expect no more signs of life, and give none: Python aborts where it ends while a thread is in the store."""
        self._silent.set()
        self._over.set()
        for thread in self._threads:
            thread.join(LEAVE_SECONDS)

    def tell_loss(self) -> None:
        """Say that a process is gone, unless another has said so before.

        Process 0, which may take the store with it, stays until all that can be left have found out.
        """
        said, deadline = False, time.monotonic() + LEAVE_SECONDS
        with suppress(RuntimeError):  # the store is gone, too
            said = self.store.add("told", 1) > 1
        if not said:
            self._say("another process of the run is gone")
        with suppress(RuntimeError):
            while self.rank == 0 and self.store.add("told", 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(0.05)

    def _beat(self) -> None:
        """Count on in an entry of the store, and see how far the others have come in theirs."""
        keys, last, count = [f"alive/{rank}" for rank in range(self.size)], [b""] * self.size, 0
        while True:
            try:
                self.store.set(keys[self.rank], f"{count} {int(self._calling_off)}")
                found = self.store.multi_get(keys)
            except RuntimeError:  # the store is gone with its machine: nothing more will be heard
                return
            for rank, entry in enumerate(found):
                if entry != last[rank]:
                    self._missing[rank] = 0
            last, count = found, count + 1
            self.stopping |= any(entry.endswith(b"1") for entry in found)
            if self._silent.wait(INTERVAL):
                return

    def _watch(self) -> None:
        """End this process at once where nothing was heard of another for too long."""
        while not self._over.wait(INTERVAL):
            self._missing = [missing + 1 for missing in self._missing]
            silent = [str(rank) for rank, missing in enumerate(self._missing) if missing > LOST_AFTER]
            if silent:
                others = [rank for rank in silent if rank != str(self.rank)]
                self._say(f"nothing heard of process {', '.join(others)} for {LOST_AFTER * INTERVAL:.0f} s")
                os._exit(1)

    def _say(self, what: str) -> None:
        print(f"process {self.rank}: {what}{self.how_to_go_on}", file=sys.stderr, flush=True)
