"""GPS clusters and sampling weights."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.gps import assign_clusters, fit_centres, sample_weights, unit_sphere

RNG = np.random.default_rng(0)


def test_unit_sphere_distances_are_great_circle_distances():
    places = np.array([[59.91, 10.75], [-12.05, -77.04]])  # Oslo and Lima, 11,093 km apart on the mean sphere
    a, b = unit_sphere(places)
    latitude, longitude = np.radians(places).T
    half = (
        np.sin((latitude[1] - latitude[0]) / 2) ** 2
        + np.cos(latitude[0]) * np.cos(latitude[1]) * np.sin((longitude[1] - longitude[0]) / 2) ** 2
    )
    assert np.isclose(np.arccos(a @ b), 2 * np.arcsin(np.sqrt(half)), atol=1e-12)


def test_cities_are_found_with_the_largest_first():
    cities = np.array([[59.9, 10.8], [45.8, 4.8], [-12.0, -77.0]])
    members = np.repeat(np.arange(3), [20, 60, 40])
    points = cities[members] + RNG.normal(0, 0.01, (120, 2))
    centres = fit_centres(points, 3, seed=0)
    assert np.allclose(centres, cities[[1, 2, 0]], atol=0.01)
    assert np.array_equal(assign_clusters(points, centres), np.array([3, 1, 2])[members])


def test_a_city_on_the_date_line_is_one_cluster():
    longitudes = np.where(np.arange(40) % 2 == 0, 179.99, -179.99)
    fiji = np.stack([np.full(40, -17.0), longitudes], axis=1)
    centres = fit_centres(np.concatenate([fiji, [[60.0, 10.0]] * 10]), 2, seed=0)
    assert len(set(assign_clusters(fiji, centres).tolist())) == 1
    assert abs(abs(centres[0, 1]) - 180) < 0.02


def test_null_is_cluster_zero_and_other_splits_take_the_nearest_centre():
    centres = np.array([[59.9, 10.8], [-12.0, -77.0]])
    points = np.array([[np.nan, np.nan], [55.7, 13.2], [-33.4, -70.6]])
    assert assign_clusters(points, centres).tolist() == [0, 1, 2]
    assert assign_clusters(points, np.empty((0, 2))).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("photos", "asked", "expected"), [(500, 0, 12), (60, 0, 3), (5, 0, 1), (60, 7, 7), (4, 9, 4)])
def test_the_number_of_clusters_follows_the_request_and_the_data(photos, asked, expected):
    points = np.random.default_rng(1).uniform(-60, 60, (photos, 2))
    assert len(fit_centres(points, asked, seed=0)) == expected


def test_no_more_clusters_than_places_and_none_without_gps():
    assert len(fit_centres(np.array([[1.0, 2.0]] * 50), 5, seed=0)) == 1
    assert fit_centres(np.empty((0, 2)), 5, seed=0).shape == (0, 2)


def independent_weights(clusters, labels, temper):
    """The formula of the docstring, photo by photo, in plain Python."""
    raw = []
    for cluster, label in zip(clusters, labels, strict=True):
        members = [i for i, c in enumerate(clusters) if c == cluster]
        target, share = 1 / len(set(clusters)), len(members) / len(clusters)
        weight = (target / share) ** temper
        counts = {value: sum(labels[i] == value for i in members) for value in (0, 1)}
        if label in (0, 1) and counts[0] and counts[1]:
            weight *= (counts[0] + counts[1]) / (2 * counts[label])
        raw.append(min(10.0, weight))
    mean = sum(raw) / len(raw)
    return [weight / mean for weight in raw]


@pytest.mark.parametrize("temper", [0.0, 0.5, 1.0])
def test_weights_follow_the_formula(temper):
    rng = np.random.default_rng(3)
    clusters = rng.choice(5, 400, p=[0.02, 0.5, 0.3, 0.15, 0.03])
    labels = rng.choice([-1, 0, 1], 400, p=[0.2, 0.75, 0.05])
    labels[clusters == 3] = 0  # one class only
    weights = sample_weights(clusters, labels, temper)
    assert np.allclose(weights, independent_weights(clusters.tolist(), labels.tolist(), temper), atol=1e-12)
    assert np.isclose(weights.mean(), 1)


def test_full_temper_gives_every_cluster_and_class_the_same_mass():
    clusters, labels = np.repeat([1, 2], [80, 20]), np.tile([0, 1, 1, 1, 1], 20)
    weights = sample_weights(clusters, labels, 1.0)
    masses = [weights[(clusters == c) & (labels == y)].sum() for c in (1, 2) for y in (0, 1)]
    assert np.allclose(masses, 25)


def test_a_rare_photo_is_not_drawn_without_limit():
    clusters = np.array([1] * 999 + [2])
    weights = sample_weights(clusters, np.full(1000, -1), 1.0)
    assert np.isclose(weights[-1] / weights[0], 10 / (1000 / (2 * 999)))
