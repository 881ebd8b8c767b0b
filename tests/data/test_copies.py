"""Augmented copies of the feature cache: reproducible, and their masks show what they show."""

import numpy as np
import pytest

from pipeline.data.copies import make_copy, placement_of

SHA256 = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def photo():
    """A bright block in the dark, which is the mask too."""
    image = np.full((300, 400, 3), 20, dtype=np.uint8)
    image[110:190, 150:260] = 230
    return image


def test_a_copy_follows_from_the_photos_hash_and_its_number_alone(photo):
    for copy in (1, 2, 3, 4):
        np.testing.assert_array_equal(make_copy(photo, SHA256, copy), make_copy(photo, SHA256, copy))
    assert not np.array_equal(make_copy(photo, SHA256, 1), make_copy(photo, SHA256, 3))
    assert not np.array_equal(make_copy(photo, SHA256, 1), make_copy(photo, "f" * 64, 1))


def test_odd_copies_are_the_clients_and_even_ones_keep_their_resolution(photo):
    for copy in range(1, 9):
        shape = make_copy(photo, SHA256, copy).shape
        if copy % 2:
            assert shape == (224, 224, 3)
        else:
            assert 0.65 * photo.size < np.prod(shape) <= photo.size


def test_the_clients_levels_all_occur(photo, monkeypatch):
    levels = []
    monkeypatch.setattr("pipeline.data.copies.streetvision", lambda image, level, rng: levels.append(level))
    for number in range(200):
        make_copy(photo, f"{number:016x}", 1)
    assert set(levels) == {0, 1, 2, 3}
    assert min(levels.count(level) for level in range(4)) > 25  # of 50 expected


@pytest.mark.parametrize("copy", range(1, 13))
def test_a_mask_cut_by_the_placement_covers_what_the_copy_shows(photo, copy):
    made = make_copy(photo, SHA256, copy)
    mask = placement_of(400, 300, SHA256, copy).mask((photo[..., 0] > 128).astype(np.uint8))
    assert mask.shape == made.shape[:2]
    grey = made.mean(axis=-1)
    shown = grey > (float(grey.max()) + float(grey.min())) / 2
    assert (shown & (mask == 1)).sum() / (shown | (mask == 1)).sum() > 0.9
