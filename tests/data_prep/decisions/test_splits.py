"""Groups and splits: no group in two splits, no test city in training, shares as close as blocks allow."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.decisions.gps import EARTH_RADIUS_M
from data_prep.decisions.splits import fill_splits, geographic_splits, keep_splits, link_groups, random_splits
from pipeline.errors import UserError

NO_PAIRS: list[np.ndarray] = []
SHARES = np.array([0.7, 0.15, 0.15])
NULL = (np.nan, np.nan)
METRE = np.degrees(1 / EARTH_RADIUS_M)  # of latitude


def test_photos_are_linked_by_video_distance_and_looks_through_others():
    points = np.array([(50, 8), NULL, (50 + 90 * METRE, 8), (51, 8), (51 + 110 * METRE, 8), NULL])
    videos = ["v", "v", None, None, None, None]
    groups = link_groups(points, videos, [np.array([[4, 5]])], 100.0)
    assert groups.tolist() == [0, 0, 0, 1, 2, 2]


def test_photos_at_one_spot_are_linked_even_at_distance_zero():
    points = np.array([(50.0, 8.0), (50.0, 8.0), (50.0, 8.0), (50.0, 8.001)])
    assert link_groups(points, [None] * 4, NO_PAIRS, 0.0).tolist() == [0, 0, 0, 1]


def cities(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points around cities 500 km apart, each photo's city, and labels."""
    rng = np.random.default_rng(seed)
    city = np.repeat(np.arange(len(sizes)), sizes)
    points = np.stack([np.full(len(city), 45.0), -60 + 7.0 * city], axis=1) + rng.normal(0, 0.02, (len(city), 2))
    return points, city, rng.integers(0, 2, len(city))


def split_up(points, groups, labels, names=None, seed=0):
    return geographic_splits(points, names or [None] * len(points), groups, labels, shares=SHARES, seed=seed)


def shares_of(splits: np.ndarray) -> np.ndarray:
    return np.bincount(splits, minlength=3) / len(splits)


@pytest.mark.parametrize("seed", range(4))
def test_a_city_lies_in_one_split_and_shares_are_met(seed):
    points, city, labels = cities([40, 35, 30, 30, 25, 25, 20, 20, 15, 15, 10, 10], seed)
    found = split_up(points, np.arange(len(points)), labels, seed=seed)
    assert found.rule == "cities"
    assert all(len(set(found.splits[city == number])) == 1 for number in range(12))
    assert np.abs(shares_of(found.splits) - SHARES).max() < 0.04


def test_the_seed_decides_which_cities_are_tested_and_repeats():
    points, _, labels = cities([20] * 12)
    tested = [split_up(points, np.arange(240), labels, seed=seed).splits.tolist() for seed in (0, 0, 1, 2)]
    assert tested[0] == tested[1]
    assert len({tuple(splits) for splits in tested}) > 1


def test_photos_without_gps_follow_their_video_or_their_citys_name():
    points, city, labels = cities([30] * 8)
    without = np.arange(0, 240, 3)
    points[without] = np.nan
    names = [f"City{number}" if row % 2 else f"CITY{number}" for row, number in enumerate(city)]
    found = split_up(points, np.arange(240), labels, names)
    assert all(len(set(found.splits[city == number])) == 1 for number in range(8))
    by_video = link_groups(points, [str(number) for number in city], NO_PAIRS, 100.0)
    found = split_up(points, by_video, labels)
    assert all(len(set(found.splits[city == number])) == 1 for number in range(8))


def test_two_cities_are_divided_into_areas_that_stay_apart():
    points, _, labels = cities([60, 60])
    found = split_up(points, np.arange(120), labels)
    assert found.rule not in ("cities", "areas 25 km apart")
    assert (shares_of(found.splits) > SHARES / 3).all()


def test_one_street_is_divided_by_groups():
    points = np.stack([45 + 150 * METRE * np.arange(40), np.full(40, 8.0)], axis=1)
    groups = np.repeat(np.arange(20), 2)
    found = split_up(points, groups, np.full(40, -1))
    assert found.rule == "groups"
    assert np.allclose(shares_of(found.splits), SHARES, atol=0.03)
    assert all(len(set(found.splits[groups == group])) == 1 for group in range(20))


