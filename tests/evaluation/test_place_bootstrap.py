"""Intervals over places and seeds: against plain loops, and how often they hold what they should."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import matthews_corrcoef

from pipeline.evaluation.metrics import confusion_counts
from pipeline.evaluation.place_bootstrap import (
    ENSEMBLES,
    ROUNDS,
    Estimate,
    PlaceBootstrap,
    bootstrap_units,
    effective_units,
    expanded,
    expanded_tail,
)

PLACES = 12


def answers(seed, seeds=3, photos=600, head_noise=1.0, place_noise=0.8):
    """Labels, places and log-odds [S, N] of heads that differ by their own noise, in places that differ too."""
    rng = np.random.default_rng(seed)
    places = rng.integers(PLACES, size=photos)
    labels = rng.integers(2, size=photos)
    shared = 3 * (labels - 0.5) + place_noise * rng.normal(size=PLACES)[places] + rng.normal(size=photos)
    return labels, places, shared + head_noise * rng.normal(size=(seeds, photos))


def test_a_draw_of_heads_and_places_is_the_mean_mcc_of_what_was_drawn():
    labels, places, log_odds = answers(0)
    outcomes = np.stack([confusion_counts(labels, z, 0.0) for z in log_odds])
    bootstrap = PlaceBootstrap(places, seeds=3)
    value, draws, units = bootstrap.mcc_draws(outcomes, np.ones(600, dtype=bool))
    assert value == pytest.approx(np.mean([matthews_corrcoef(labels, z > 0) for z in log_odds]))
    assert (units, draws.shape) == (PLACES, (ROUNDS,))
    times = bootstrap._draws(tuple(range(PLACES))).astype(int)
    for number in (0, 77, ROUNDS - 1):
        rows = np.repeat(np.arange(600), times[number][places])
        scores = np.array([matthews_corrcoef(labels[rows], z[rows] > 0) for z in log_odds])
        drawn, middle = scores[bootstrap.seed_draws[number]].mean(), scores.mean()
        assert draws[number] == pytest.approx(middle + np.sqrt(3 / 2) * (drawn - middle))


def test_an_ensemble_of_one_head_has_the_interval_over_places_alone():
    labels, places, log_odds = answers(1, seeds=1)
    bootstrap = PlaceBootstrap(places, seeds=1)
    outcomes = confusion_counts(labels, log_odds[0] - 0.3, 0.0)[None]
    found = bootstrap.mcc_of_ensemble(labels, log_odds, np.full(600, 0.3))
    expected = bootstrap.mcc_of_heads(outcomes)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_the_ensembles_value_is_its_own_and_equal_heads_add_nothing_to_the_interval():
    labels, places, log_odds = answers(2)
    cuts = np.random.default_rng(0).normal(size=600) / 10
    bootstrap = PlaceBootstrap(places, seeds=3)
    found = bootstrap.mcc_of_ensemble(labels, log_odds, cuts)
    assert found.value == pytest.approx(matthews_corrcoef(labels, log_odds.mean(axis=0) > cuts))
    same = PlaceBootstrap(places, seeds=3).mcc_of_ensemble(labels, np.repeat(log_odds[:1], 3, axis=0), cuts)
    alone = PlaceBootstrap(places, seeds=1).mcc_of_ensemble(labels, log_odds[:1], cuts)
    assert (same.low, same.high) == pytest.approx((alone.low, alone.high))
    assert len(bootstrap.seed_draws) >= ENSEMBLES


def test_heads_that_differ_more_widen_the_interval_of_their_ensemble():
    widths = []
    for noise in (0.0, 4.0):
        labels, places, log_odds = answers(3, head_noise=noise, place_noise=0.0)
        found = PlaceBootstrap(places, seeds=3).mcc_of_ensemble(labels, log_odds, np.zeros(600))
        places_alone = PlaceBootstrap(places, seeds=1).mcc_of_ensemble(
            labels, log_odds.mean(axis=0, keepdims=True), np.zeros(600)
        )
        widths.append((found.high - found.low) / (places_alone.high - places_alone.low))
    assert widths[0] == pytest.approx(1, abs=1e-9)
    assert widths[1] > 1.05


@pytest.mark.parametrize("kind", ["heads", "ensemble"])
def test_the_interval_holds_the_truth_of_new_places_and_heads_about_as_often_as_it_says(kind):
    """The truth is the mean over many draws of places and heads; 120 intervals of 95 %, so 0.95 +- 0.02."""

    def value(labels, log_odds):
        if kind == "heads":
            return np.mean([matthews_corrcoef(labels, z > 0) for z in log_odds])
        return matthews_corrcoef(labels, log_odds.mean(axis=0) > 0)

    worlds = [answers(seed, head_noise=2.0) for seed in range(120)]
    truth, inside = np.mean([value(labels, z) for labels, _, z in worlds]), 0
    for labels, places, log_odds in worlds:
        bootstrap = PlaceBootstrap(places, seeds=3)
        outcomes = np.stack([confusion_counts(labels, z, 0.0) for z in log_odds])
        ensemble = bootstrap.mcc_of_ensemble(labels, log_odds, np.zeros(len(labels)))
        found = ensemble if kind == "ensemble" else bootstrap.mcc_of_heads(outcomes)
        inside += found.low <= truth <= found.high
    assert 0.9 <= inside / 120 <= 1.0


def test_a_mean_over_photos_is_drawn_like_the_mcc():
    _, places, _ = answers(0)
    values, rows = np.random.default_rng(0).normal(size=(3, 600)), places != 7
    bootstrap = PlaceBootstrap(places, seeds=3)
    found = bootstrap.mean(values, rows)
    assert found.value == pytest.approx(values[:, rows].mean())
    assert found.low < found.value < found.high
    same = bootstrap.mean(np.full(values.shape, 5), rows)
    assert (same.low, same.value, same.high) == pytest.approx((5, 5, 5))


def test_few_units_widen_the_interval_as_students_t_does():
    for units in (4, 10, 1000):
        quantile = np.sqrt(units / (units - 1)) * stats.t.ppf(0.975, units - 1)
        assert expanded_tail(units) == pytest.approx(stats.norm.cdf(-quantile))
    draws = np.random.default_rng(0).normal(size=200_000)
    low, high = expanded(draws, 10)
    assert (low, high) == pytest.approx((-2.385, 2.385), abs=0.05)
    assert expanded(draws, 1) == (-np.inf, np.inf)


def test_many_small_places_beside_large_ones_count_for_little():
    assert effective_units(np.repeat(np.arange(10), 200)) == pytest.approx(10)
    with_single_photos = np.concatenate([np.repeat(np.arange(10), 200), np.arange(10, 100)])
    assert effective_units(with_single_photos) == pytest.approx(10.9, abs=0.05)
    labels, places, log_odds = answers(4)
    strays = np.where(np.arange(600) < 60, PLACES + np.arange(600), places)  # a tenth of the photos, each a place
    found = PlaceBootstrap(strays, seeds=3).mcc_of_ensemble(labels, log_odds, np.zeros(600))
    _, drawn, units = PlaceBootstrap(strays, seeds=3).mcc_draws(
        confusion_counts(labels, log_odds.mean(axis=0), 0.0)[None].repeat(3, axis=0), np.ones(600, dtype=bool)
    )
    low, high = expanded(drawn, units)
    assert units == PLACES + 60
    assert found.high - found.low > 1.05 * (high - low)


def test_groups_are_drawn_where_there_are_few_places():
    places, groups = np.repeat(np.arange(6), 4), np.arange(24)
    everything = np.ones(24, dtype=bool)
    assert bootstrap_units(places, groups, everything)[1] == "places"
    assert bootstrap_units(places, groups, places < 4)[1] == "groups of near-duplicates"


def test_an_estimate_reads_as_a_number_with_its_interval():
    assert str(Estimate(0.5, 0.41, 0.6).scaled(2)) == "1.000 (0.820 to 1.200)"
