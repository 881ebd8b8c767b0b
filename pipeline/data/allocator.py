"""Let the C library keep freed memory for reuse."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of glibc's mallopt(3)
LARGEST_MMAP_THRESHOLD = 32 << 20  # on 64-bit machines; glibc refuses more
KEPT = 256 << 20


def keep_freed_memory() -> None:
    """Keep up to 256 MB of freed memory for the next photo or step, instead of returning it to the system each time.

    Canvas and views of a photo are blocks of megabytes, as are the activations of a step on a CPU. By default glibc
    asks the system for them anew, which zeroes every page again. Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT)
