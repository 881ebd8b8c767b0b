"""What an epoch shows and in what order: shares, caps, turns, places, and the same for every number of processes."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

from pipeline.data.sampler import PositionSampler, SystematicDraw, expected_counts, share_of
from pipeline.data.weights import sample_weights

SEEDS = range(40)


def random_split(seed: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Weights of a few rows or many, their strata, the length of an epoch and the cap."""
    generator = np.random.default_rng(seed)
    rows = int(generator.integers(1, 600))
    weights = generator.lognormal(0, generator.uniform(0, 3), rows) * 10.0 ** generator.integers(-9, 9)
    samples = int(generator.integers(1, rows + 1))
    return weights, generator.integers(0, 12, rows), samples, int(generator.integers(1, 6))


def labelled(rows: int, roadwork: float, clusters: tuple[float, ...] = (1.0,)) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of these shares, and labels of which this share in each cluster is roadwork."""
    sizes = np.rint(np.array(clusters) * rows).astype(int)
    labels = np.concatenate([np.arange(size) < round(roadwork * size) for size in sizes]).astype(int)
    return np.repeat(np.arange(1, len(sizes) + 1), sizes), labels


@pytest.mark.parametrize("seed", SEEDS)
def test_expected_counts_add_up_keep_the_cap_and_follow_the_weights_below_it(seed):
    weights, _, samples, cap = random_split(seed)
    found = expected_counts(weights, samples, cap)
    assert found.sum() == pytest.approx(samples, rel=1e-9)
    assert found.max() <= cap
    level = brentq(lambda log: np.minimum(np.exp(log) * weights, cap).sum() - samples * (1 - 1e-12), -60, 60)
    np.testing.assert_allclose(found, np.minimum(math.exp(level) * weights, cap), rtol=1e-6)


@pytest.mark.parametrize("cap", [1, 2, 4])
def test_what_the_cap_takes_from_few_heavy_rows_goes_to_the_others(cap):
    weights = np.array([1e12] * 3 + [1.0] * 97)
    found = expected_counts(weights, 80, cap)
    assert found[:3] == pytest.approx(cap)
    assert found[3:] == pytest.approx((80 - 3 * cap) / 97)


def test_a_whole_epoch_with_a_cap_of_one_shows_every_row_whatever_the_weights():
    weights = np.random.default_rng(0).lognormal(0, 4, 300)
    for epoch in range(20):
        assert sorted(SystematicDraw(weights, 300, seed=1, max_repeats=1).order(epoch)) == list(range(300))


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_and_strata_come_as_often_as_expected_rounded_down_or_up(seed):
    weights, strata, samples, cap = random_split(seed)
    draw = SystematicDraw(weights, samples, seed=seed, max_repeats=cap, strata=strata)
    for epoch in range(8):
        counts = draw.counts(epoch)
        assert counts.sum() == samples
        assert counts.max() <= draw.most <= cap
        assert (np.abs(counts - draw.expected) < 1 + 1e-9).all()
        by_stratum = [np.bincount(strata, values, 12) for values in (counts, draw.expected)]
        assert (np.abs(by_stratum[0] - by_stratum[1]) < 1 + 1e-9).all()
        assert Counter(draw.order(epoch).tolist()) == Counter(dict(enumerate(counts.tolist())))


@pytest.mark.parametrize("roadwork", [0.1, 0.25, 0.5])
def test_an_epoch_has_the_share_of_roadwork_that_full_balance_asks_for(roadwork):
    clusters, labels = labelled(2000, roadwork)
    draw = SystematicDraw(
        sample_weights(clusters, labels, 0.5, balance=1.0), 1600, seed=3, max_repeats=4, strata=labels
    )
    for epoch in range(5):
        assert abs(labels[draw.order(epoch)].sum() - 800) <= 1


def test_an_epoch_has_the_share_of_each_cluster_that_full_temper_asks_for():
    clusters, labels = labelled(3000, 0.3, (0.7, 0.2, 0.08, 0.02))
    weights = sample_weights(clusters, labels, 1.0, balance=1.0)
    draw = SystematicDraw(weights, 2400, seed=0, max_repeats=30, strata=2 * clusters + labels)
    for epoch in range(5):
        rows = draw.order(epoch)
        found = np.bincount(2 * clusters[rows] + labels[rows])[2:]
        assert (np.abs(found - 300) <= 1).all()
    capped = SystematicDraw(weights, 2400, seed=0, max_repeats=4, strata=2 * clusters + labels)
    np.testing.assert_allclose(np.bincount(clusters[capped.order(0)])[-1], 4 * 60, atol=1)  # four times each of its 60


@pytest.mark.parametrize("seed", range(5))
def test_over_many_epochs_every_row_gets_the_showings_that_its_weight_asks_for(seed):
    """Independent draws would miss 2,000 epochs' showings by about 20; turns miss it by a few."""
    generator = np.random.default_rng(seed)
    weights, strata = generator.lognormal(0, 1, 60), generator.integers(0, 4, 60)
    draw = SystematicDraw(weights, 48, seed=seed, max_repeats=4, strata=strata)
    assert np.abs(sum(map(draw.counts, range(2000))) - 2000 * draw.expected).max() < 5


