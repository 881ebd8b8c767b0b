"""A request to stop, remembered until the step boundary at which all ranks can act on it."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Catches SIGINT, SIGTERM and SIGUSR2; a second one of them interrupts at once."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
