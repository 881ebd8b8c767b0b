"""Photos of one place: the links connect what the haversine formula does, anywhere on the globe."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from data_prep.decisions import places
from data_prep.decisions.gps import EARTH_RADIUS_M
from data_prep.decisions.links import components
from data_prep.decisions.places import near_pairs

METRE = np.degrees(1 / EARTH_RADIUS_M)  # of latitude


def metres(points: np.ndarray) -> np.ndarray:
    """Haversine distances of all with all, [N, N]; NaN where one is NULL."""
    latitude, longitude = np.radians(points).T
    half = np.sin((latitude[:, None] - latitude) / 2) ** 2
    half += np.cos(latitude)[:, None] * np.cos(latitude) * np.sin((longitude[:, None] - longitude) / 2) ** 2
    return 2 * EARTH_RADIUS_M * np.arcsin(np.sqrt(np.clip(half, 0, 1)))


def around(latitude: float, longitude: float, spread_m: float, photos: int, rng: np.random.Generator) -> np.ndarray:
    """Photos scattered about a point, some without GPS and some at the same spot."""
    east = np.cos(np.radians(min(abs(latitude), 89.9)))
    points = np.array([latitude, longitude]) + rng.uniform(-1, 1, (photos, 2)) * spread_m * METRE / [1, east]
    points[:, 0] = np.clip(points[:, 0], -90, 90)
    points[:, 1] = (points[:, 1] + 180) % 360 - 180
    points[::7] = np.nan
    points[1::20] = points[2]
    return points


@pytest.mark.parametrize("radius_m", [100.0, 25_000.0])
@pytest.mark.parametrize(
    ("latitude", "longitude"), [(0, 10), (60, 0), (-33.9, 18.4), (20, 179.9999), (89.9995, 0), (-89.9995, 120)]
)
def test_the_links_connect_what_the_haversine_formula_does(latitude, longitude, radius_m):
    rng, found = np.random.default_rng(0), []
    for density in (0.5, 1, 1.6):
        points = around(latitude, longitude, radius_m * 12 / density, 200, rng)
        distances = metres(points)
        links = np.concatenate([*near_pairs(points, radius_m)])
        assert (distances[links[:, 0], links[:, 1]] <= radius_m * (1 + 1e-9)).all()
        expected = components(200, [np.argwhere(distances <= radius_m)])  # False for NaN
        assert np.array_equal(components(200, [links]), expected)
        assert len(links) == 199 - expected.max()
        found.append(expected.max() + 1)
    assert found[2] < found[0] < 190


@pytest.mark.parametrize("radius_m", [0.0, 12_000_000.0, 30_000_000.0])
def test_any_radius_from_nothing_to_the_whole_earth(radius_m):
    rng = np.random.default_rng(1)
    points = np.stack([rng.uniform(-90, 90, 60), rng.uniform(-180, 180, 60)], axis=1)
    points[7] = points[3]
    expected = components(60, [np.argwhere(metres(points) <= radius_m)])
    assert np.array_equal(components(60, [*near_pairs(points, radius_m)]), expected)


def test_a_large_radius_is_measured_along_the_ground():
    points = np.array([(0.0, 0.0), (0.0, 100.0), (0.0, -130.0)])
    quarter_m = EARTH_RADIUS_M * np.pi / 2
    assert components(3, [*near_pairs(points, quarter_m)]).tolist() == [0, 1, 2]
    assert components(3, [*near_pairs(points, quarter_m * 101 / 90)]).tolist() == [0, 0, 1]


def test_without_gps_nothing_is_near():
    assert [*near_pairs(np.full((3, 2), np.nan), 100.0)] == []


def test_cells_whose_only_near_photos_are_at_their_borders_are_connected():
    """Two dense crowds 99 m apart between their closest photos, and a third 101 m from the second."""
    rng = np.random.default_rng(2)
    crowd = rng.uniform(0, 30, (400, 2))
    crowd[0], crowd[1] = (0, 15), (30, 15)
    metres_east = np.concatenate([crowd + np.array([east, 0]) for east in (0, 129, 129 + 131)])
    points = metres_east[:, ::-1] * METRE  # at the equator
    assert components(1200, [*near_pairs(points, 100.0)]).tolist() == [0] * 800 + [1] * 400


def test_many_photos_in_one_place_need_little_time_and_memory(monkeypatch):
    """20,000 photos within 100 m are 200 million pairs."""
    rng = np.random.default_rng(1)
    points = np.repeat([[50.0, 8.0], [51.0, 8.0]], 10_000, axis=0) + rng.uniform(-50, 50, (20_000, 2)) * METRE
    monkeypatch.setattr(places._Cells, "_closest", lambda *_: pytest.fail("cells that touch were compared in full"))
    tracemalloc.start()
    links = np.concatenate([*near_pairs(points, 100.0)])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert components(20_000, [links]).tolist() == [0] * 10_000 + [1] * 10_000
    assert len(links) == 19_998
    assert most < 20e6
