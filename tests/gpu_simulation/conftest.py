"""The simulated GPU as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu_simulation.device import SimulatedGpu, simulated_gpu


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    """A GPU for the length of a test."""
    with simulated_gpu() as device:
        yield device
