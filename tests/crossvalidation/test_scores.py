"""Out-of-fold scores: each photo by a calibration that never saw its fold, and intervals over places and seeds."""

import json

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import brier_score_loss, log_loss, matthews_corrcoef, roc_auc_score

from pipeline.crossvalidation.held_out import HEAD
from pipeline.crossvalidation.scores import cross_fit, heads_of, in_words, score
from pipeline.evaluation.calibration import fit
from tests.crossvalidation.examples import make_answers, make_table


@pytest.fixture(scope="module")
def example():
    _, labels, log_odds, group, fold = make_answers(0, 1.0)
    return labels, log_odds, group, fold, make_table(labels, log_odds, group, fold, seeds=3)


def test_a_row_has_the_answers_of_the_heads_that_did_not_see_the_photo(example):
    labels, log_odds, group, fold, table = example
    assert table["key"].tolist() == [f"p{row}" for row in range(len(labels))]
    for name, values in (("label", labels), ("group", group), ("place", group), ("fold", fold)):
        assert table[name].tolist() == values.tolist()
    np.testing.assert_allclose(table["out_of_fold_log_odds"], log_odds, atol=1e-9)
    np.testing.assert_allclose(table[[HEAD.format(k) for k in range(3)]].mean(axis=1), log_odds, atol=1e-9)


def test_each_fold_is_calibrated_by_the_others(example):
    labels, log_odds, _, fold, table = example
    for number in range(5):
        mine = fold == number
        found = fit(labels[~mine], log_odds[~mine])
        expected = expit(found.slope * (log_odds[mine] - found.cut))
        np.testing.assert_allclose(table["out_of_fold_probability"][mine], expected, atol=1e-9)
    assert (table["out_of_fold_prediction"] == (table["out_of_fold_probability"] > 0.5)).all()


def test_labels_of_a_fold_have_no_part_in_its_calibration(example):
    labels, log_odds, _, fold, _ = example
    before, mine = cross_fit(labels, log_odds, fold), fold == 3
    after = cross_fit(np.where(mine, 1 - labels, labels), log_odds, fold)
    assert all((b[mine] == a[mine]).all() for b, a in zip(before, after, strict=True))
    assert all((b[~mine] != a[~mine]).any() for b, a in zip(before, after, strict=True))


def test_the_scores_are_those_of_scikit_learn(example):
    labels, log_odds, _, fold, table = example
    found = score(table)
    probabilities = table["out_of_fold_probability"]
    ensemble = found["ensemble"]
    assert ensemble["mcc"] == pytest.approx(matthews_corrcoef(labels, probabilities > 0.5))
    assert ensemble["auroc"] == pytest.approx(roc_auc_score(labels, log_odds))
    assert ensemble["nll"] == pytest.approx(log_loss(labels, probabilities))
    assert ensemble["brier"] == pytest.approx(brier_score_loss(labels, probabilities))
    assert ensemble["calibration"]["nll_before"] == pytest.approx(log_loss(labels, expit(log_odds)))
    by_head = [matthews_corrcoef(labels, z > cross_fit(labels, z, fold)[0]) for z in heads_of(table)]
    assert found["one_head"]["by_head"] == pytest.approx(by_head)
    assert found["one_head"]["mcc"] == pytest.approx(np.mean(by_head))
    for part in ("ensemble", "one_head"):
        low, high = found[part]["ci95"]["mcc"]
        assert low < found[part]["mcc"] < high
    assert found["interval"]["drawn"] == "places and seeds"
    assert found["interval"]["seeds"] == 3
    json.dumps(found, allow_nan=False)
    assert in_words(found).startswith(f"out of fold: MCC {ensemble['mcc']:.3f}, 95 % interval over places and seeds")


def test_places_are_listed_from_the_worst(example):
    labels, _, group, _, table = example
    found = score(table.assign(place=group % 7))["places"]
    assert len(found) == 7
    for one in found:
        rows = group % 7 == one["place"]
        assert one["n"] == rows.sum()
        assert one["mcc"] == pytest.approx(matthews_corrcoef(labels[rows], table["out_of_fold_prediction"][rows]))
    assert [one["mcc"] for one in found] == sorted(one["mcc"] for one in found)


def test_one_place_and_one_head_are_said_as_what_they_are(example):
    labels, log_odds, group, fold, _ = example
    table = make_table(labels, log_odds, group, fold, seeds=1)
    found = score(table.assign(place=0))
    assert found["interval"]["drawn"] == "groups of near-duplicates"
    assert found["one_head"]["mcc"] == pytest.approx(found["ensemble"]["mcc"])
    nothing = score(table.assign(place=0, group=0))
    assert nothing["ensemble"]["ci95"]["mcc"] is None
    json.dumps(nothing, allow_nan=False)
    assert "interval" not in in_words(nothing)
    assert "one head" not in in_words(nothing)
