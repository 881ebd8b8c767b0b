"""Photos that show the same picture: re-encoded or resized copies, frames of a camera that stood still."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

# Copies at JPEG quality 20, or at a third of the size, differ in 0 to 4 bits and by up to 1 grey level;
# different photos, even of one street, in more than 10 bits or by more than 4 levels.
HASH_BITS_APART = 4
GREY_LEVELS_APART = 3.0
BAND_EDGES = (0, 13, 26, 39, 52, 64)  # one band more than bits apart


def near_duplicates(hashes: np.ndarray, thumbnails: np.ndarray) -> Iterator[np.ndarray]:
    """Yield pairs whose hashes differ in at most 4 of 64 bits and whose thumbnails differ by at most 3 grey levels.

    The hash proposes and the thumbnail confirms: street scenes share their layout, sky above road, and many
    bits with it. Two hashes that differ in 4 bits agree in at least one of five bands of bits, so only photos
    that share a band are compared: time grows with the number of such pairs, not with the square of the set.

    Args:
        hashes: uint64 [N].
        thumbnails: uint8 [N, C].

    Yields:
        int64 [pairs, 2], again and again, since frames of a camera that stood still may be millions of pairs. A pair
        comes once for every band that it shares.
    """
    # Exact copies are linked in a chain and compared once: a thousand black frames are half a million pairs.
    looks = np.concatenate([hashes[:, None].view(np.uint8).reshape(len(hashes), -1), thumbnails], axis=1)
    _, first, same = np.unique(looks, axis=0, return_index=True, return_inverse=True)
    yield chain(same.ravel())
    hashes, thumbnails = hashes[first], thumbnails[first].astype(np.int16)
    for low, high in pairwise(BAND_EDGES):
        values = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        for sharing in _sharing(values):
            close = np.bitwise_count(hashes[sharing[:, 0]] ^ hashes[sharing[:, 1]]) <= HASH_BITS_APART
            left, right = sharing[close].T
            alike = np.abs(thumbnails[left] - thumbnails[right]).mean(axis=1) <= GREY_LEVELS_APART
            yield first[sharing[close][alike]]


def chain(values: np.ndarray) -> np.ndarray:
    """Pairs that link all positions of equal value, one after the other: int64 [pairs, 2]."""
    order = np.argsort(values, kind="stable")
    equal = values[order[1:]] == values[order[:-1]]
    return np.stack([order[:-1][equal], order[1:][equal]], axis=1)


def _sharing(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield pairs of positions, int64 [pairs, 2], until every pair of equal values has come up once.

    In sorted order equal values stand together: each round compares everything with its d-th neighbour.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    left, distance = np.arange(len(order)), 1
    while True:
        left = left[left + distance < len(order)]
        left = left[ordered[left] == ordered[left + distance]]
        if not len(left):
            return
        yield np.stack([order[left], order[left + distance]], axis=1)
        distance += 1
