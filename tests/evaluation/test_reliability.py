"""Whether probabilities mean what they say: against scikit-learn, and on labels drawn from known probabilities."""

import json

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from pipeline.evaluation.metrics import calibration_error
from pipeline.evaluation.reliability import calibration_scores, expected_ece, recalibration


def drawn(count, seed, slope=1.0, intercept=0.0):
    """Labels, and probabilities whose log-odds must be changed by slope and intercept to be right."""
    rng = np.random.default_rng(seed)
    log_odds = 2 * rng.normal(size=count)
    labels = (rng.random(count) < expit(slope * log_odds + intercept)).astype(int)
    return labels, expit(log_odds)


@pytest.mark.parametrize("seed", range(3))
def test_slope_and_intercept_are_those_of_scikit_learn(seed):
    labels, probabilities = drawn(400, seed, 0.6, -0.5)
    weights = np.random.default_rng(seed).integers(4, size=400)
    for counts in (None, weights):
        reference = LogisticRegression(C=np.inf, tol=1e-8).fit(logit(probabilities)[:, None], labels, counts)
        found = recalibration(labels, probabilities, counts)
        assert found == pytest.approx((reference.coef_[0, 0], reference.intercept_[0]), abs=5e-3)


def test_intervals_of_slope_and_intercept_cover_the_truth():
    covered = 0
    for seed in range(12):
        labels, probabilities = drawn(300, seed, 0.7, 0.4)
        intervals = calibration_scores(labels, probabilities, logit(probabilities), np.arange(300))["ci95"]
        covered += intervals["slope"][0] <= 0.7 <= intervals["slope"][1]
        covered += intervals["intercept"][0] <= 0.4 <= intervals["intercept"][1]
    assert 20 <= covered <= 24


def test_places_are_drawn_whole_and_few_of_them_give_no_interval():
    labels, probabilities = drawn(60, 0)
    copied = [np.repeat(values, 10) for values in (labels, probabilities, logit(probabilities))]
    single = calibration_scores(labels, probabilities, logit(probabilities), np.arange(60))
    whole = calibration_scores(*copied, np.repeat(np.arange(60), 10))
    assert whole["ci95"]["slope"] == pytest.approx(single["ci95"]["slope"], rel=0.02)
    few = calibration_scores(labels, probabilities, logit(probabilities), np.arange(60) % 4)
    assert few["ci95"] == {"slope": None, "intercept": None}


@pytest.mark.parametrize("count", [100, 377, 2000])
def test_the_expected_error_is_what_right_probabilities_show(count):
    _, probabilities = drawn(count, 0)
    rng = np.random.default_rng(5)
    shown = [calibration_error(rng.random(count) < probabilities, probabilities) for _ in range(300)]
    found = expected_ece(probabilities)
    assert found["mean"] == pytest.approx(np.mean(shown), rel=0.07)
    assert found["p95"] == pytest.approx(np.percentile(shown, 95), rel=0.1)
    assert found == expected_ece(probabilities)


def test_losses_before_are_those_of_the_plain_log_odds():
    labels, probabilities = drawn(200, 0)
    log_odds = 0.3 * logit(probabilities) - 0.4
    found = calibration_scores(labels, probabilities, log_odds, np.arange(200))
    assert found["nll_before"] == pytest.approx(sk.log_loss(labels, expit(log_odds)))
    assert found["brier_before"] == pytest.approx(sk.brier_score_loss(labels, expit(log_odds)))


@pytest.mark.parametrize("labels", [np.zeros(8, dtype=int), np.repeat([0, 1], 4)])
def test_one_class_and_classes_without_an_error_give_valid_json(labels):
    log_odds = np.linspace(-900, 900, 8)
    json.dumps(calibration_scores(labels, expit(log_odds), log_odds, np.arange(8)), allow_nan=False)
