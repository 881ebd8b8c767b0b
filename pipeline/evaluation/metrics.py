"""Scores of a binary classifier, and how far to trust them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

BINS = 15  # as in Guo et al. 2017, arXiv 1706.04599
TIE = 1e-12  # MCCs closer than this differ by rounding only
DEFAULT_THRESHOLD = 0.5


def binary_metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    threshold: float = DEFAULT_THRESHOLD,
    ranking: np.ndarray | None = None,
) -> dict[str, Any]:
    """Every headline number of one set of predictions.

    A photo counts as roadwork where its probability is above `threshold`, and as none where it equals it.

    Args:
        labels: 0 or 1, [N], N >= 1.
        probabilities: Probability of roadwork, [N].
        threshold: The cut.
        ranking: Scores [N] that rank the photos for auroc and average_precision; by default their probabilities. In
            probabilities by several calibrations, such as those of `cross_fit`, photos change places.

    Returns:
        mcc, auroc, average_precision, accuracy, f1, ece, nll (natural logarithm), brier, n and confusion {tn, fp, fn,
        tp}. Where one class is absent, mcc is 0, and auroc and average_precision are None, since JSON has no NaN.
    """
    ranking = probabilities if ranking is None else ranking
    tn, fp, fn, tp = confusion_counts(labels, probabilities, threshold).sum(axis=0)
    both = has_both(labels)
    return {
        "mcc": float(mcc_of(tn, fp, fn, tp)),
        "auroc": float(roc_auc_score(labels, ranking)) if both else None,
        "average_precision": float(average_precision_score(labels, ranking)) if both else None,
        "accuracy": float(accuracy_of(tn, fp, fn, tp)),
        "f1": float(f1_of(tn, fp, fn, tp)),
        "ece": calibration_error(labels, probabilities),
        "nll": float(log_loss(labels, probabilities, labels=[0, 1])),
        "brier": float(brier_score_loss(labels, probabilities, pos_label=1)),
        "n": len(labels),
        "confusion": {"tn": int(tn), "fp": int(fp), "fn": int(fn), "tp": int(tp)},
    }


def has_both(labels: np.ndarray) -> bool:
    """Whether both classes occur."""
    return bool(np.any(labels == 1) and np.any(labels == 0))


def confusion_counts(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Whether each prediction is a tn, fp, fn or tp: one-hot int64 [N, 4]."""
    outcome = 2 * (np.asarray(labels) == 1) + (np.asarray(probabilities, dtype=np.float64) > threshold)
    return np.eye(4, dtype=np.int64)[outcome]


def mcc_of(tn: np.ndarray, fp: np.ndarray, fn: np.ndarray, tp: np.ndarray) -> np.ndarray:
    """Matthews correlation from counts of any shape; 0 where a row or column of the matrix is empty."""
    tn, fp, fn, tp = (np.asarray(count, dtype=np.float64) for count in (tn, fp, fn, tp))
    below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return np.divide(tp * tn - fp * fn, below, out=np.zeros_like(below), where=below > 0)


def accuracy_of(tn: np.ndarray, fp: np.ndarray, fn: np.ndarray, tp: np.ndarray) -> np.ndarray:
    """Share of right predictions."""
    return np.asarray((tn + tp) / (tn + fp + fn + tp))


