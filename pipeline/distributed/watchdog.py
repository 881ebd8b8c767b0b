"""A watchdog that ends a process without progress, and writes the stacks of its threads."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from pipeline.errors import EXIT_FAILED
from pipeline.progress import format_seconds, say

# One rank that hangs makes all of them wait, and the others are killed when the first one ends: each gets this long to
# write its own stacks.
OTHERS_S = 5.0
# A thread of Python cannot run where a library hangs with the interpreter's lock; faulthandler's acts this much later.
LATER_S = 20.0


class Watchdog:
    """Waits for signs of life; once they fail to come, writes `rank-N.txt` and ends the process with status 1.

    The process leaves no message of `pipeline.errors`, so the launcher may restart the run.
    """

    def __init__(self, minutes: float, folder: Path | None, rank: int):
        """Prepare a watchdog, which watches inside `with` only.

        Args:
            minutes: The longest time between two signs of life.
            folder: Folder of the stacks; None writes them to stderr.
            rank: This process's rank.
        """
        self.seconds, self.rank = 60 * minutes, rank
        self.path = folder and folder / f"rank-{rank}.txt"
        self.last = self.armed = -float("inf")
        self.ended = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w") if self.path else sys.stderr
        self.alive()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        if self.path:
            self.file.close()
            if self.path.stat().st_size == 0:
                self.path.unlink()
            with suppress(OSError):  # another rank's file is still there
                self.path.parent.rmdir()

    def alive(self) -> None:
        """Give a sign of life; costs next to nothing."""
        self.last = time.monotonic()
        if self.last - self.armed > 1:
            faulthandler.dump_traceback_later(self.seconds + LATER_S, exit=True, file=self.file)
            self.armed = self.last

    def _watch(self) -> None:
        while not self.ended.wait(min(1.0, self.seconds / 10)):
            if time.monotonic() - self.last > self.seconds:
                faulthandler.dump_traceback(self.file)
                self.file.flush()
                say(
                    f"rank {self.rank} made no progress for {format_seconds(self.seconds)} (train.hang_minutes); "
                    f"where its threads stand is in {self.path or 'the lines above'}"
                )
                time.sleep(OTHERS_S)
                os._exit(EXIT_FAILED)
