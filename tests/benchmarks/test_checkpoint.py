"""The benchmark of checkpoints, on a tiny head: its rows, and that both sides hold what they should."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest

from benchmarks.checkpoint import QUICK, Plan, measure

SIZES = replace(
    QUICK.sizes, view_side=32, width=32, layers=1, heads=2, fusion_heads=2, experts=2, expert_width=16, mask_side=4,
    keep_views=4, pool_grid=2,
)  # fmt: skip


@pytest.mark.dist
def test_a_small_run_compares_all_arms():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        rows = pool.submit(measure, Plan(SIZES, dim=64, photos=1, rounds=2), 0).result()
    assert [row.what for row in rows] == [
        "size of a checkpoint",
        "time stopped by a save",
        "time to resume",
        "time stopped by a save, uploading",
        "step during an upload",
    ]
    assert all(0 < row.interval[0] <= row.ratio <= row.interval[1] for row in rows)
    assert [row.what for row in rows if row.goal] == ["size of a checkpoint", "step during an upload"]
    assert 1 < rows[0].ratio < 1.5  # names and headers weigh much beside so few numbers
    assert all("M parameters, 2 rounds" in row.note for row in rows)
