"""The augmented copies in a feature cache: a function of the photo and the copy's number, wherever they are made."""

from __future__ import annotations

import numpy as np

from pipeline.data.augment import (
    LEVELS,
    Placement,
    augmented_copy,
    copy_placement,
    streetvision,
    streetvision_placement,
)


def make_copy(image: np.ndarray, sha256: str, copy: int) -> np.ndarray:
    """An augmented copy of a photo.

    Odd copies are what the live client sends, 224 px at one of its levels; even ones are mild and keep the resolution.

    Args:
        image: uint8 [H, W, 3].
        sha256: Of the photo's bytes, in hexadecimal.
        copy: 1 or more.

    Returns:
        uint8 [h, w, 3].
    """
    generator = _generator(sha256, copy)
    if copy % 2:
        return streetvision(image, int(generator.integers(LEVELS)), generator)
    return augmented_copy(image, generator)


def placement_of(width: int, height: int, sha256: str, copy: int) -> Placement:
    """Which part of the photo `make_copy` shows, for its mask; see there.

    Args:
        width: Of the photo, or of a mask in another resolution, in pixels.
        height: Of the same.
        sha256: Of the photo's bytes.
        copy: 1 or more.
    """
    generator = _generator(sha256, copy)
    if copy % 2:
        return streetvision_placement(width, height, int(generator.integers(LEVELS)), generator)
    return copy_placement(width, height, generator)


def _generator(sha256: str, copy: int) -> np.random.Generator:
    return np.random.default_rng([int(sha256[:16], 16), copy])
