"""The benchmark of view pruning: rows say what was measured, pairs stay pairs, and the study asks in every way."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.pruning import MOST_FLOPS, Asked, Plan, dynamic_rows, measure, policy_rows, read_views
from benchmarks.study.answers import ArmAnswers, Bootstrap
from benchmarks.study.arms import ARMS, COMPLETE
from benchmarks.study.command import Done, run_study
from benchmarks.study.config import read_recipe
from benchmarks.study.photos import Photos
from benchmarks.study.views import KEPT, MAX_LOSSES, POLICIES, STATED_LOSS, dynamic_name, policy_name
from pipeline.evaluation.metrics import confusion_counts

N, SEEDS = 400, 3
LABELS = np.arange(N) % 2
RECIPE = """
scenes: {images: 96, size: 320x240, difficulty: 0.2, seed: 5}
plan: {arms: [all_views], seeds: 2, parts: 3, folds: 1, steps: 3, batch_size: 8, validations: 1, lrs: [1.0e-3],
  asks_views: true}
model: {backbone: scenes-tiny, view_side: 32, pruning: dynamic, keep_views: 12, pool_grid: 2, width: 16, layers: 1,
  heads: 2, fusion_heads: 2, experts: 2, experts_per_token: 1, expert_width: 16, mask_side: 4, metadata: []}
loss: {roadwork: 2.0}
"""


def answers(flips=0):
    """Heads that are right four times in five; with flips, so many of their right answers in roadwork turn wrong."""
    outcomes = []
    for seed in range(SEEDS):
        said = np.where(np.random.default_rng(seed).random(N) < 0.8, LABELS, 1 - LABELS)
        said[np.flatnonzero((said == 1) & (LABELS == 1))[:flips]] = 0
        outcomes.append(confusion_counts(LABELS, said, 0.5))
    return ArmAnswers(ARMS[0], np.stack(outcomes), 0.9, 0.1, (), np.empty(0), 10, 1.0)


def study_of(flips=0, views=4.0):
    """A study whose early answers are those of all views but for the flips."""
    photos = Photos({"labels": torch.from_numpy(LABELS)}, np.arange(N), [None] * N, "photos", {}, "f")
    full = answers()
    nothing = Path()
    done = Done(
        read_recipe("pruning"), photos, None, None, nothing, {COMPLETE: full, "all_views": full}, {},
        Bootstrap(np.arange(N), SEEDS), "photos",
    )  # fmt: skip
    asked = {
        policy_name(policy, keep): Asked(full, np.full((SEEDS, N), float(keep))) for policy in POLICIES for keep in KEPT
    }
    early = Asked(answers(flips), np.full((SEEDS, N), views))
    return done, asked | {dynamic_name(max_loss): early for max_loss in MAX_LOSSES}


@pytest.mark.parametrize(
    ("flips", "views", "cheap", "good"), [(0, 4, True, True), (0, 5, False, True), (6, 4, True, False)]
)
def test_goals_are_met_only_by_what_is_cheap_and_loses_nothing(flips, views, cheap, good):
    rows = dynamic_rows(*study_of(flips, views))
    spent, cost = (row for row in rows if row.goal)
    assert dynamic_name(STATED_LOSS) in spent.what
    assert (spent.goal, spent.met, spent.ratio) == (str(MOST_FLOPS), cheap, pytest.approx(views / 12))
    assert (cost.goal, cost.met) == ("loss <= 0.2, bound <= 1.0", good)
    assert cost.note.startswith(f"loss of {cost.theirs - cost.ours:z.2f} points")


def test_every_way_to_choose_has_a_row_at_every_number_of_views():
    rows = policy_rows(*study_of())
    assert len(rows) == 1 + len(POLICIES) * (len(KEPT) - 2)
    assert rows[0].what == "MCC at 8% of the FLOPs: the global view alone"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A recipe, and the folder of its finished study."""
    folder = tmp_path_factory.mktemp("pruning")
    (folder / "tiny.yaml").write_text(RECIPE)
    config = read_recipe(str(folder / "tiny.yaml"))
    return config, folder / "study", run_study(config, folder / "study", None, None, 1, 0)


def test_a_study_is_asked_in_every_way_about_the_photos_that_it_tests(tiny):
    _, _, done = tiny
    asked = read_views(done)
    complete = done.answers[COMPLETE]
    assert set(asked) == set(study_of()[1])
    for name, found in asked.items():
        assert np.array_equal(found.answers.tested, complete.tested), name
        assert (found.views[:, complete.tested] >= 1).all()
    all_twelve = [asked[policy_name(policy, 12)].answers.outcomes for policy in POLICIES]
    assert all(np.array_equal(all_twelve[0], others) for others in all_twelve[1:])
    assert (asked[policy_name("scored", 4)].views[:, complete.tested] == 4).all()
    fewer = [asked[dynamic_name(max_loss)].views.sum() for max_loss in MAX_LOSSES]
    assert fewer == sorted(fewer, reverse=True)


def test_eight_views_are_two_thirds_of_the_flops(tiny):
    config, folder, _ = tiny
    rows = {row.what: row for row in measure(config, folder, Plan(photos=2, rounds=2), seed=3)}
    assert rows["backbone FLOPs, counted by PyTorch: scored, K=8"].ratio == pytest.approx(8 / 12)
    assert "tested procedural scenes in 1 folds, 2 seeds" in rows["MCC at 8% of the FLOPs: the global view alone"].note
    assert all(np.isfinite([row.ours, row.theirs, row.ratio, *row.interval]).all() for row in rows.values())