def f1_of(tn: np.ndarray, fp: np.ndarray, fn: np.ndarray, tp: np.ndarray) -> np.ndarray:
    """F1 of roadwork; 0 where roadwork is neither present nor predicted."""
    return np.asarray(2 * tp / np.maximum(2 * tp + fp + fn, 1))


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> list[dict[str, float]]:
    """The bars of the reliability diagram: the non-empty ones of 15 equal bins of the probability of roadwork.

    Returns:
        Low, high, n, the mean probability and the share of roadwork of each bin, in ascending order.
    """
    number = np.minimum((np.asarray(probabilities) * BINS).astype(np.int64), BINS - 1)
    n = np.bincount(number, minlength=BINS)
    probability = np.bincount(number, weights=probabilities, minlength=BINS)
    roadwork = np.bincount(number, weights=labels, minlength=BINS)
    return [
        {
            "low": b / BINS,
            "high": (b + 1) / BINS,
            "n": int(n[b]),
            "probability": float(probability[b] / n[b]),
            "roadwork": float(roadwork[b] / n[b]),
        }
        for b in np.flatnonzero(n).tolist()
    ]


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error of the probability of roadwork (Guo et al. 2017, eq. 3, for one class).

    The mean over photos of |mean probability - share of roadwork| in the photo's bin.
    """
    bins = reliability(labels, probabilities)
    return sum(b["n"] * abs(b["probability"] - b["roadwork"]) for b in bins) / len(labels)


def bootstrap_intervals(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    threshold: float = DEFAULT_THRESHOLD,
    *,
    ranking: np.ndarray | None = None,
    seed: int,
    rounds: int = 1000,
    level: float = 0.95,
) -> dict[str, tuple[float, float] | None]:
    """Percentile intervals by the cluster bootstrap: whole groups are drawn with replacement.

    Frames of one video are near-duplicates; drawing photos one by one would treat them as independent, and give
    intervals that are too narrow. The cut stays fixed: it was chosen on other data.

    Args:
        labels: 0 or 1, [N].
        probabilities: [N].
        groups: The group of each photo, as any value, [N].
        threshold: The cut.
        ranking: See `binary_metrics`.
        seed: Seed of the draws; two sets of predictions with the same seed get the same draws.
        rounds: Number of draws.
        level: Probability mass inside an interval.

    Returns:
        (low, high) for mcc, accuracy, f1, auroc and average_precision. Draws that lack a class do not count for mcc,
        auroc and average_precision. None where no draw counts, or with one group, which says nothing about others.
    """
    drawn: dict[str, list[float]] = {name: [] for name in ("mcc", "accuracy", "f1", "auroc", "average_precision")}
    outcomes = confusion_counts(labels, probabilities, threshold)
    _, group_of = np.unique(groups, return_inverse=True)
    if group_of.max() == 0:
        return dict.fromkeys(drawn)
    order = Ranking(labels, probabilities if ranking is None else ranking)
    for times in group_draws(int(group_of.max()) + 1, seed, rounds):
        weights = times[group_of]
        counts = weights @ outcomes
        drawn["accuracy"].append(float(accuracy_of(*counts)))
        drawn["f1"].append(float(f1_of(*counts)))
        tn, fp, fn, tp = counts
        if tn + fp > 0 and fn + tp > 0:
            drawn["mcc"].append(float(mcc_of(*counts)))
            drawn["auroc"].append(order.auroc(weights))
            drawn["average_precision"].append(order.average_precision(weights))
    return {name: percentile_interval(values, level) for name, values in drawn.items()}


def group_draws(groups: int, seed: int, rounds: int) -> Iterator[np.ndarray]:
    """How often each group is drawn, int64 [groups], once per round."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        yield np.bincount(rng.integers(groups, size=groups), minlength=groups)


def percentile_interval(values: list[float], level: float = 0.95) -> tuple[float, float] | None:
    """The middle `level` of bootstrap values; None without any."""
    if not values:
        return None
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


class Ranking:
    """AUROC and average precision under many weightings of the same photos: sorting once makes each O(N)."""

    def __init__(self, labels: np.ndarray, probabilities: np.ndarray):
        descending = np.argsort(-np.asarray(probabilities, dtype=np.float64), kind="stable")
        ordered = np.asarray(probabilities, dtype=np.float64)[descending]
        self._descending = descending
        self._positive = np.asarray(labels)[descending] == 1
        self._last_of_tie = np.flatnonzero(np.append(np.diff(ordered) != 0, True))

    def _cumulative(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weight of the positives and of all photos at or above each distinct probability, in falling order."""
        ordered = np.asarray(weights, dtype=np.float64)[self._descending]
        positives = np.cumsum(ordered * self._positive)[self._last_of_tie]
        return positives, np.cumsum(ordered)[self._last_of_tie]

    def auroc(self, weights: np.ndarray) -> float:
        """Area under the ROC curve by the trapezoid rule; both classes must have weight."""
        positives, everything = self._cumulative(weights)
        negatives = everything - positives
        mean_height = (positives + np.append(0.0, positives[:-1])) / 2
        return float(mean_height @ np.diff(negatives, prepend=0.0) / (positives[-1] * negatives[-1]))

    def average_precision(self, weights: np.ndarray) -> float:
        """Sum over distinct probabilities of precision times step of recall; positives must have weight."""
        positives, everything = self._cumulative(weights)
        precision = np.divide(positives, everything, out=np.zeros_like(positives), where=everything > 0)
        return float(precision @ np.diff(positives, prepend=0.0) / positives[-1])
