"""Memory that is freed and asked for again, in a process of its own."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from pipeline.data.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(8 << 20, np.uint8), np.ones(9 << 20, np.uint8)
before = faults()
for _ in range(20):
    canvas, views = np.ones(8 << 20, np.uint8), np.ones(9 << 20, np.uint8)
    del canvas, views
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides for itself")
def test_pages_are_not_asked_for_again():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "default")
    )
    assert kept < given_back / 5
