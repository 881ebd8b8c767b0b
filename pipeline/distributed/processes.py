"""The processes of a launch that share work but no tensors: each on its own GPU, and they talk over gloo."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from pipeline.devices import pick_device
from pipeline.distributed.signals import PR_SET_PDEATHSIG

# A process waits for the slowest one with nothing else to do; a fault ends them all through the launcher.
PATIENCE = timedelta(days=7)


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the other processes that the launcher started, if any; yields this process's device.

    They talk over gloo even if they have GPUs: they exchange no tensors, and may wait for each other for long.

    Args:
        device: cpu, cuda, cuda:1, or auto; without a number it is the GPU of this process's number on its machine.

    Raises:
        UserError: There is no such device here.
    """
    joins = not dist.is_initialized()
    if joins and "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=PATIENCE)
    elif joins:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        chosen = pick_device(device)
        if chosen.type == "cuda":
            if chosen.index is None:
                chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(chosen)
        yield chosen
    finally:
        if joins:
            dist.destroy_process_group()


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR2, as a launcher and a queue send them, interrupt the block as Ctrl-C does.

    Under a launcher, its death interrupts too: else its processes would go on without it.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may listen
        yield
        return
    usual = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGUSR2)}
    if "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
