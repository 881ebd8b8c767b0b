import itertools

import numpy as np
import pytest

from pipeline.data.sampler import PositionSampler, order, share_of

WEIGHTS = np.array([0.2, 0.5, 1.0, 1.0, 2.0, 5.0])


def test_an_epoch_is_a_pure_function_without_repeats():
    weights = np.random.default_rng(0).uniform(0.1, 3, 500)
    rows = order(3, 7, weights, 400)
    np.testing.assert_array_equal(rows, order(3, 7, weights, 400))
    assert len(set(rows.tolist())) == 400
    assert not np.array_equal(rows, order(3, 8, weights, 400))
    assert not np.array_equal(rows, order(4, 7, weights, 400))


def test_a_whole_epoch_sees_every_row():
    assert sorted(order(0, 0, WEIGHTS, 6)) == list(range(6))


def test_rows_are_drawn_as_by_sequential_weighted_draws():
    """The defining property of Efraimidis-Spirakis: each draw takes a remaining row in proportion to its weight."""
    epochs = 20_000
    drawn = np.zeros(6)
    for epoch in range(epochs):
        drawn[order(1, epoch, WEIGHTS, 2)] += 1
    expected = np.zeros(6)
    for first, second in itertools.permutations(range(6), 2):
        share = WEIGHTS[first] / WEIGHTS.sum() * WEIGHTS[second] / (WEIGHTS.sum() - WEIGHTS[first])
        expected[[first, second]] += share
    np.testing.assert_allclose(drawn / epochs, expected, atol=0.015)


def test_tiny_weights_do_not_underflow():
    assert sorted(order(0, 0, np.full(50, 1e-12), 50)) == list(range(50))


def rows_of_steps(world_size: int, micro: int, start: int, steps: int) -> list[set[int]]:
    """The rows of each optimizer step of 12 samples, over all ranks, by their places in the sequence."""
    found = [set() for _ in range(steps)]
    for rank in range(world_size):
        sampler = PositionSampler(np.ones(40), 30, seed=5, batch_size=micro, rank=rank, world_size=world_size)
        sampler.start = start
        batches = iter(sampler)
        for step in range(steps):
            for _ in range(12 // world_size // micro):
                found[step].update(next(batches))
    return found


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 4), (2, 6), (2, 3), (3, 4), (4, 3)])
def test_a_step_has_the_same_samples_at_every_world_size_and_accumulation(world_size, micro):
    expected = rows_of_steps(1, 6, 0, 2)
    assert rows_of_steps(world_size, micro, 0, 2) == expected


def test_resuming_mid_epoch_repeats_and_skips_nothing():
    whole = PositionSampler(np.ones(40), 30, seed=5, batch_size=4, rank=0, world_size=1)
    rows = [row for batch in itertools.islice(whole, 15) for row in batch]  # two epochs of thirty
    resumed = PositionSampler(np.ones(40), 30, seed=5, batch_size=4, rank=0, world_size=1)
    resumed.start = 28
    assert [row for batch in itertools.islice(resumed, 8) for row in batch] == rows[28:]
    assert len(set(rows[:30])) == 30
    np.testing.assert_array_equal(rows[30:], order(5, 1, np.ones(40), 30))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_each_row_exactly_once(world_size):
    shares = [share_of(7, rank, world_size) for rank in range(world_size)]
    assert sorted(itertools.chain(*shares)) == list(range(7))
