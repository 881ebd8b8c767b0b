"""The map: equal bytes for equal sets, every shape of a set drawn, and bars that count what they say."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_prep.decisions.gps import assign_clusters, fit_centres
from data_prep.decisions.maps import (
    MOST_ROWS,
    cluster_rows,
    crowds,
    draw_map,
    enumeration,
    format_degrees,
    middle_longitude,
)
from tests.data_prep.examples import CITIES


def scattered(cities: list[str], photos: int = 60) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    city = rng.integers(len(cities), size=photos)
    points = np.array([CITIES[name] for name in cities])[city] + rng.normal(0, 0.05, (photos, 2))
    points[::10] = np.nan
    splits = city % 3
    centres = fit_centres(points[(splits == 0) & ~np.isnan(points[:, 0])], 3, 0)
    return points, splits, assign_clusters(points, centres), rng.uniform(0.5, 2, photos), centres


def test_equal_sets_give_equal_bytes_and_other_weights_another_picture(tmp_path):
    points, splits, clusters, weights, centres = scattered(list(CITIES))
    for name, some in (("a", weights), ("b", weights), ("c", weights[::-1])):
        draw_map(tmp_path / name, points, splits, clusters, some, centres)
    first, second, third = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second
    assert first != third
    with Image.open(tmp_path / "a") as image:
        assert image.format == "PNG"
        assert image.width <= 1300
        assert len(first) < 200_000


def single_place(points, splits, clusters, weights, centres):
    place = np.tile([[51.5, -0.1]], (len(points), 1))
    return place, splits, np.ones_like(clusters), weights, place[:1]


def without_gps(points, splits, clusters, weights, centres):
    return np.full_like(points, np.nan), splits, np.zeros_like(clusters), weights, np.empty((0, 2))


def without_training(points, splits, clusters, weights, centres):
    return points, np.full_like(splits, 2), clusters, weights, centres


@pytest.mark.parametrize("change", [single_place, without_gps, without_training])
def test_sets_of_one_place_no_place_or_one_split_have_a_map_too(tmp_path, change):
    draw_map(tmp_path / "map.png", *change(*scattered(["Lyon", "Oslo", "Cairo"])))
    assert (tmp_path / "map.png").stat().st_size > 5_000


def test_bars_count_photos_by_split_and_weigh_training_photos_only():
    splits = np.array([0, 0, 1, 2, 0, 2])
    clusters = np.array([1, 1, 1, 2, 0, 0])
    names, photos, weight = cluster_rows(splits, clusters, np.array([1.0, 2.0, 9.0, 9.0, 0.5, 9.0]), 2)
    assert names == ["1", "2", "no GPS"]
    assert photos.tolist() == [[2, 1, 0], [0, 0, 1], [1, 0, 1]]
    np.testing.assert_array_equal(weight, [1.5, np.nan, 0.5])


def test_clusters_beyond_the_room_for_bars_share_the_last_and_none_is_lost():
    number = MOST_ROWS + 10
    clusters = np.arange(1, number + 1)
    names, photos, _ = cluster_rows(np.zeros(number, dtype=int), clusters, np.ones(number), number)
    assert names[-1] == f"{MOST_ROWS} to {number}"
    assert len(names) == MOST_ROWS
    assert photos.sum() == number
    exact, _, _ = cluster_rows(np.zeros(MOST_ROWS, dtype=int), clusters[:MOST_ROWS], np.ones(MOST_ROWS), MOST_ROWS)
    assert exact[-1] == str(MOST_ROWS)


@pytest.mark.parametrize(
    ("longitudes", "middle"),
    [([10.0, 30.0], 20), ([170.0, -170.0], -180), ([-160.0, 140.0, 170.0], 170), ([5.0], 5), ([-120.0, -70.0], -95)],
)
def test_the_map_is_centred_away_from_the_widest_gap(longitudes, middle):
    assert middle_longitude(np.array(longitudes)) == pytest.approx(middle)


def test_centres_too_close_for_two_labels_share_one():
    places = np.array([[0.1, 0.1], [0.9, 0.9], [0.11, 0.12], [0.1, 0.3]])
    assert [rows.tolist() for rows in crowds(places)] == [[0, 2], [1], [3]]
    assert [enumeration(np.arange(1, n + 1)) for n in (1, 2, 3)] == ["1", "1, 2", "1, 2, …"]


def test_degrees_are_named_as_on_a_map():
    named = [format_degrees(value, "E", "W") for value in (-71.25, 10, 190, 0, 1e-9)]
    assert named == ["71.25°W", "10°E", "170°W", "0°", "0°"]
