"""The benchmark of view pruning, on a few tiny studies: rows say what was measured, pairs stay pairs."""

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef

from benchmarks.pruning import MOST_FLOPS, Study, dynamic_rows, measure, policy_rows
from benchmarks.pruning_study import (
    KEPT,
    MAX_LOSSES,
    POLICIES,
    STATED_LOSS,
    Plan,
    SeedAnswers,
    mask_targets_of,
    photos_of,
    scenes_of,
)
from data_prep.scenes import render

N = 400


def answers(seed, flips=0, views=6.0):
    """A head that is right four times in five, and whose early answers differ from the full ones in `flips` photos."""
    rng = np.random.default_rng(seed)
    full = np.where(rng.random(N) < 0.8, LABELS, 1 - LABELS) - 0.5
    early = full.copy()
    early[np.flatnonzero((full > 0) == (LABELS == 1))[:flips]] *= -1
    return SeedAnswers(
        policies={policy: np.tile(full[:, None], len(KEPT)) for policy in POLICIES},
        dynamic={max_loss: (early, np.full(N, views)) for max_loss in MAX_LOSSES},
        twelve=full,
    )


LABELS = np.arange(N) % 2


def test_mcc_is_the_mean_over_heads_and_its_draws_are_paired():
    heads = [answers(0), answers(1)]
    study = Study(LABELS, heads, seed=0)
    observed, draws = study.mcc(lambda head: head.twelve)
    reference = [matthews_corrcoef(LABELS, head.twelve > 0) for head in heads]
    assert observed == pytest.approx(100 * np.mean(reference))
    assert draws.std() > 1
    assert np.array_equal(study.mcc(lambda head: head.dynamic[STATED_LOSS][0])[1], draws)


@pytest.mark.parametrize(
    ("flips", "views", "cheap", "good"), [(0, 6, True, True), (0, 7, False, True), (6, 6, True, False)]
)
def test_goals_are_met_only_by_what_is_cheap_and_loses_nothing(flips, views, cheap, good):
    rows = dynamic_rows(Study(LABELS, [answers(seed, flips, views) for seed in range(3)], seed=0), "about")
    spent, cost = (row for row in rows if row.goal)
    assert (spent.goal, spent.met, spent.ratio) == (str(MOST_FLOPS), cheap, pytest.approx(views / 12))
    assert (cost.goal, cost.met) == ("loss <= 0.2, bound <= 1.0", good)
    assert cost.note.startswith(f"loss of {cost.theirs - cost.ours:.2f} points")


def test_every_way_to_choose_has_a_row_at_every_number_of_views():
    rows = policy_rows(Study(LABELS, [answers(0)], seed=0), "about")
    assert len(rows) == 1 + len(POLICIES) * (len(KEPT) - 2)
    assert rows[0].what == "MCC at 8% of the FLOPs: the global view alone"


def test_the_splits_share_no_scene_and_masks_say_where_the_objects_are():
    scenes = [render(scenes_of(split, seed), 0) for split in ("train", "val", "test") for seed in (0, 1)]
    assert len({scene.image.tobytes() for scene in scenes}) == 6
    for scene in scenes:
        targets = mask_targets_of(scene)
        assert torch.allclose(targets.sum(), torch.from_numpy(scene.mask > 0).float().mean() * 16 * 16)
    assert photos_of(scenes[:2])["views"].shape == (2, 12, 3, 128, 128)


def test_a_tiny_study_counts_eight_views_as_two_thirds_of_the_flops():
    plan = Plan({"train": 8, "val": 8, "test": 8}, steps=1, seeds=1, timed=2, rounds=2)
    rows = {row.what: row for row in measure(plan, seed=3)}
    counted = rows["backbone FLOPs, counted by PyTorch: scored, K=8"]
    assert counted.ratio == pytest.approx(8 / 12)
    assert "8 distinct photos, 8 others" in rows["MCC at 8% of the FLOPs: the global view alone"].note
    assert all(np.isfinite([row.ours, row.theirs, row.ratio, *row.interval]).all() for row in rows.values())
