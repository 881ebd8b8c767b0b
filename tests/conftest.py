"""Fixtures that several rooms use."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from pipeline.devices import CPU_ONLY
from tests.warm import VARIABLE, WarmPython

# Tests that start several processes fill the cores by themselves: one after the other, beside all the rest.
SEVERAL_PROCESSES = (
    "tests/checkpoints/", "tests/compatibility/", "tests/distributed/", "tests/slurm/", "tests/test_crossval.py",
    "tests/test_several_processes.py",
    *(f"tests/training/test_{name}.py" for name in ("cached_training", "faults", "streaming", "training")),
)  # fmt: skip
STREET_PHOTOS = Path(__file__).parents[1].parent / "shared" / "data" / "street_photos"


def pytest_configure(config: pytest.Config) -> None:
    """Keep tests off the GPUs of this machine, but for those that are about them."""
    if config.getoption("markexpr") != "gpu":
        os.environ |= CPU_ONLY
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            # In the background, or under nohup: children would inherit that, but not a handler that does nothing.
            signal.signal(number, lambda number, frame: None)
    if VARIABLE not in os.environ:  # workers of xdist have it from the process that starts them
        config.add_cleanup(WarmPython().close)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Let each test draw the same numbers whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:  # importing it takes seconds, and some tests need none of it
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def street_photos() -> Path:
    """A folder of 32 real street photographs with GPS, which does not belong to the project."""
    if not STREET_PHOTOS.is_dir():
        pytest.skip(f"the real street photographs are not at {STREET_PHOTOS}")
    return STREET_PHOTOS


class ByFile(LoadScopeScheduling):
    """Keeps the tests of a file on one worker of pytest-xdist, since they share fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        """Name of the tests that stay together with this one."""
        file = nodeid.partition("::")[0]
        return "several processes" if file.startswith(SEVERAL_PROCESSES) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Schedule by names: groups by marks get lost between pytest-xdist 3.8 and pytest 9.2."""
    return ByFile(config, log)
