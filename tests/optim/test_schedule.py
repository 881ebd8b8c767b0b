import math
from itertools import pairwise

import pytest

from pipeline.optim.config import OptimConfig
from pipeline.optim.schedule import lr_at

RUNS = [(total, share) for total in (10, 100, 1000, 7777) for share in (0.0, 0.05, 0.3)]


def rates(total, config):
    return [lr_at(step, total, config) for step in range(total)]


@pytest.mark.parametrize(("total", "share"), RUNS)
def test_rises_to_the_peak_and_falls_to_the_final_rate(total, share):
    config = OptimConfig(lr=3e-4, warmup_share=share, final_lr_ratio=0.02)
    lr = rates(total, config)
    warmup = int(share * total)
    assert lr[warmup] == 3e-4 == max(lr)
    assert lr[-1] == pytest.approx(0.02 * 3e-4, rel=1e-12)
    assert all(a < b for a, b in pairwise(lr[: warmup + 1]))
    assert all(a > b for a, b in pairwise(lr[warmup:]))


def test_the_rise_is_a_straight_line_and_no_step_is_wasted_at_zero():
    lr = rates(100, OptimConfig(lr=1.0, warmup_share=0.2))
    assert lr[:21] == pytest.approx([(step + 1) / 21 for step in range(21)])


def test_the_fall_is_half_a_cosine():
    lr = rates(101, OptimConfig(lr=2.0, warmup_share=0.0, final_lr_ratio=0.1))
    assert lr == pytest.approx([2 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 100)) / 2) for t in range(101)])
    assert lr[50] == pytest.approx(2 * (0.1 + 0.9 / 2))


@pytest.mark.parametrize("total", [1, 2, 3, 5])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95])
def test_the_shortest_runs_reach_the_peak_and_never_pass_it(total, share):
    lr = rates(total, OptimConfig(lr=1.0, warmup_share=share))
    assert max(lr) == 1.0
    assert min(lr) > 0
