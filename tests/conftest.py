"""Fixtures that several rooms use."""

from __future__ import annotations

from pathlib import Path

import pytest

STREET_PHOTOS = Path(__file__).parents[1].parent / "shared" / "data" / "street_photos"


@pytest.fixture(scope="session")
def street_photos() -> Path:
    """A folder of 32 real street photographs with GPS, which does not belong to the project."""
    if not STREET_PHOTOS.is_dir():
        pytest.skip(f"the real street photographs are not at {STREET_PHOTOS}")
    return STREET_PHOTOS
