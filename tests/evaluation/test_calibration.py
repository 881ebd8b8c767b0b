"""Cut and slope on made-up log-odds: what they reach, what they do not depend on, and what cross-fitting shows."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, matthews_corrcoef

from pipeline.errors import UserError
from pipeline.evaluation.calibration import Calibration, best_cut, best_slope, check_finite, cross_fit, fit, out_of_fold


def two_normals(count, seed, prevalence=0.5, shift=1.8):
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < prevalence).astype(int)
    return labels, (2 * labels - 1) * shift + rng.normal(size=count)


def two_skewed(count, seed, prevalence=0.5):
    """Both classes have a long tail towards the other."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < prevalence).astype(int)
    return labels, np.where(labels, 2.0 - rng.gamma(1.5, 1.0, count), -1.8 + rng.gamma(1.5, 0.7, count))


def two_mixed(count, seed, prevalence=0.5):
    """A fifth of the photos is hard."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < prevalence).astype(int)
    spread = np.where(rng.random(count) < 0.2, 1.6, 0.6)
    return labels, (2 * labels - 1) * 1.5 + spread * rng.normal(size=count)


def raw_cut(labels, log_odds):
    """The cut with the highest MCC on the photos at hand."""
    order = np.argsort(log_odds)
    fn, tn = np.cumsum(labels[order])[:-1], np.cumsum(1 - labels[order])[:-1]
    tp, fp = labels.sum() - fn, (1 - labels).sum() - tn
    below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    at = int(np.argmax((tp * tn - fp * fn) / below))
    return log_odds[order][at : at + 2].mean()


@pytest.mark.parametrize("prevalence", [0.5, 0.15])
@pytest.mark.parametrize("draw", [two_normals, two_skewed, two_mixed])
def test_the_smoothed_cut_loses_less_on_other_photos_than_the_best_cut_of_these(draw, prevalence):
    labels, log_odds = draw(40_000, 1000, prevalence)
    lost = {best_cut: 0.0, raw_cut: 0.0}
    highest = matthews_corrcoef(labels, log_odds > raw_cut(labels, log_odds))
    for seed in range(30):
        some = draw(500, seed, prevalence)
        for choose in lost:
            lost[choose] += highest - matthews_corrcoef(labels, log_odds > choose(*some))
    assert lost[best_cut] < 0.8 * lost[raw_cut]
    assert lost[best_cut] / 30 < 0.006


@pytest.mark.parametrize("seed", range(3))
def test_the_cut_is_the_peak_of_the_mcc_of_two_normal_classes(seed):
    """By symmetry 0 is best for even classes of equal width, and for a shift by any amount, that amount."""
    labels, log_odds = two_normals(20_000, seed)
    assert abs(best_cut(labels, log_odds)) < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_shift_and_scale_of_the_log_odds_change_no_probability(seed):
    labels, log_odds = two_skewed(300, seed)
    before = fit(labels, log_odds)
    for scale, shift in ((0.01, 0.0), (1.0, 40.0), (30.0, -7.0)):
        after = fit(labels, scale * log_odds + shift)
        assert after.cut == pytest.approx(scale * before.cut + shift, rel=1e-3, abs=1e-3 * scale)
        found = after.probability(scale * log_odds + shift)
        np.testing.assert_allclose(found, before.probability(log_odds), atol=1e-3)


def test_the_cut_between_two_separate_classes_is_far_from_both_and_the_slope_is_finite():
    log_odds = np.concatenate([np.linspace(-3, -2, 50), np.linspace(2, 3, 50)])
    found = fit(np.repeat([0, 1], 50), log_odds)
    assert abs(found.cut) < 0.5
    probabilities = found.probability(log_odds)
    # Platt's targets for fifty photos of each class.
    assert probabilities[50:].mean() == pytest.approx(51 / 52, abs=0.01)
    assert probabilities[:50].mean() == pytest.approx(1 / 52, abs=0.01)


def test_one_photo_of_a_class_does_not_pull_the_cut_up_to_itself():
    assert fit(np.array([0, 1]), np.array([1.0, 3.0])).cut == pytest.approx(2.0, abs=0.3)
    assert fit(np.array([0, 0, 0, 1]), np.array([0.0, 0.1, 0.2, 2.0])).cut == pytest.approx(1.1, abs=0.4)


@pytest.mark.parametrize(
    ("labels", "log_odds"), [([1, 1, 1], [0.3, 0.6, 2.0]), ([0, 0], [0.3, 0.6]), ([0, 1, 1], [0.9] * 3), ([], [])]
)
def test_where_nothing_can_be_learnt_the_log_odds_stay_as_they_are(labels, log_odds):
    """The cut is 0 in log-odds, never 0.5, which is a probability."""
    labels, log_odds = np.array(labels), np.array(log_odds)
    assert fit(labels, log_odds) == Calibration(cut=0.0, slope=1.0)
    assert best_cut(labels, log_odds) == 0.0
    np.testing.assert_allclose(cross_fit(labels, log_odds, np.arange(len(labels))), expit(log_odds))


@pytest.mark.parametrize("seed", range(3))
def test_the_slope_is_that_of_a_logistic_regression_without_intercept(seed):
    labels, above = two_normals(5000, seed, shift=0.7)
    reference = LogisticRegression(C=np.inf, fit_intercept=False).fit(above[:, None], labels)
    assert best_slope(labels, above) == pytest.approx(reference.coef_[0, 0], rel=0.01)


def test_the_slope_is_above_zero_even_if_the_scores_rank_the_wrong_way():
    labels, log_odds = two_normals(200, 0)
    found = fit(1 - labels, log_odds)
    assert 0 < found.slope < 0.05
    assert np.abs(found.probability(log_odds) - 0.5).max() < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_focal_probabilities_become_calibrated_and_one_half_stays_the_cut(seed):
    """Log-odds of a loss that keeps probabilities away from 0 and 1, as the focal loss with smoothed labels does."""
    rng = np.random.default_rng(seed)
    truth = 2.5 * rng.normal(size=3000)
    labels = (rng.random(3000) < expit(truth)).astype(int)
    squeezed = 0.3 * truth - 0.4
    found = fit(labels[:1500], squeezed[:1500])
    held = found.probability(squeezed[1500:])
    assert ((held > 0.5) == (squeezed[1500:] > found.cut)).all()
    assert log_loss(labels[1500:], held) < log_loss(labels[1500:], expit(squeezed[1500:])) - 0.05
    assert log_loss(labels[1500:], held) < log_loss(labels[1500:], expit(truth[1500:])) + 0.02


def test_a_score_on_the_photos_that_chose_the_cut_is_too_high_and_the_cross_fitted_one_is_not():
    """Weak answers: what cut and photos share by chance is a large part of the MCC."""
    fitted, crossed, truth = [], [], []
    other = two_normals(20_000, 999, shift=0.3)
    for seed in range(60):
        labels, log_odds = two_normals(100, seed, shift=0.3)
        found = fit(labels, log_odds)
        fitted.append(matthews_corrcoef(labels, found.probability(log_odds) > 0.5))
        crossed.append(matthews_corrcoef(labels, cross_fit(labels, log_odds, np.arange(100)) > 0.5))
        truth.append(matthews_corrcoef(other[0], found.probability(other[1]) > 0.5))
    assert np.mean(fitted) > np.mean(truth) + 0.03
    assert np.mean(crossed) < np.mean(truth) + 0.01


def test_a_photos_own_label_and_those_of_its_group_do_not_reach_its_probability():
    labels, log_odds = two_normals(60, 0)
    groups = np.arange(60) // 3
    cuts, slopes = out_of_fold(labels, log_odds, groups)
    assert all(len(set(cuts[groups == group])) == 1 for group in groups)
    assert len(set(zip(cuts, slopes, strict=True))) == 5
    fold = np.flatnonzero(cuts == cuts[0])
    rest = np.setdiff1d(np.arange(60), fold)
    assert (cuts[0], slopes[0]) == tuple(vars(fit(labels[rest], log_odds[rest])).values())


def test_few_photos_of_a_class_make_fewer_folds_and_one_photo_none():
    labels, log_odds = np.array([0] * 20 + [1, 1]), np.linspace(-1, 1, 22)
    assert len(set(out_of_fold(labels, log_odds, np.arange(22))[0])) == 2
    np.testing.assert_allclose(cross_fit(labels[:-1], log_odds[:-1], np.arange(21)), expit(log_odds[:-1]))


def test_answers_that_are_not_numbers_are_counted_and_the_first_is_named():
    check_finite(np.array([0.0, 1.0]), ["a", "b"], "the model")
    with pytest.raises(UserError, match="the model gives no number for 2 of 3 photos, the first of which is b;"):
        check_finite(np.array([0.0, np.nan, np.inf]), ["a", "b", "c"], "the model")