def test_over_many_seeds_an_epoch_shows_every_row_as_often_as_expected():
    weights, seeds = np.random.default_rng(5).lognormal(0, 1, 60), 4000
    draws = [SystematicDraw(weights, 48, seed=seed, max_repeats=4) for seed in range(seeds)]
    expected = draws[0].expected
    part = expected % 1
    for epoch in (0, 7):
        mean = np.mean([draw.counts(epoch) for draw in draws], axis=0)
        assert (np.abs(mean - expected) < 4.5 * np.sqrt(part * (1 - part) / seeds) + 1e-9).all()


def test_with_equal_weights_no_photo_comes_twice_in_an_epoch_or_is_left_out_of_two_in_a_row():
    draw = SystematicDraw(np.full(250, 3.0), 200, seed=2, max_repeats=4)
    counts = np.stack([draw.counts(epoch) for epoch in range(60)])
    assert counts.max() == 1
    assert (counts[1:] + counts[:-1]).min() == 1
    assert (np.abs(counts.sum(axis=0) - 48) <= 2).all()


def random_epochs(seed: int, epochs: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The weights of 400 rows, a tenth of them heavy, and the order of the rows in several epochs."""
    generator = np.random.default_rng(seed)
    weights = np.where(np.arange(400) < 40, 9.0, 1.0) * generator.lognormal(0, 0.5, 400)
    draw = SystematicDraw(weights, 320, seed=seed, max_repeats=4, strata=(np.arange(400) < 40).astype(int))
    return weights, [draw.order(epoch) for epoch in range(epochs)]


def test_heavy_rows_are_spread_evenly_over_an_epoch():
    tenths, heavy = np.zeros(10), 0
    for seed in SEEDS:
        for rows in random_epochs(seed, 5)[1]:
            tenths += (rows.reshape(10, 32) < 40).sum(axis=1)
            heavy += int((rows < 40).sum())
    assert heavy > 100 * len(SEEDS)
    assert stats.chisquare(tenths).pvalue > 0.001


def test_the_place_in_an_epoch_says_nothing_about_the_weight():
    found = []
    for seed in SEEDS:
        weights, epochs = random_epochs(seed, 5)
        found += [stats.spearmanr(np.arange(320), weights[rows]).statistic for rows in epochs]
    # Of n places in random order the rank correlation has a standard deviation of 1 / sqrt(n - 1).
    assert abs(np.mean(found)) < 4 / math.sqrt(319 * len(found))
    assert np.std(found) == pytest.approx(1 / math.sqrt(319), rel=0.2)


def test_every_epoch_has_another_order():
    """Also where the same rows are in each: as many rows keep their place as in two random orders, one on average."""
    kept = []
    for seed in SEEDS:
        draw = SystematicDraw(np.ones(100), 100, seed=seed, max_repeats=4)
        orders = [draw.order(epoch) for epoch in range(5)]
        kept += [int((first == second).sum()) for first, second in itertools.combinations(orders, 2)]
    assert np.mean(kept) == pytest.approx(1, abs=4 / math.sqrt(len(kept)))


def test_an_epoch_follows_from_the_seed_and_its_number():
    weights, strata, samples, cap = random_split(3)
    draws = [SystematicDraw(weights, samples, seed=seed, max_repeats=cap, strata=strata) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(draws[0].order(7), draws[1].order(7))
    assert not np.array_equal(draws[0].order(7), draws[0].order(8))
    assert not np.array_equal(draws[0].order(7), draws[2].order(7))


def sampler(draw: SystematicDraw, micro: int, rank: int = 0, world_size: int = 1, start: int = 0) -> PositionSampler:
    made = PositionSampler(draw, batch_size=micro, rank=rank, world_size=world_size)
    made.start = start
    return made


def steps_of(draw: SystematicDraw, world_size: int, micro: int, start: int, steps: int) -> list[list[int]]:
    """The samples of each optimizer step of 12, over all ranks, sorted."""
    found: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(world_size):
        batches = iter(sampler(draw, micro, rank, world_size, start))
        for step in range(steps):
            for _ in range(12 // world_size // micro):
                found[step] += next(batches)
    return [sorted(rows) for rows in found]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 4), (2, 6), (2, 3), (3, 4), (4, 3)])
def test_a_step_has_the_same_samples_at_every_world_size_and_accumulation(world_size, micro, seed):
    generator = np.random.default_rng(seed)
    draw = SystematicDraw(generator.lognormal(0, 1.5, 40), 30, seed=seed, max_repeats=4)
    start = int(generator.integers(100))
    found = steps_of(draw, world_size, micro, start, 8)
    assert found == steps_of(draw, 1, 6, start, 8)
    assert any(len(set(step)) < 12 for step in found)  # rows come more than once


@pytest.mark.parametrize("seed", range(6))
def test_resuming_mid_epoch_repeats_and_skips_nothing(seed):
    generator = np.random.default_rng(seed)
    draw = SystematicDraw(generator.lognormal(0, 1.5, 40), 30, seed=seed, max_repeats=4)
    rows = [row for batch in itertools.islice(sampler(draw, 4), 30) for row in batch]  # four epochs of thirty
    start = int(generator.integers(100))
    resumed = itertools.islice(sampler(draw, 4, start=start), (120 - start) // 4)
    assert [row for batch in resumed for row in batch] == rows[start : start + (120 - start) // 4 * 4]
    for epoch in range(4):
        np.testing.assert_array_equal(rows[30 * epoch : 30 * epoch + 30], draw.order(epoch))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_each_row_exactly_once(world_size):
    shares = [share_of(7, rank, world_size) for rank in range(world_size)]
    assert sorted(itertools.chain(*shares)) == list(range(7))
