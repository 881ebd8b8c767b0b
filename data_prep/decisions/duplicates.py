"""Photos that show the same picture: re-encoded or resized copies, frames of a camera that stood still."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from data_prep.decisions.links import chain, join

# Copies at JPEG quality 20, or at a third of the size, differ in 0 to 4 bits and by up to 1 grey level;
# different photos, even of one street, in more than 10 bits or by more than 4 levels.
HASH_BITS_APART = 4
GREY_LEVELS_APART = 3
BAND_EDGES = (0, 13, 26, 39, 52, 64)  # one band more than bits apart
# Each photo is first compared with this many that follow it in the order of the hashes, and only then with all: by then
# the frames of a camera that stood still are linked, as a rule.
NEIGHBOURS = 16
PAIRS_AT_ONCE = 1 << 18
THUMBNAILS_AT_ONCE = 1 << 14  # of 256 cells: 8 MB


def near_duplicates(hashes: np.ndarray, thumbnails: np.ndarray) -> Iterator[np.ndarray]:
    """Link photos whose hashes differ in at most 4 of 64 bits and whose thumbnails differ by at most 3 grey levels.

    The hash proposes and the thumbnail confirms: street scenes share their layout, sky above road, and with it many
    bits. Two photos are compared only if they share a band of bits, are about equally bright, and no links connect them
    yet: n frames of a camera that stood still are n^2 / 2 pairs that look the same, and need n - 1 links.

    Args:
        hashes: uint64 [N].
        thumbnails: uint8 [N, C].

    Yields:
        Pairs of photos that look the same, int64 [pairs, 2], fewer than N pairs in all. Together they connect the same
        photos as a comparison of all with all would.
    """
    # Exact copies are linked in a chain and compared once: a thousand black frames are half a million pairs.
    looks = np.concatenate([hashes[:, None].view(np.uint8).reshape(len(hashes), 8), thumbnails], axis=1)
    _, first, same = np.unique(looks, axis=0, return_index=True, return_inverse=True)
    yield chain(same.ravel())
    hashes, thumbnails, component = hashes[first], thumbnails[first].astype(np.int16), np.arange(len(first))
    for key in _keys(hashes, thumbnails):
        # `component` changes in place: `_across` looks at it when the neighbours are done.
        for pairs in itertools.chain(_neighbours(key, hashes), _across(key, component)):
            apart = pairs[component[pairs[:, 0]] != component[pairs[:, 1]]]
            alike = apart[_look_alike(hashes, thumbnails, apart)]
            if len(alike):
                component[:], needed = join(component, alike)
                yield first[alike[needed]]


def _keys(hashes: np.ndarray, thumbnails: np.ndarray) -> Iterator[np.ndarray]:
    """Yield two keys per photo; two photos that look the same share a key: uint64 [2 N], N photos and the same N again.

    Two hashes that differ in 4 bits agree in at least one of five bands of bits. Means differ by no more than the
    thumbnails do: in steps of 3 levels they are equal or one step apart, and every photo has its own and the next one.
    """
    step = thumbnails.sum(axis=1) // (GREY_LEVELS_APART * thumbnails.shape[1])
    for low, high in itertools.pairwise(BAND_EDGES):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        own = (band << np.uint64(8)) | step.astype(np.uint64)
        yield np.concatenate([own, own + np.uint64(1)])


def _look_alike(hashes: np.ndarray, thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Whether each pair looks the same: bool [pairs].

    Args:
        hashes: uint64 [N].
        thumbnails: int16 [N, C].
        pairs: int64 [pairs, 2].
    """
    left, right = pairs.T
    alike = np.bitwise_count(hashes[left] ^ hashes[right]) <= HASH_BITS_APART
    most = GREY_LEVELS_APART * thumbnails.shape[1]
    close = np.flatnonzero(alike)
    for start in range(0, len(close), THUMBNAILS_AT_ONCE):
        some = close[start : start + THUMBNAILS_AT_ONCE]
        alike[some] = np.abs(thumbnails[left[some]] - thumbnails[right[some]]).sum(axis=1) <= most
    return alike


def _neighbours(key: np.ndarray, hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield pairs with the same key that are close to each other in the order of the hashes, int64 [pairs, 2]."""
    photo = np.tile(np.arange(len(hashes)), 2)
    order = np.lexsort((hashes[photo], key))
    for distance in range(1, NEIGHBOURS + 1):
        left, right = order[:-distance], order[distance:]
        equal = key[left] == key[right]
        yield photo[np.stack([left[equal], right[equal]], axis=1)]


def _across(key: np.ndarray, component: np.ndarray) -> Iterator[np.ndarray]:
    """Yield all pairs with the same key and different components, int64 [pairs, 2]."""
    photo = np.tile(np.arange(len(component)), 2)
    order = np.lexsort((component[photo], key))
    _, run = np.unique(key[order], return_inverse=True)  # of one key; the components in it are blocks
    block = np.cumsum(np.r_[False, (np.diff(run) > 0) | (np.diff(component[photo[order]]) != 0)])
    beyond = np.searchsorted(block, block, side="right")  # where the next block begins
    counts = np.searchsorted(run, run, side="right") - beyond
    edges = np.searchsorted(np.cumsum(counts), np.arange(PAIRS_AT_ONCE, counts.sum(), PAIRS_AT_ONCE))
    for start, end in itertools.pairwise([0, *edges, len(order)]):
        some = counts[start:end]
        left = np.repeat(np.arange(start, end), some)
        number = np.arange(len(left)) - np.repeat(np.cumsum(some) - some, some)
        yield photo[np.stack([order[left], order[beyond[left] + number]], axis=1)]
