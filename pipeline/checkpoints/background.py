"""Saves that training hardly waits for: a copy in the host's memory, and a thread that writes it."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")
NICE = 10  # of the thread that writes: training goes first, and a write still ends where no core is idle


class HostCopy:
    """A copy of tensors in the host's memory, which is kept for the next copy of the same tensors.

    Memory that has been written to before is filled several times faster, and a GPU copies into pinned memory only
    without waiting.
    """

    def __init__(self) -> None:
        """Hold nothing; the first copy allocates."""
        self.files: dict[str, dict[str, torch.Tensor]] = {}

    def fill(self, file: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the tensors of a file; on a GPU the copy goes on until `finish`.

        Args:
            file: Name of the file.
            tensors: Names and tensors of any device, with the same names and shapes at each call.
        """
        held = self.files.setdefault(file, {})
        for name, tensor in tensors:
            if name not in held:
                held[name] = _pinned(tensor) if tensor.is_cuda else _shared(tensor)
            held[name].copy_(tensor.detach(), non_blocking=True)

    def finish(self) -> None:
        """Wait for copies from a GPU."""
        if any(tensor.is_pinned() for tensors in self.files.values() for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()


def _pinned(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _shared(like: torch.Tensor) -> torch.Tensor:
    """Host memory that a forked process shares: the workers of a loader would each keep what it was before a save."""
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(mmap.mmap(-1, like.nbytes), dtype=like.dtype).view(like.shape)


class Background(Generic[Result]):
    """Runs one job at a time in a thread."""

    def __init__(self, name: str):
        """Take the thread's name; it starts with the first job."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_step_back)
        self._job: Future[Result] | None = None

    def start(self, job: Callable[[], Result]) -> None:
        """Start a job; the one before must have been waited for."""
        assert self._job is None
        self._job = self._thread.submit(job)

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._job is not None and not self._job.done()

    def wait(self) -> Result | None:
        """Wait for the job, and return its result or raise its exception; None where none was started."""
        job, self._job = self._job, None
        return None if job is None else job.result()


def _step_back() -> None:
    with suppress(OSError):  # on Linux a thread has its own priority
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
