"""Near-duplicates: copies are found whatever happened to their bytes, and other photos are left alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.duplicates import chain, near_duplicates
from data_prep.inspection import perceptual_hash, thumbnail
from tests.data_prep.photos import encode, pixels


def look(image: np.ndarray) -> tuple[int, np.ndarray]:
    small = thumbnail(image, 32)
    return perceptual_hash(small), thumbnail(small, 16).ravel()


def pairs_among(images: list[np.ndarray]) -> set[tuple[int, int]]:
    hashes, thumbnails = zip(*map(look, images), strict=True)
    pairs = np.concatenate([*near_duplicates(np.array(hashes, dtype=np.uint64), np.stack(thumbnails))])
    return {(min(a, b), max(a, b)) for a, b in pairs.tolist()}


@pytest.mark.parametrize(("quality", "scale"), [(90, 1.0), (30, 1.0), (60, 0.5), (80, 1.6)])
def test_a_reencoded_or_resized_copy_is_found_and_nothing_else(quality, scale):
    originals = [pixels(seed, 320, 240) for seed in range(12)]
    copies = []
    for image in originals[:4]:
        resized = Image.fromarray(image).resize((round(320 * scale), round(240 * scale)))
        copies.append(np.asarray(Image.open(io.BytesIO(encode(resized, quality=quality)))))
    assert pairs_among(originals + copies) == {(i, 12 + i) for i in range(4)}


def test_equal_hashes_of_different_brightness_are_no_duplicates():
    image = pixels(0, 320, 240)
    assert perceptual_hash(thumbnail(image, 32)) == perceptual_hash(thumbnail(image // 2 + 60, 32))
    assert pairs_among([image, image // 2 + 60]) == set()


def test_banded_search_finds_the_pairs_of_a_comparison_of_all_with_all():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 60, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, count, replace=False)) for count in np.arange(60) % 8]
    hashes = np.concatenate([hashes, hashes ^ np.array(flips, dtype=np.uint64)])
    thumbnails = np.zeros((120, 4), dtype=np.uint8)
    thumbnails[60:] = rng.integers(0, 2, (60, 1)) * 9
    expected = {
        (i, j)
        for i in range(120)
        for j in range(i + 1, 120)
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 4
        and abs(thumbnails[i].astype(float) - thumbnails[j]).mean() <= 3
    }
    found = {(min(a, b), max(a, b)) for a, b in np.concatenate([*near_duplicates(hashes, thumbnails)]).tolist()}
    assert found == expected
    assert len(expected) > 10


def test_many_equal_photos_need_few_pairs():
    pairs = near_duplicates(np.zeros(500, dtype=np.uint64), np.zeros((500, 4), dtype=np.uint8))
    assert sum(map(len, pairs)) == 499


def test_chain_links_equal_values():
    assert {tuple(pair) for pair in chain(np.array([5, 3, 5, 5, 3])).tolist()} == {(0, 2), (2, 3), (1, 4)}
    assert chain(np.empty(0)).shape == (0, 2)
