import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from pipeline.evaluation.metrics import (
    Ranking,
    binary_metrics,
    bootstrap_intervals,
    calibration_error,
    reliability,
)


def predictions(n: int, seed: int, decimals: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Labels and informative, miscalibrated probabilities; few decimals make ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=n)
    logits = 1.5 * (2 * labels - 1) + 2 * rng.standard_normal(n) + 0.7
    return labels, np.round(1 / (1 + np.exp(-logits)), decimals)


@pytest.mark.parametrize("decimals", [1, 12])
def test_metrics_agree_with_scikit_learn(decimals):
    labels, probabilities = predictions(400, seed=1, decimals=decimals)
    ours = binary_metrics(labels, probabilities, 0.4)
    called = probabilities > 0.4
    assert ours["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, called), abs=1e-12)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(labels, called))
    assert ours["f1"] == pytest.approx(sk.f1_score(labels, called))
    assert ours["auroc"] == pytest.approx(sk.roc_auc_score(labels, probabilities))
    assert ours["average_precision"] == pytest.approx(sk.average_precision_score(labels, probabilities))
    assert list(ours["confusion"].values()) == sk.confusion_matrix(labels, called).ravel().tolist()
    assert ours["nll"] == pytest.approx(sk.log_loss(labels, probabilities))
    assert ours["brier"] == pytest.approx(((labels - probabilities) ** 2).mean())
    assert ours["n"] == 400


def test_other_scores_may_rank_the_photos():
    labels, probabilities = predictions(200, seed=2)
    ranking = np.random.default_rng(0).normal(size=200)
    ours = binary_metrics(labels, probabilities, ranking=ranking)
    assert ours["auroc"] == pytest.approx(sk.roc_auc_score(labels, ranking))
    assert ours["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, probabilities > 0.5))
    intervals, plain = (
        bootstrap_intervals(labels, probabilities, np.arange(200), ranking=ranks, seed=0, rounds=100)
        for ranks in (ranking, None)
    )
    assert intervals["mcc"] == plain["mcc"]
    assert intervals["auroc"][0] < ours["auroc"] < intervals["auroc"][1] < plain["auroc"][0]


def test_a_probability_at_the_threshold_counts_as_none():
    assert binary_metrics(np.array([0, 1]), np.array([0.5, 0.6]), 0.5)["confusion"] == {
        "tn": 1,
        "fp": 0,
        "fn": 0,
        "tp": 1,
    }


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_gives_none_instead_of_nan_and_no_warning(label):
    labels, probabilities = np.full(5, label), np.linspace(0.1, 0.9, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = binary_metrics(labels, probabilities, 0.5)
        intervals = bootstrap_intervals(labels, probabilities, np.arange(5), 0.5, seed=0, rounds=50)
    assert ours["auroc"] is None
    assert ours["average_precision"] is None
    assert ours["mcc"] == 0
    assert intervals["mcc"] is None
    assert intervals["auroc"] is None
    assert intervals["accuracy"] is not None


def test_calibration_error_agrees_with_a_plain_loop():
    labels, probabilities = predictions(500, seed=3, decimals=3)
    probabilities[:2] = 0, 1
    total = 0.0
    for b in range(15):
        inside = (probabilities >= b / 15) & ((probabilities < (b + 1) / 15) | (b == 14))
        if inside.any():
            total += inside.sum() / 500 * abs(probabilities[inside].mean() - labels[inside].mean())
    assert calibration_error(labels, probabilities) == pytest.approx(total)


def test_calibration_error_is_zero_when_shares_equal_probabilities_and_large_when_always_wrong():
    assert calibration_error(np.array([0, 0, 0, 1]), np.full(4, 0.25)) == pytest.approx(0)
    assert calibration_error(np.array([0, 1]), np.array([1.0, 0.0])) == pytest.approx(1)


def test_reliability_bins_hold_every_photo_once():
    labels, probabilities = predictions(300, seed=4)
    bins = reliability(labels, probabilities)
    assert sum(b["n"] for b in bins) == 300
    assert all(b["low"] <= b["probability"] <= b["high"] for b in bins)
    assert sum(b["n"] * b["roadwork"] for b in bins) == pytest.approx(labels.sum())


@pytest.mark.parametrize("decimals", [1, 12])
def test_weighted_ranking_agrees_with_scikit_learn(decimals):
    labels, probabilities = predictions(200, seed=5, decimals=decimals)
    weights = np.random.default_rng(0).integers(4, size=200)
    ranking = Ranking(labels, probabilities)
    assert ranking.auroc(weights) == pytest.approx(sk.roc_auc_score(labels, probabilities, sample_weight=weights))
    expected = sk.average_precision_score(labels, probabilities, sample_weight=weights)
    assert ranking.average_precision(weights) == pytest.approx(expected)


def test_bootstrap_agrees_with_resampling_the_photos_of_drawn_groups():
    labels, probabilities = predictions(40, seed=6)
    groups = np.random.default_rng(1).integers(8, size=40)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    rng = np.random.default_rng(7)  # the draws are part of the promise: one seed, one set of groups
    values = []
    for _ in range(200):
        rows = np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])
        values.append(sk.matthews_corrcoef(labels[rows], probabilities[rows] > 0.5))
    ours = bootstrap_intervals(labels, probabilities, groups, 0.5, seed=7, rounds=200)["mcc"]
    assert ours == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_near_duplicates_do_not_narrow_the_interval():
    labels, probabilities = predictions(50, seed=8)
    copied = np.repeat(labels, 10), np.repeat(probabilities, 10)
    single = bootstrap_intervals(labels, probabilities, np.arange(50), 0.5, seed=0)
    grouped = bootstrap_intervals(*copied, np.repeat(np.arange(50), 10), 0.5, seed=0)
    naive = bootstrap_intervals(*copied, np.arange(500), 0.5, seed=0)
    assert grouped["mcc"] == pytest.approx(single["mcc"])
    width = {name: high - low for name, (low, high) in (("grouped", grouped["mcc"]), ("naive", naive["mcc"]))}
    assert width["naive"] < 0.5 * width["grouped"]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    labels, probabilities = predictions(200_000, seed=9)
    truth = binary_metrics(labels, probabilities, 0.5)
    hits = dict.fromkeys(("mcc", "auroc", "accuracy", "average_precision", "f1"), 0)
    for part in range(100):
        rows = slice(200 * part, 200 * part + 200)
        found = bootstrap_intervals(labels[rows], probabilities[rows], np.arange(200), 0.5, seed=part, rounds=150)
        for name in hits:
            low, high = found[name]
            hits[name] += low <= truth[name] <= high
    assert all(85 <= count <= 100 for count in hits.values()), hits


def test_one_group_has_no_interval():
    labels, probabilities = predictions(30, seed=10)
    assert set(bootstrap_intervals(labels, probabilities, np.zeros(30), 0.5, seed=0).values()) == {None}
