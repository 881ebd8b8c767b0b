"""Augmented copies of a photo: a function of the photo and the copy's number, the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.augment import (
    LEVELS,
    Placement,
    augmented_copy,
    copy_placement,
    streetvision,
    streetvision_placement,
)


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of copies: one has the odd numbers, the other the even ones."""

    name: str
    first: int
    """The lowest number of a copy of this kind."""

    def number(self, place: np.ndarray) -> np.ndarray:
        """The numbers of the copies that have `place` copies of their kind before them: int [n] to int [n]."""
        return self.first + 2 * place

    def count(self, copies: int) -> int:
        """How many of the copies 1, 2 to `copies` are of this kind."""
        return (copies - self.first) // 2 + 1


STREETVISION = Kind("streetvision", 1)
"""Copies in the older form of the NATIX challenge: 224 px, at one of four levels of degradation, without metadata."""
AUGMENTED = Kind("augmented", 2)
"""Mild copies, which keep the photo's resolution."""


def is_streetvision(copy: int) -> bool:
    """Whether the copy of this number is of the kind `STREETVISION`; 0 is the photo itself."""
    return copy % 2 == STREETVISION.first


def make_copy(image: np.ndarray, sha256: str, copy: int) -> np.ndarray:
    """An augmented copy of a photo: `STREETVISION` where its number is odd, `AUGMENTED` where it is even.

    Args:
        image: uint8 [H, W, 3].
        sha256: SHA-256 of the photo's bytes, in hexadecimal.
        copy: Number of the copy, 1 or more.

    Returns:
        uint8 [h, w, 3].
    """
    generator = _generator(sha256, copy)
    if is_streetvision(copy):
        return streetvision(image, int(generator.integers(LEVELS)), generator)
    return augmented_copy(image, generator)


def placement_of(width: int, height: int, sha256: str, copy: int) -> Placement:
    """The part of the photo that `make_copy` shows, to cut the same part out of the photo's mask.

    Args:
        width: Width of the photo, or of a mask in another resolution, in pixels.
        height: Height of the photo or mask in pixels.
        sha256: SHA-256 of the photo's bytes, in hexadecimal.
        copy: Number of the copy, 1 or more.
    """
    generator = _generator(sha256, copy)
    if is_streetvision(copy):
        return streetvision_placement(width, height, int(generator.integers(LEVELS)), generator)
    return copy_placement(width, height, generator)


def _generator(sha256: str, copy: int) -> np.random.Generator:
    return np.random.default_rng([int(sha256[:16], 16), copy])
