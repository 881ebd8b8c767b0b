"""What the C library does with memory that is free again."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of glibc's mallopt(3)
LARGEST_MMAP_THRESHOLD = 32 << 20  # of a 64-bit machine; glibc refuses more
KEPT = 256 << 20


def keep_freed_memory(worker: int = 0) -> None:
    """Keep what is freed for the next photo or step, up to 256 MB, instead of giving it back to the system each time.

    Canvas and views of a photo are blocks of megabytes, as are the activations of a step on a CPU; by default glibc
    asks the system for them anew, which then zeroes every page of them again. Does nothing where the C library is
    another one.

    Args:
        worker: Its number, so that a `DataLoader` takes this as its `worker_init_fn`.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT)
