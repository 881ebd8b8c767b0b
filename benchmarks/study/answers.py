"""Every arm's answers on the tested photos, at the learning rate that validation chose, and intervals for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.study.arms import Arm
from benchmarks.study.folds import NOWHERE, make_fold
from benchmarks.study.photos import Photos
from benchmarks.study.work import Work, read_outcome
from pipeline.errors import UserError
from pipeline.evaluation.metrics import calibration_error, confusion_counts, mcc_of
from pipeline.evaluation.place_bootstrap import Estimate, PlaceBootstrap, expanded

SMALLEST_PLACE = 20  # photos; the MCC of fewer is noise


@dataclass(frozen=True)
class ArmAnswers:
    """The answers of one arm: S seeds in F folds, N photos."""

    arm: Arm
    outcomes: np.ndarray
    """int64 [S, N, 4]: whether the answer is a tn, fp, fn or tp, by the cut of its fold; zeros where not tested."""
    auroc: float
    """AUROC, as the mean over folds and seeds."""
    ece: float
    """Expected calibration error, as the mean over folds and seeds."""
    lrs: tuple[float, ...]
    """Learning rate that validation chose, for each fold and seed."""
    curves: np.ndarray
    """Step, and validation loss without metadata, in these trainings: [F * S, validations, 2]."""
    parameters: int
    wall_s: float
    """Median seconds of a training on one thread."""

    @property
    def tested(self) -> np.ndarray:
        """Which photos were tested: bool [N]."""
        return self.outcomes[0].any(axis=1)


def read_answers(work: Work, arm: Arm, photos: Photos, results: Path) -> ArmAnswers:
    """Collect an arm's answers on the tested photos.

    Args:
        work: Trainings with the chosen learning rates, see `settle`.
        arm: The arm.
        photos: All photos.
        results: Folder of outcomes.

    Raises:
        UserError: A training's loss became infinite.
    """
    of_arm, key = work.of_arm[arm.name], "metadata" if arm.with_metadata else "null"
    outcomes = np.zeros((len(of_arm[0]), len(photos.labels), 4), dtype=np.int64)
    found = []
    for fold in of_arm:
        for number, (training,) in enumerate(fold):
            outcome = read_outcome(results, training)
            if outcome["diverged"]:
                raise UserError(
                    f"the loss of the arm {arm.name!r} became infinite with the learning rate {training.optim.lr:g} "
                    f"and the seed {training.seed}; try smaller rates in the recipe"
                )
            rows = make_fold(photos, training.parts, training.fold, training.seen_places).test
            labels, answers = photos.labels[rows], outcome[key]
            probabilities = np.array(answers["test"])
            outcomes[number, rows] = confusion_counts(labels, probabilities, 0.5)
            scores = roc_auc_score(labels, probabilities), calibration_error(labels, probabilities)
            found.append((*scores, training.optim.lr, outcome["curve"], outcome["wall_s"]))
    aurocs, eces, lrs, curves, walls = zip(*found, strict=True)
    means, wall_s = (float(np.mean(aurocs)), float(np.mean(eces))), float(np.median(walls))
    return ArmAnswers(arm, outcomes, *means, lrs, np.array(curves), outcome["parameters"], wall_s)


class Bootstrap(PlaceBootstrap):
    """The paired cluster bootstrap over arms: whole places are drawn, and seeds, the same for all arms."""

    def mcc(self, arm: ArmAnswers) -> Estimate:
        """The MCC of an arm over all photos that it was tested on."""
        value, draws, units = self.mcc_draws(arm.outcomes, arm.tested)
        return Estimate(value, *expanded(draws, units))

    def compare(self, ours: ArmAnswers, theirs: ArmAnswers) -> Comparison:
        """Two arms on the photos that both were tested on."""
        rows = ours.tested & theirs.tested
        (a, drawn_a, units), (b, drawn_b, _) = (self.mcc_draws(arm.outcomes, rows) for arm in (ours, theirs))
        floor = 0.01  # of an MCC in a ratio; with less it says nothing
        ratios = np.maximum(drawn_a, floor) / np.maximum(drawn_b, floor)
        ratio = Estimate(max(a, floor) / max(b, floor), *expanded(ratios, units))
        return Comparison(a, b, Estimate(a - b, *expanded(drawn_a - drawn_b, units)), ratio)


@dataclass(frozen=True)
class Comparison:
    """MCC of two arms on the same photos."""

    ours: float
    theirs: float
    difference: Estimate
    ratio: Estimate


def worst_place(arm: ArmAnswers, blocks: np.ndarray) -> tuple[int, float] | None:
    """The place with the lowest MCC (mean over seeds), and this MCC; places need 20 photos and both classes."""
    found = []
    for block in np.unique(blocks[arm.tested & (blocks != NOWHERE)]).tolist():
        counts = arm.outcomes[:, blocks == block].sum(axis=1)
        tn, fp, fn, tp = counts.T
        if counts[0].sum() >= SMALLEST_PLACE and (tn + fp).all() and (fn + tp).all():
            found.append((block, float(mcc_of(tn, fp, fn, tp).mean())))
    return min(found, key=lambda one: one[1]) if found else None
