"""Answers of a trained head from some of the views only, for every way to choose them; see `benchmarks.pruning`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from benchmarks.study.folds import Fold
from benchmarks.study.photos import Photos
from pipeline.evaluation import early_exit
from pipeline.evaluation.calibration import best_cut
from pipeline.evaluation.early_exit import RoundAnswers, answer_from, answer_rounds, best_order, fit_rule
from pipeline.model.pruning import rank_views
from pipeline.model.roadwork import RoadworkModel

KEPT = (1, 2, 3, 4, 6, 8, 12)
POLICIES = ("scored", "random", "fixed", "oracle")
MAX_LOSSES = (0.0005, 0.002, 0.005, 0.01, 0.02, 0.05)
STATED_LOSS = 0.002
PHOTOS_PER_ANSWER = 100
PHOTOS_FOR_ORDER = 200


def policy_name(policy: str, keep: int) -> str:
    """The name of a policy, such as `scored, K=4`; all policies share K=1, the global view alone."""
    return "the global view alone" if keep == 1 else f"{policy}, K={keep}"


def dynamic_name(max_loss: float) -> str:
    """The name of the mode `dynamic` with the rule for a stated loss of MCC, in points."""
    return f"dynamic, stated loss {100 * max_loss:g}"


@torch.inference_mode()
def ask_views(model: RoadworkModel, photos: Photos, fold: Fold, seed: int) -> dict[str, dict[str, Any]]:
    """Answers for the tested photos, metadata NULL. Cut, rules and the fixed order come from validation.

    The model is left with the rule for `STATED_LOSS`.

    Args:
        model: A model that was trained to answer from any number of views.
        photos: All photos.
        fold: The photos that validate and test.
        seed: Seed of the random views.

    Returns:
        By `policy_name` and `dynamic_name`, for the N photos of the test: `roadwork` [N], 0 or 1, and `views` [N], how
        many were looked at.
    """
    on_val, on_test = (rounds_of(model, photos, rows) for rows in (fold.val, fold.test))
    cut = best_cut(on_val.labels, on_val.log_odds[:, -1])
    fixed = fixed_order(model, photos, fold.val[:PHOTOS_FOR_ORDER])
    torch.manual_seed(seed)
    by_policy = np.concatenate([ask_policies(model, some, fixed) for some in batches(model, photos, fold.test)], axis=2)
    answers = {
        policy_name(policy, keep): (by_policy[row, place], np.full(len(fold.test), keep))
        for row, policy in enumerate(POLICIES)
        for place, keep in enumerate(KEPT)
    }
    for max_loss in MAX_LOSSES:
        rule = fit_rule(on_val, cut, max_loss)
        answers[dynamic_name(max_loss)] = on_test.stopped(rule)
        if max_loss == STATED_LOSS:
            model.config.stopping = asdict(rule)
    return {
        name: {"roadwork": (log_odds > cut).astype(int).tolist(), "views": views.tolist()}
        for name, (log_odds, views) in answers.items()
    }


def batches(model: RoadworkModel, photos: Photos, rows: np.ndarray) -> Iterator[early_exit.Photos]:
    """Batches of some photos, a hundred at a time."""
    for start in range(0, len(rows), PHOTOS_PER_ANSWER):
        batch = photos.batch(rows[start : start + PHOTOS_PER_ANSWER])
        yield early_exit.Photos(model.source(batch), batch["boxes"], batch["view_mask"])


def rounds_of(model: RoadworkModel, photos: Photos, rows: np.ndarray) -> RoundAnswers:
    """Answers after each round of the mode `dynamic`."""
    parts = zip(*(answer_rounds(model, some) for some in batches(model, photos, rows)), strict=True)
    return RoundAnswers(photos.labels[rows], *(np.concatenate(part) for part in parts))


def fixed_order(model: RoadworkModel, photos: Photos, rows: np.ndarray) -> list[int]:
    """The views that are best for all of these photos together, see `best_order`."""
    chosen = list(batches(model, photos, rows))

    def answer(views: Sequence[int]) -> np.ndarray:
        order = torch.tensor(views)
        return np.concatenate([answer_from(model, some, order.expand(len(some.boxes), -1)) for some in chosen])

    return best_order(answer, photos.labels[rows], max(KEPT))


def ask_policies(model: RoadworkModel, photos: early_exit.Photos, fixed: list[int]) -> np.ndarray:
    """Log-odds of B photos: [POLICIES, KEPT, B]."""
    scores = model.encoder.score(photos.source)
    everything = model.encoder(photos.source, photos.boxes, photos.view_mask, keep_all=True)
    importance = model.answer(everything, null_metadata=True).view_importance
    assert scores is not None
    assert importance is not None
    orders = (
        rank_views(importance if policy == "oracle" else scores, photos.view_mask, policy, False, fixed)
        for policy in POLICIES
    )
    return np.stack([[answer_from(model, photos, order[:, :keep]) for keep in KEPT] for order in orders])
