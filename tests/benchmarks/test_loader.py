"""The benchmark of loaders, on a few small photos: all readers find the same photos, and cut the same views."""

import math

import pytest
import torch

from benchmarks import loader as benchmark
from benchmarks.loader import Plan, by_key, fidelity, make_shards, measure


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan("400x300", photos=9, rounds=2)


@pytest.fixture(scope="module")
def shards(plan, tmp_path_factory):
    return make_shards(plan, tmp_path_factory.mktemp("loader"), seed=1, processes=1)


def test_every_worker_has_tars_of_its_own(shards, plan):
    assert len(shards) == plan.photos
    assert len(shards.tars) >= benchmark.WORKERS


@pytest.mark.dist
def test_a_small_run_compares_all_readers(shards, plan, monkeypatch):
    monkeypatch.setattr(benchmark, "SIDE", 64)
    rows = measure(shards, plan, seed=0)
    assert [row.goal for row in rows] == [">= 5", ">= 5", ">= 1", ">= 1"]
    assert all(0 < row.interval[0] <= row.ratio <= row.interval[1] for row in rows)
    # With our function in them, the others give the very same pixels.
    assert ["inf dB" in row.note for row in rows] == [False, False, True, True]


def test_other_photos_or_other_pixels_are_no_comparison():
    views = torch.full((2, 3, 3, 4, 4), 100, dtype=torch.uint8)
    ours = by_key([(("a", "b"), views)])
    assert fidelity(ours, by_key([(("b",), views[1:]), (("a",), views[:1])])) == math.inf
    with pytest.raises(AssertionError):
        fidelity(ours, by_key([(("a",), views[:1])]))
    with pytest.raises(AssertionError):
        fidelity(ours, by_key([(("a", "b"), views + 20)]))
    changed = views.clone()
    changed[0, 1, 0, :2, :2] += 1  # 4 of the 48 values of one view
    assert fidelity(ours, by_key([(("a", "b"), changed)])) == pytest.approx(20 * math.log10(255) + 10 * math.log10(12))
