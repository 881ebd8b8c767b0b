"""Whether probabilities mean what they say: beside what chance alone would show, and with intervals over places."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from pipeline.evaluation.metrics import (
    binary_metrics,
    calibration_error,
    group_draws,
    has_both,
    percentile_interval,
)

SEED, ROUNDS = 0, 200
FEWEST_PLACES = 5  # fewer say too little about other places
WEAK_PRIOR = 1e3  # variance of the slope, without which photos that are separated without an error have none
NARROWEST = 1e-12  # distance of a probability from 0 and 1 whose log-odds can be computed with


def calibration_scores(
    labels: np.ndarray, probabilities: np.ndarray, log_odds: np.ndarray, places: np.ndarray
) -> dict[str, Any]:
    """How far calibrated probabilities can be trusted.

    Args:
        labels: 0 or 1, [N], N >= 1.
        probabilities: Calibrated probabilities of roadwork, [N].
        log_odds: The log-odds that they were made from, [N].
        places: The place of each photo, as any value, [N]; whole places are drawn for the intervals.

    Returns:
        `ece_perfect`, see `expected_ece`; `nll_before` and `brier_before`, of sigmoid(log_odds); `slope` and
        `intercept`, see `recalibration`, and `ci95` with their 95 % intervals. None where one class is absent, and for
        intervals over fewer than five places.
    """
    before = binary_metrics(labels, expit(np.asarray(log_odds, dtype=np.float64)))
    slope, intercept = recalibration(labels, probabilities) if has_both(labels) else (None, None)
    drawn: list[tuple[float, float]] = []
    _, place_of = np.unique(places, return_inverse=True)
    count = int(place_of.max()) + 1
    for times in group_draws(count, SEED, ROUNDS if count >= FEWEST_PLACES else 0):
        weights = times[place_of]
        if has_both(np.asarray(labels)[weights > 0]):
            drawn.append(recalibration(labels, probabilities, weights))
    slopes, intercepts = ([pair[part] for pair in drawn] for part in (0, 1))
    return {
        "ece_perfect": expected_ece(probabilities),
        "nll_before": before["nll"],
        "brier_before": before["brier"],
        "slope": slope,
        "intercept": intercept,
        "ci95": {"slope": percentile_interval(slopes), "intercept": percentile_interval(intercepts)},
    }


def expected_ece(probabilities: np.ndarray) -> dict[str, float]:
    """The calibration error that perfectly calibrated probabilities would show on as many photos.

    Labels are drawn from the probabilities themselves, with a fixed seed.

    Returns:
        `mean` and `p95`, the mean and the 95 % point over the draws.
    """
    rng = np.random.default_rng(SEED)
    found = [calibration_error(rng.random(len(probabilities)) < probabilities, probabilities) for _ in range(ROUNDS)]
    return {"mean": float(np.mean(found)), "p95": float(np.percentile(found, 95))}


def recalibration(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, float]:
    """Slope and intercept of the logistic regression of the label on the log-odds of the probability (Cox 1958).

    They are 1 and 0 for calibrated probabilities. A slope below 1 means that they are too extreme, and an intercept
    above 0 that there is more roadwork than they say.

    Args:
        labels: 0 or 1, [N], both.
        probabilities: [N].
        weights: How often each photo counts, [N]; by default once.
    """
    log_odds = logit(np.clip(np.asarray(probabilities, dtype=np.float64), NARROWEST, 1 - NARROWEST))
    counts = np.ones(len(log_odds)) if weights is None else weights

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, intercept = parameters
        logits = slope * log_odds + intercept
        excess = counts * (expit(logits) - labels)
        value = counts @ (np.logaddexp(0, logits) - labels * logits) + slope**2 / (2 * WEAK_PRIOR)
        return float(value), np.array([excess @ log_odds + slope / WEAK_PRIOR, excess.sum()])

    # sklearn's LogisticRegression finds the same, but spends most of a draw on checks of its input.
    slope, intercept = minimize(loss, (1.0, 0.0), jac=True, method="BFGS").x
    return float(slope), float(intercept)
