"""A request to stop, remembered until the step boundary at which all ranks can act on it."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from types import FrameType

import psutil

from pipeline.errors import STARTED_VARIABLE

PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


class StopSignal:
    """Catches SIGINT, SIGTERM, SIGUSR2 and SIGHUP, and watches the clock; a second SIGINT interrupts at once.

    The launcher's death, be it by kill -9 or by a SIGUSR2 that a bare `accelerate launch` does not catch, counts as a
    request too: else its processes would train on without it.
    """

    def __init__(self, max_minutes: float = 0.0):
        """Begin to listen.

        Args:
            max_minutes: Time limit, counted from the launcher's start, or else this process's; 0 is no limit.
        """
        self.asked = False
        started = float(os.environ.get(STARTED_VARIABLE, psutil.Process().create_time()))
        self.deadline = started + 60 * max_minutes if max_minutes else float("inf")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # what nohup wants
                signal.signal(number, self._remember)
        if "LOCAL_RANK" in os.environ:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit has passed."""
        return time.time() >= self.deadline

    @property
    def received(self) -> bool:
        """Whether a signal or the time limit asks this process to stop."""
        return self.asked or self.out_of_time

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
