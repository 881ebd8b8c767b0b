"""The benchmark of checkpoints, on a tiny head: its rows, and that both sides hold what they should."""

from dataclasses import replace

import pytest

from benchmarks.checkpoint import QUICK, Plan, measure
from benchmarks.processes import run_apart

SIZES = replace(
    QUICK.sizes, view_side=32, width=32, layers=1, heads=2, fusion_heads=2, experts=2, expert_width=16, mask_side=4,
    keep_views=4, pool_grid=2,
)  # fmt: skip


@pytest.mark.dist
def test_a_small_run_compares_all_arms():
    rows = run_apart(measure, 1, Plan(SIZES, dim=64, photos=1, rounds=2), 0)
    goals = {row.what: row.goal for row in rows}
    assert goals == {
        "size of a checkpoint": "<= 1.05", "time stopped by a save": "<= 1", "time until a save is on the disk": None,
        "step during a write": None, "time to resume": None,
    }  # fmt: skip
    assert all(0 < row.interval[0] <= row.ratio <= row.interval[1] for row in rows)
    assert 1 < rows[0].ratio < 1.5  # names and headers weigh much beside so few numbers
    assert all("M parameters, 2 rounds" in row.note for row in rows)
