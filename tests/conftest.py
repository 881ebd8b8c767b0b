"""Fixtures that several rooms use."""

from __future__ import annotations

from pathlib import Path

import pytest

# Tests that start several processes fill the cores by themselves: one after the other, beside all the rest.
SEVERAL_PROCESSES = ("dist", "slurm")
STREET_PHOTOS = Path(__file__).parents[1].parent / "shared" / "data" / "street_photos"


@pytest.fixture(scope="session")
def street_photos() -> Path:
    """A folder of 32 real street photographs with GPS, which does not belong to the project."""
    if not STREET_PHOTOS.is_dir():
        pytest.skip(f"the real street photographs are not at {STREET_PHOTOS}")
    return STREET_PHOTOS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file on one worker of pytest-xdist, since they share fixtures."""
    for item in items:
        together = any(item.get_closest_marker(name) for name in SEVERAL_PROCESSES)
        item.add_marker(pytest.mark.xdist_group("several processes" if together else item.path.stem))