def test_without_any_gps_groups_are_spread_by_share_and_class():
    rng = np.random.default_rng(0)
    groups, labels = np.sort(rng.integers(0, 60, 300)), rng.integers(0, 2, 300)
    groups = np.unique(groups, return_inverse=True)[1]
    found = split_up(np.full((300, 2), np.nan), groups, labels)
    assert np.abs(shares_of(found.splits) - SHARES).max() < 0.01
    assert max(abs(labels[found.splits == s].mean() - labels.mean()) for s in range(3)) < 0.05


@pytest.mark.parametrize("seed", range(3))
def test_random_splits_divide_cities_but_no_group(seed):
    _, city, labels = cities([60] * 4, seed)
    groups = np.arange(240) // 3
    found = random_splits(groups, labels, shares=SHARES, seed=seed)
    assert found.rule == "random groups"
    assert all(len(set(found.splits[groups == group])) == 1 for group in np.unique(groups))
    assert all(len(set(city[found.splits == split])) >= 3 for split in range(3))
    assert np.abs(shares_of(found.splits) - SHARES).max() < 0.01
    assert max(abs(labels[found.splits == s].mean() - labels.mean()) for s in range(3)) < 0.05
    again = random_splits(groups, labels, shares=SHARES, seed=seed)
    assert np.array_equal(found.splits, again.splits)
    assert not np.array_equal(found.splits, random_splits(groups, labels, shares=SHARES, seed=seed + 9).splits)


@pytest.mark.parametrize("photos", [1, 2, 3])
def test_a_handful_of_photos_has_splits_too(photos):
    found = split_up(np.full((photos, 2), np.nan), np.arange(photos), np.full(photos, -1))
    assert len(found.splits) == photos
    assert found.splits[0] == 0 or photos > 1


def test_a_split_without_share_stays_empty():
    shares = np.array([0.8, 0.0, 0.2])
    splits = fill_splits(np.arange(100), np.zeros(100, dtype=np.int64), shares, seed=0)
    assert np.bincount(splits, minlength=3).tolist() == [80, 0, 20]


def test_filling_is_as_good_as_the_best_of_all_assignments():
    rng = np.random.default_rng(5)
    blocks = np.repeat(np.arange(7), rng.integers(5, 40, 7))
    labels = rng.integers(0, 2, len(blocks))

    def error(splits: np.ndarray) -> float:
        total = 0.0
        for s in range(3):
            inside = splits == s
            for chosen in (labels == 0, labels == 1, labels >= 0):
                total += (SHARES[s] * chosen.sum() - (inside & chosen).sum()) ** 2
        return total

    every = np.stack(np.meshgrid(*[range(3)] * 7, indexing="ij"), axis=-1).reshape(-1, 7)
    best = min(error(choice[blocks]) for choice in every)
    assert error(fill_splits(blocks, labels, SHARES, seed=0)) == pytest.approx(best)


def test_kept_splits_are_the_sources_and_straddling_groups_are_counted():
    given = ["train", "val", "test", "train", "test"]
    found = keep_splits(given, np.array([0, 1, 2, 3, 3]), np.zeros(5, dtype=np.int64), 0.15, seed=0)
    assert found.splits.tolist() == [0, 1, 2, 0, 2]
    assert found.straddling_groups == 1


def test_kept_splits_without_validation_take_it_from_whole_training_groups():
    given = ["train"] * 80 + ["test"] * 20
    groups = np.arange(100) // 4
    found = keep_splits(given, groups, np.arange(100) % 2, 0.15, seed=0)
    assert (found.splits[80:] == 2).all()
    assert (found.splits[:80] == 1).sum() == 12
    assert all(len(set(found.splits[groups == group])) == 1 for group in range(25))
    untouched = keep_splits(given, groups, np.arange(100) % 2, 0.0, seed=0)
    assert untouched.splits[:80].tolist() == [0] * 80


def test_keeping_needs_a_split_for_every_photo():
    with pytest.raises(UserError, match="1 of 2 have none"):
        keep_splits(["train", None], np.arange(2), np.zeros(2, dtype=np.int64), 0.1, seed=0)
