"""Every arm's answers on the tested photos, at the learning rate that validation chose, and intervals for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

from benchmarks.study.arms import Arm
from benchmarks.study.folds import NOWHERE, make_fold
from benchmarks.study.photos import Photos
from benchmarks.study.work import Work, read_outcome
from pipeline.errors import UserError
from pipeline.evaluation.metrics import calibration_error, confusion_counts, mcc_of

ROUNDS = 4000
LEVEL = 0.95
FEWEST_PLACES = 5  # with fewer the bootstrap draws groups of near-duplicates in their place
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


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """The estimate in another unit."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class Bootstrap:
    """The paired cluster bootstrap: whole places are drawn, and seeds, the same for all arms.

    Photos of one city resemble each other, so a new city is the unit that a result has to hold for. With G places the
    percentile interval of the bootstrap is too narrow by about sqrt((G - 1) / G), and a normal tail where Student's t
    belongs. The percentiles are moved out accordingly (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", section 3.3, "expanded percentile"), and the part of the seeds is widened in the same way.
    """

    def __init__(self, units: np.ndarray, seeds: int, seed: int = 0):
        """Draw nothing yet.

        Args:
            units: Number of each photo's unit (place or group), of which whole ones are drawn: int64 [N].
            seeds: Trainings of each arm in each fold.
            seed: Seed of the draws.
        """
        self.units, self.seed = units, seed
        self.seed_draws = np.random.default_rng([seed, 1]).integers(seeds, size=(ROUNDS, seeds))

    @cache  # noqa: B019  (a study has one, and it lives as long as the program)
    def _draws(self, present: tuple[int, ...]) -> np.ndarray:
        """How often each unit is drawn, [ROUNDS, units]: whole numbers, as floats for a fast product."""
        count, generator = len(present), np.random.default_rng([self.seed, 0])
        return generator.multinomial(count, np.full(count, 1 / count), size=ROUNDS).astype(np.float64)

    def mcc_draws(self, outcomes: np.ndarray, rows: np.ndarray) -> tuple[float, np.ndarray, int]:
        """The MCC over the given rows, as the mean over seeds.

        Args:
            outcomes: int64 [S, N, 4].
            rows: bool [N], the photos that count.

        Returns:
            The MCC of the photos at hand, the MCC of every draw [ROUNDS], and the number of units.
        """
        present, unit = np.unique(self.units[rows], return_inverse=True)
        counts = np.zeros((len(present), *outcomes.shape[::2]), dtype=np.int64)  # [units, S, 4]
        np.add.at(counts, unit.ravel(), outcomes[:, rows].transpose(1, 0, 2))
        drawn = self._draws(tuple(present.tolist())) @ counts.reshape(len(present), -1).astype(np.float64)
        drawn = drawn.reshape(ROUNDS, *counts.shape[1:])
        observed = mcc_of(*counts.sum(axis=0).T)
        return float(observed.mean()), self._over_seeds(mcc_of(*np.moveaxis(drawn, -1, 0))), len(present)

    def _over_seeds(self, of_seeds: np.ndarray) -> np.ndarray:
        """Means over drawn seeds, [ROUNDS], of [ROUNDS, S] values."""
        middle, by_seed = of_seeds.mean(axis=1), np.take_along_axis(of_seeds, self.seed_draws, axis=1)
        # Drawing S of S seeds varies less than S new ones would, by (S - 1) / S in variance.
        seeds = of_seeds.shape[1]
        return middle + np.sqrt(seeds / max(seeds - 1, 1)) * (by_seed.mean(axis=1) - middle)

    def mean(self, values: np.ndarray, rows: np.ndarray) -> Estimate:
        """The mean of [S, N] values over seeds and over the photos where bool [N] is true."""
        present, unit = np.unique(self.units[rows], return_inverse=True)
        sums = np.zeros((len(present), len(values)))
        np.add.at(sums, unit.ravel(), values[:, rows].T)
        drawn = self._draws(tuple(present.tolist()))
        of_seeds = drawn @ sums / (drawn @ np.bincount(unit.ravel()))[:, None]
        return Estimate(float(values[:, rows].mean()), *expanded(self._over_seeds(of_seeds), len(present)))

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


def expanded(draws: np.ndarray, units: int) -> tuple[float, float]:
    """The expanded percentile interval of draws over a number of units, see `Bootstrap`; unbounded for one unit."""
    if units < 2:
        return -np.inf, np.inf
    tail = expanded_tail(units)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(units: int) -> float:
    """Probability outside each end of the interval."""
    quantile = np.sqrt(units / (units - 1)) * stats.t.ppf((1 + LEVEL) / 2, units - 1)
    return float(stats.norm.cdf(-quantile))


def bootstrap_units(blocks: np.ndarray, groups: np.ndarray, tested: np.ndarray) -> tuple[np.ndarray, str]:
    """The units to draw, places, or groups of near-duplicates where too few places are tested; and their name."""
    if len(np.unique(blocks[tested])) >= FEWEST_PLACES:
        return blocks, "places"
    return groups, "groups of near-duplicates"


def worst_place(arm: ArmAnswers, blocks: np.ndarray) -> tuple[int, float] | None:
    """The place with the lowest MCC (mean over seeds), and this MCC; places need 20 photos and both classes."""
    found = []
    for block in np.unique(blocks[arm.tested & (blocks != NOWHERE)]).tolist():
        counts = arm.outcomes[:, blocks == block].sum(axis=1)
        tn, fp, fn, tp = counts.T
        if counts[0].sum() >= SMALLEST_PLACE and (tn + fp).all() and (fn + tp).all():
            found.append((block, float(mcc_of(tn, fp, fn, tp).mean())))
    return min(found, key=lambda one: one[1]) if found else None
