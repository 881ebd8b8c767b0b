"""GPS clusters and sampling weights."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import KMeans

from data_prep.decisions.gps import (
    EARTH_RADIUS_M,
    assign_clusters,
    choose_clusters,
    fit_centres,
    read_target,
    target_shares,
    unit_sphere,
)
from pipeline.data.sampler import expected_counts
from pipeline.data.weights import sample_weights
from pipeline.errors import UserError

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


@pytest.mark.parametrize(("photos", "asked", "expected"), [(60, 7, 7), (4, 9, 4), (60, 1, 1)])
def test_the_number_of_clusters_follows_the_request_and_the_data(photos, asked, expected):
    points = np.random.default_rng(1).uniform(-60, 60, (photos, 2))
    assert len(fit_centres(points, asked, seed=0)) == expected


def test_no_more_clusters_than_places_and_none_without_gps():
    assert len(fit_centres(np.array([[1.0, 2.0]] * 50), 5, seed=0)) == 1
    assert fit_centres(np.empty((0, 2)), 5, seed=0).shape == (0, 2)


@pytest.mark.parametrize("asked", [0, 5])
def test_photos_of_two_cameras_that_stand_still_are_two_clusters(asked):
    cameras = np.repeat([[59.91, 10.75], [-17.0, 180.0]], 30, axis=0)
    jitter = np.random.default_rng(0).uniform(-1e-9, 1e-9, cameras.shape)
    cameras[::2, 1] *= np.where(cameras[::2, 1] == 180, -1, 1)  # the same meridian, written otherwise
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(fit_centres(cameras + jitter, asked, seed=0)) == 2


def around_cities(cities, per_city, spread=0.05, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.stack([rng.uniform(30, 48, cities), rng.uniform(-120, -75, cities)], axis=1)
    return np.repeat(centres, per_city, axis=0) + rng.normal(0, spread, (cities * per_city, 2))


@pytest.mark.parametrize(("cities", "per_city"), [(2, 20), (3, 40), (8, 30), (20, 150)])
def test_the_silhouette_finds_as_many_clusters_as_cities(cities, per_city):
    assert len(fit_centres(around_cities(cities, per_city), 0, seed=0)) == cities


def test_one_evenly_photographed_area_or_a_handful_of_photos_is_one_cluster():
    square = np.array([45.0, 8.0]) + np.random.default_rng(0).uniform(-0.1, 0.1, (400, 2))
    assert choose_clusters(square, seed=0) == 1
    assert choose_clusters(around_cities(2, 19), seed=0) == 1


def test_there_are_twenty_photos_for_each_cluster_and_at_most_thirty_clusters():
    assert choose_clusters(around_cities(10, 6), seed=0) <= 3
    assert choose_clusters(around_cities(40, 40, spread=0.001), seed=0) == 30


def great_circle(p, q):
    (a, b), (c, d) = np.radians(p).tolist(), np.radians(q).tolist()
    half = math.sin((c - a) / 2) ** 2 + math.cos(a) * math.cos(c) * math.sin((d - b) / 2) ** 2
    return 2 * EARTH_RADIUS_M * math.asin(math.sqrt(half))


def mean_silhouette(points, members):
    """Rousseeuw 1987, equation 2, photo by photo."""
    total = 0.0
    for i, p in enumerate(points):
        to = {}
        for number in set(members):
            others = [great_circle(p, q) for j, q in enumerate(points) if members[j] == number and j != i]
            to[number] = sum(others) / len(others) if others else None
        own = to.pop(members[i])
        if own is not None:  # a photo alone in its cluster counts 0
            other = min(to.values())
            total += (other - own) / max(own, other)
    return total / len(points)


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_the_best_mean_silhouette(seed):
    points = around_cities(5, 24, spread=2.0, seed=seed)
    scores = {}
    for count in range(2, 7):
        members = KMeans(count, n_init=4, random_state=seed).fit_predict(unit_sphere(points)).tolist()
        scores[count] = mean_silhouette(points, members)
    assert max(scores.values()) > 0.5
    assert choose_clusters(points, seed) == max(scores, key=scores.get)


def independent_weights(clusters, labels, temper, balance, target=None):
    """The formula of the docstring, photo by photo, in plain Python."""
    raw = []
    for cluster, label in zip(clusters, labels, strict=True):
        members = [i for i, c in enumerate(clusters) if c == cluster]
        wanted = target[cluster] if target else 1 / len(set(clusters))
        weight = (wanted * len(clusters) / len(members)) ** temper
        counts = {value: sum(labels[i] == value for i in members) for value in (0, 1)}
        if label in (0, 1) and counts[0] and counts[1]:
            known = counts[0] + counts[1]
            factors = {value: (known / (2 * counts[value])) ** balance for value in (0, 1)}
            weight *= factors[label] / (sum(factors[value] * counts[value] for value in (0, 1)) / known)
        raw.append(weight)
    mean = sum(raw) / len(raw)
    return [weight / mean for weight in raw]


@pytest.mark.parametrize("target", [None, [0.1, 0.05, 0.2, 0.15, 0.5]])
@pytest.mark.parametrize(("temper", "balance"), [(0.0, 1.0), (0.5, 0.0), (0.5, 0.5), (1.0, 0.3), (1.0, 1.0)])
def test_weights_follow_the_formula(temper, balance, target):
    rng = np.random.default_rng(3)
    clusters = rng.choice(5, 400, p=[0.02, 0.5, 0.3, 0.15, 0.03])
    labels = rng.choice([-1, 0, 1], 400, p=[0.2, 0.75, 0.05])
    labels[clusters == 3] = 0  # one class only
    labels[clusters == 4] = -1  # none at all
    weights = sample_weights(clusters, labels, temper, None if target is None else np.array(target), balance)
    expected = independent_weights(clusters.tolist(), labels.tolist(), temper, balance, target)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert weights.mean() == pytest.approx(1)


@pytest.mark.parametrize(("balance", "share"), [(0.0, 0.1), (0.5, 0.25), (1.0, 0.5)])
def test_balance_moves_weight_between_the_classes_of_a_cluster_and_not_between_clusters(balance, share):
    """The odds of roadwork go from 1:9 over 1:3 to 1:1; the other cluster keeps its own, and both keep their sums."""
    clusters, labels = np.repeat([1, 2], [100, 60]), np.concatenate([np.arange(100) < 10, np.arange(60) < 30])
    weights = sample_weights(clusters, labels.astype(int), 0.0, balance=balance)
    assert weights[clusters == 1].sum() == pytest.approx(100)
    assert weights[(clusters == 1) & labels].sum() == pytest.approx(100 * share)
    np.testing.assert_allclose(weights[clusters == 2], 1)


def test_photos_without_a_label_and_clusters_of_one_class_keep_their_weight_at_any_balance():
    clusters, labels = np.repeat([0, 1, 2], [30, 40, 30]), np.repeat([1, -1, 0, 1, -1], [30, 10, 25, 5, 30])
    weights = sample_weights(clusters, labels, 0.0, balance=0.7)
    np.testing.assert_allclose(weights[(labels == -1) | (clusters != 1)], 1)
    assert weights[(clusters == 1) & (labels == 1)].min() > 1 > weights[(clusters == 1) & (labels == 0)].max()


def test_full_temper_gives_every_cluster_and_class_the_same_mass():
    clusters, labels = np.repeat([1, 2], [80, 20]), np.tile([0, 1, 1, 1, 1], 20)
    weights = sample_weights(clusters, labels, 1.0, balance=1.0)
    masses = [weights[(clusters == c) & (labels == y)].sum() for c in (1, 2) for y in (0, 1)]
    assert np.allclose(masses, 25)


def test_a_rare_photo_asks_for_all_that_its_cluster_is_to_have_and_training_caps_it_exactly():
    clusters = np.array([1] * 999 + [2])
    weights = sample_weights(clusters, np.full(1000, -1), 1.0)
    assert weights[-1] == pytest.approx(500)
    for cap in (1, 4, 10):
        expected = expected_counts(weights, 800, cap)
        assert expected.max() == expected[-1] == cap
        np.testing.assert_allclose(expected[:-1], (800 - cap) / 999)


def test_full_temper_samples_the_clusters_as_the_deployment_has_them():
    clusters = np.repeat([0, 1, 3], [20, 50, 30])  # no photo of cluster 2 is left
    weights = sample_weights(clusters, np.full(100, -1), 1.0, np.array([0.2, 0.1, 0.2, 0.5]))
    masses = np.array([weights[clusters == number].sum() for number in (0, 1, 3)])
    assert np.allclose(masses / masses.sum(), np.array([0.2, 0.1, 0.5]) / 0.8)


CENTRES = np.array([[59.9, 10.8], [45.8, 4.8], [-12.0, -77.0]])


def test_target_shares_count_the_nearest_centre_and_photos_without_gps_keep_theirs():
    places = np.array([[59.9, 10.8]] * 6 + [[45.9, 4.9]] * 2 + [[48.9, 2.3]])  # Paris is nearest to Lyon, 390 km off
    clusters = np.array([0] * 10 + [1] * 20 + [2] * 15 + [3] * 5)
    shares, far = target_shares(places, CENTRES, clusters)
    assert np.allclose(shares, [0.2, 0.8 * 7 / 12, 0.8 * 4 / 12, 0.8 * 1 / 12])
    assert far == pytest.approx(1 / 9)


def test_far_means_fifty_kilometres_from_every_centre():
    km = np.degrees(1000 / EARTH_RADIUS_M)
    places = CENTRES[[0, 0, 2]] + np.array([[49.9 * km, 0], [50.1 * km, 0], [-50.1 * km, 0]])
    assert target_shares(places, CENTRES, np.ones(4, dtype=np.int64))[1] == pytest.approx(2 / 3)


def test_a_target_without_any_cluster_is_a_mistake():
    with pytest.raises(UserError, match="none of them has GPS"):
        target_shares(CENTRES, np.empty((0, 2)), np.zeros(5, dtype=np.int64))


def test_a_target_is_read_from_every_kind_of_table_and_bad_rows_are_told(tmp_path, capsys):
    strings = ["[59.9, 10.8]", "(-12.0, -77.0)", "nan", "", "[0, 0]", "[99.0, 200.0]", "north of Oslo, Norway"]
    pd.DataFrame({"GPS": strings}).to_csv(tmp_path / "a.csv", index=False)
    lines = [{"lat": 59.9, "lon": "10.8"}, {"gps": {"latitude": -12, "longitude": -77.0}}, {"lat": None, "lon": None}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pd.DataFrame({"latitude": [59.9, -12.0], "longitude": [10.8, -77.0]}).to_parquet(tmp_path / "c.parquet")
    for name in ("a.csv", "b.jsonl", "c.parquet"):
        assert read_target(tmp_path / name).tolist() == [[59.9, 10.8], [-12.0, -77.0]]
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith(
        "2 places; rows left out: 2 empty (such as ['nan'] of 'row 3'); "
        "1 out of range (such as ['[99.0, 200.0]'] of 'row 6'); "
        "1 unreadable (such as ['north of Oslo, Norway'] of 'row 7'); 1 zero (such as ['[0, 0]'] of 'row 5')"
    )
    assert told[1].endswith("2 places; rows left out: 1 empty (such as [None, None] of 'row 3')")
    assert len(told) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gps\n", "it has no rows"),
        ("place\nOslo\n", r"1 empty .*; its columns are place\);.* needs a column gps"),
        ('gps\n"[0, 0]"\n', "1 zero"),
    ],
)
def test_a_target_without_a_place_is_a_mistake(tmp_path, text, sentence):
    (tmp_path / "target.csv").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_target(tmp_path / "target.csv")


def test_a_target_with_swapped_columns_is_doubted(tmp_path, capsys):
    (tmp_path / "target.csv").write_text("lat,lon\n-86.2,39.8\n-87.6,41.9\n")
    assert len(read_target(tmp_path / "target.csv")) == 2
    assert "2 of 2 places lie beyond 66 degrees of latitude, perhaps" in capsys.readouterr().err
