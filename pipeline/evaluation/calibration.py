"""From a model's log-odds to a calibrated probability: the best cut, the slope around it, and cross-fitting.

A probability is sigmoid(slope * (z - cut)), where z are the log-odds, so that 0.5 is the cut by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, ndtr
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.errors import UserError
from pipeline.evaluation.metrics import TIE, has_both, mcc_of

FOLDS, FOLD_SEED = 5, 0
# Factor of Silverman's rule, which is 1.06 for one normal class; a cut between two is steadier with a little more.
BANDWIDTH = 1.25
MOST_CANDIDATES = 512
SLOPES = np.log([1e-2, 1e3])  # of log-odds with standard deviation 1


@dataclass(frozen=True)
class Calibration:
    """What turns log-odds into probabilities; by default they stay as they are."""

    cut: float = 0.0
    """Log-odds above which the answer is roadwork."""
    slope: float = 1.0
    """Above 0."""

    def probability(self, log_odds: np.ndarray) -> np.ndarray:
        """The probability of roadwork, float64 [N], above 0.5 where the log-odds are above the cut."""
        return np.asarray(expit(self.slope * (np.asarray(log_odds, dtype=np.float64) - self.cut)))


def fit(labels: np.ndarray, log_odds: np.ndarray) -> Calibration:
    """The cut with the best smoothed MCC, and the slope around it with the highest likelihood.

    Shifted log-odds get a shifted cut, and scaled ones a scaled cut and slope, so the probabilities stay the same.

    Args:
        labels: 0 or 1, [N].
        log_odds: Log-odds of roadwork, finite, [N].

    Returns:
        The calibration. Where one class is absent or all log-odds are equal, nothing can be learnt: the cut is then 0
        in log-odds and the slope 1.
    """
    labels, log_odds = np.asarray(labels), np.asarray(log_odds, dtype=np.float64)
    if not has_both(labels) or np.ptp(log_odds) == 0:
        return Calibration()
    cut = best_cut(labels, log_odds)
    return Calibration(cut, best_slope(labels, log_odds - cut))


def best_cut(labels: np.ndarray, log_odds: np.ndarray) -> float:
    """The cut in log-odds with the highest MCC, once either class is smoothed over the log-odds.

    The MCC of a few hundred photos jumps at each photo near the cut, and its highest jump is mostly luck. So each photo
    is spread over the log-odds by a Gaussian, as in a kernel estimate of its class's distribution (Azzalini 1981,
    Biometrika 68, 326). Its width follows the spread and the number of the class's photos (Silverman 1986, "Density
    Estimation", section 3.4.2).

    Args:
        labels: 0 or 1, [N].
        log_odds: [N].

    Returns:
        The cut; 0 where one class is absent or all log-odds are equal.
    """
    labels, log_odds = np.asarray(labels), np.asarray(log_odds, dtype=np.float64)
    values = np.unique(log_odds)
    if len(values) < 2 or not has_both(labels):
        return 0.0
    classes = [log_odds[labels == label] for label in (0, 1)]
    widths = [_bandwidth(part) for part in classes]
    # A class without a spread of its own, such as one photo, takes the other's.
    widths = [width or max(widths) or np.finfo(np.float64).eps * np.abs(values).max() for width in widths]

    def score(cut: float) -> float:
        tn, fn = (float(ndtr((cut - part) / width).sum()) for part, width in zip(classes, widths, strict=True))
        return float(mcc_of(*map(np.asarray, (tn, len(classes[0]) - tn, fn, len(classes[1]) - fn))))

    # The middles of the gaps between neighbours, or evenly spaced ones of them where there are very many.
    gaps = np.unique(np.linspace(0, len(values) - 2, MOST_CANDIDATES).round().astype(int))
    middles = (values[gaps] + values[gaps + 1]) / 2
    scores = [score(cut) for cut in middles]
    best = int(np.argmax(scores))
    low, high = values[gaps[best]], values[gaps[best] + 1]
    peak = minimize_scalar(
        lambda cut: -score(cut), bounds=(low, high), method="bounded", options={"xatol": 1e-6 * (high - low)}
    )
    # In a wide gap the score is flat, and its middle is farthest from both classes.
    return float(peak.x if -peak.fun > scores[best] + TIE else middles[best])


def _bandwidth(values: np.ndarray) -> float:
    """The width of a class's Gaussians, which follows the scale of its log-odds."""
    spread = float(values.std())
    quartiles = float(np.subtract(*np.percentile(values, [75, 25]))) / 1.349  # the normal distribution's, in deviations
    return float(BANDWIDTH * (min(spread, quartiles) if quartiles > 0 else spread) * len(values) ** -0.2)


