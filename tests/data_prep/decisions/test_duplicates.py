"""Near-duplicates: copies are found whatever happened to their bytes, and other photos are left alone."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from data_prep.decisions import duplicates
from data_prep.decisions.duplicates import near_duplicates
from data_prep.decisions.links import components
from data_prep.photos.inspection import perceptual_hash, thumbnail
from tests.data_prep.examples import encode, pixels


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


def alike_by_comparison(hashes: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """Every photo with every other: bool [N, N]."""
    bits = [[(int(a) ^ int(b)).bit_count() for b in hashes] for a in hashes]
    levels = np.abs(thumbnails[:, None].astype(float) - thumbnails[None]).mean(axis=2)
    return (np.array(bits) <= 4) & (levels <= 3)


def variants(photos: int, pictures: int, most_bits: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Photos of a few pictures, with some bits of the hash flipped and some grey levels added."""
    hashes = rng.integers(0, 2**64, pictures, dtype=np.uint64)[rng.integers(0, pictures, photos)]
    flips = [sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, most_bits + 1), False)) for _ in range(photos)]
    levels = 120 + 4 * rng.integers(0, 3, (photos, 1)) + rng.integers(0, 2, (photos, 8)) * rng.integers(0, 8)
    return hashes ^ np.array(flips, dtype=np.uint64), levels.astype(np.uint8)


@pytest.mark.parametrize("seed", range(6))
def test_the_links_connect_what_a_comparison_of_all_with_all_does(seed, monkeypatch):
    monkeypatch.setattr("data_prep.decisions.duplicates.PAIRS_AT_ONCE", 500)
    monkeypatch.setattr("data_prep.decisions.duplicates.THUMBNAILS_AT_ONCE", 7)
    monkeypatch.setattr("data_prep.decisions.duplicates.NEIGHBOURS", seed)  # of 0, all is left to the full comparison
    rng = np.random.default_rng(seed)
    hashes, thumbnails = variants(150, 2 + seed, 3 + seed % 3, rng)
    alike = alike_by_comparison(hashes, thumbnails)
    links = np.concatenate([*near_duplicates(hashes, thumbnails)])
    assert alike[links[:, 0], links[:, 1]].all()
    expected = components(150, [np.argwhere(alike)])
    assert np.array_equal(components(150, [links]), expected)
    assert 2 + seed <= expected.max() + 1 < 120
    assert len(links) == 149 - expected.max()


@pytest.mark.parametrize("photos", [0, 1, 2])
def test_a_handful_of_photos_is_no_special_case(photos):
    links = np.concatenate([*near_duplicates(np.zeros(photos, np.uint64), np.zeros((photos, 4), np.uint8))])
    assert links.tolist() == [[0, 1]][: photos - 1 if photos else 0]


def test_a_camera_that_stood_still_needs_few_comparisons_and_little_memory(monkeypatch):
    """4,000 frames by day and 4,000 at dusk, whose hashes are the same: 16 million pairs look alike."""
    rng = np.random.default_rng(0)
    unstable = rng.choice(64, 10, replace=False).astype(np.uint64)
    hashes = np.bitwise_or.reduce(rng.integers(0, 2, (8000, 10), dtype=np.uint64) << unstable, axis=1)
    levels = rng.integers(40, 200, 256) + rng.integers(-1, 2, (8000, 256)) + 8 * (np.arange(8000) % 2)[:, None]
    compared = []
    compare = duplicates._look_alike
    monkeypatch.setattr(duplicates, "_look_alike", lambda *rest: compared.append(len(rest[2])) or compare(*rest))
    tracemalloc.start()
    links = np.concatenate([*near_duplicates(hashes, levels.astype(np.uint8))])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert components(8000, [links]).tolist() == [0, 1] * 4000
    assert len(links) == 7998
    assert sum(compared) < 40 * 8000
    assert most < 80e6
