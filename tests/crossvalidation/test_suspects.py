"""Wrong labels come first, photos and whole videos alike, at least as well as by self-confidence alone."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import average_precision_score

from pipeline.crossvalidation.scores import cross_fit
from pipeline.crossvalidation.suspects import confidence_in_labels, rank_suspects
from tests.crossvalidation.examples import PHOTOS, make_answers, make_table

WRONG = 0.03


def flip(rng, truth, group, kind):
    """Which labels are wrong: 3 % of the photos, or of the photos by whole videos."""
    wrong = np.zeros(PHOTOS, dtype=bool)
    if kind == "photos":
        wrong[rng.choice(PHOTOS, round(WRONG * PHOTOS), replace=False)] = True
    else:
        for video in rng.permutation(group.max() + 1):
            if wrong.sum() < WRONG * PHOTOS:
                wrong[group == video] = True
    return wrong, np.where(wrong, 1 - truth, truth)


def self_confidence(labels, log_odds, fold):
    """What cleanlab ranks by: the calibrated probability of the given label, from the photo alone."""
    cuts, slopes = cross_fit(labels, log_odds, fold)
    roadwork = expit(slopes * (log_odds - cuts))
    return np.where(labels == 1, roadwork, 1 - roadwork)


@pytest.mark.parametrize("kind", ["photos", "videos"])
@pytest.mark.parametrize(("alike", "gain"), [(1.0, 0.05), (0.9, 0.02), (0.5, -0.02)])
def test_wrong_labels_are_ranked_at_least_as_well_as_by_self_confidence(kind, alike, gain):
    differences = []
    for seed in range(5):
        rng, truth, log_odds, group, fold = make_answers(seed, alike)
        wrong, labels = flip(rng, truth, group, kind)
        ours, theirs = confidence_in_labels(labels, log_odds, group, fold), self_confidence(labels, log_odds, fold)
        found = [average_precision_score(wrong, -confidence) for confidence in (ours, theirs)]
        assert found[1] > 0.6
        differences.append(found[0] - found[1])
    assert np.mean(differences) > gain


@pytest.mark.parametrize("seed", range(3))
def test_a_photos_own_label_has_no_part_in_the_confidence_in_it(seed):
    _, labels, log_odds, group, fold = make_answers(seed, 1.0)
    before, mine = confidence_in_labels(labels, log_odds, group, fold), fold == 2
    turned = np.where(mine, 1 - labels, labels)  # the whole fold's labels
    after = confidence_in_labels(turned, log_odds, group, fold)
    np.testing.assert_allclose(after[mine], 1 - before[mine], atol=1e-9)


def test_the_confidence_means_what_it_says():
    """Among photos that get about the same probability of roadwork, that share is labelled so."""
    _, truth, log_odds, group, fold = make_answers(3, 0.9)
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(PHOTOS) < 0.1, 1 - truth, truth)
    confidence = confidence_in_labels(labels, log_odds, group, fold)
    roadwork = np.where(labels == 1, confidence, 1 - confidence)
    for low in np.arange(0.1, 0.9, 0.2):
        inside = (roadwork >= low) & (roadwork < low + 0.2)
        spread = np.sqrt(inside.sum() * 0.25) / inside.sum()
        assert labels[inside].mean() == pytest.approx(roadwork[inside].mean(), abs=0.03 + 4 * spread)


def test_suspects_lists_every_photo_once_the_most_doubtful_first():
    rng, truth, log_odds, group, fold = make_answers(0, 1.0)
    wrong, labels = flip(rng, truth, group, "photos")
    table = make_table(labels, log_odds, group, fold)
    suspects = rank_suspects(table)
    assert suspects["rank"].tolist() == list(range(1, PHOTOS + 1))
    assert sorted(suspects["key"]) == sorted(table["key"])
    assert suspects["confidence"].is_monotonic_increasing
    assert list(suspects.columns) == [
        "rank", "key", "split", "source", "label", "confidence", "out_of_fold_probability", "out_of_fold_prediction",
        "place", "group", "fold",
    ]  # fmt: skip
    rows = suspects.set_index("key").loc[table["key"]].reset_index()
    pd.testing.assert_frame_equal(rows[["label", "source", "fold"]], table[["label", "source", "fold"]])
    first = suspects["key"].head(50).str.removeprefix("p").astype(int)
    assert wrong[first].mean() > 0.9