def best_slope(labels: np.ndarray, above: np.ndarray) -> float:
    """The slope a above 0 of p = sigmoid(a * distance) with the lowest negative log-likelihood.

    The targets are Platt's (1999, "Probabilistic outputs for support vector machines"): (n + 1) / (n + 2) for n photos
    with roadwork, and 1 / (n + 2) for n without, in the place of 1 and 0. So photos that are separated without an error
    get a finite slope.

    Args:
        labels: 0 or 1, [N], both.
        above: Distance of the log-odds from the cut, [N], not all equal.
    """
    roadwork = np.asarray(labels) == 1
    targets = np.where(roadwork, (roadwork.sum() + 1) / (roadwork.sum() + 2), 1 / ((~roadwork).sum() + 2))
    scale = float(np.std(above))
    distance = above / scale

    def loss(log_slope: float) -> float:
        logits = np.exp(log_slope) * distance
        return float((np.logaddexp(0, logits) - targets * logits).sum())

    return float(np.exp(minimize_scalar(loss, bounds=SLOPES, method="bounded").x)) / scale


def cross_fit(labels: np.ndarray, log_odds: np.ndarray, groups: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """Calibrated probabilities of photos by cuts and slopes that were fitted without them: float64 [N].

    A cut that is chosen on the photos that it is then scored on makes the score too high. See `out_of_fold` for the
    arguments.
    """
    cuts, slopes = out_of_fold(labels, log_odds, groups, folds)
    return np.asarray(expit(slopes * (np.asarray(log_odds, dtype=np.float64) - cuts)))


def out_of_fold(
    labels: np.ndarray, log_odds: np.ndarray, groups: np.ndarray, folds: int = FOLDS
) -> tuple[np.ndarray, np.ndarray]:
    """For each photo, the calibration that is fitted to the folds without its group.

    Args:
        labels: 0 or 1, [N].
        log_odds: Log-odds of roadwork, finite, [N].
        groups: The group of near-duplicates of each photo, [N]; no group is divided.
        folds: Parts, each with about the same share of roadwork; fewer where a class has fewer photos.

    Returns:
        Cuts and slopes, [N] each; those of `Calibration()` where a class has fewer than two photos.
    """
    labels, log_odds = np.asarray(labels), np.asarray(log_odds, dtype=np.float64)
    cuts, slopes = np.full(len(labels), Calibration.cut), np.full(len(labels), Calibration.slope)
    for others, held in _folds(labels, np.asarray(groups), folds):
        found = fit(labels[others], log_odds[others])
        cuts[held], slopes[held] = found.cut, found.slope
    return cuts, slopes


def _folds(labels: np.ndarray, groups: np.ndarray, folds: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit to, and rows that are held out."""
    count = min(folds, len(np.unique(groups)), *(int((labels == label).sum()) for label in (0, 1)))
    if count < 2:
        return
    split = StratifiedGroupKFold(count, shuffle=True, random_state=FOLD_SEED)
    for others, held in split.split(labels, labels, groups):
        if len(held):
            yield others, held


def check_finite(log_odds: np.ndarray, keys: Sequence[str], where: str) -> None:
    """Refuse answers that are not numbers.

    Args:
        log_odds: [N].
        keys: The photos' names, [N].
        where: The model, in words.

    Raises:
        UserError: Some are NaN or infinite.
    """
    wrong = np.flatnonzero(~np.isfinite(log_odds))
    if len(wrong):
        raise UserError(
            f"{where} gives no number for {len(wrong)} of {len(log_odds)} photos, the first of which is "
            f"{keys[int(wrong[0])]}; its weights or the photo's tokens hold NaN or infinity, so train it again or make "
            "the feature cache anew"
        )
