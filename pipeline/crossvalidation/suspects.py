"""Photos whose label is doubtful: ranked by what out-of-fold predictions say against it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from pipeline.crossvalidation.scores import LOG_ODDS, PREDICTION, PROBABILITY

WEAK_PENALTY = 1e3  # inverse strength of the penalty on the two weights


def confidence_in_labels(labels: np.ndarray, log_odds: np.ndarray, groups: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """The probability that each photo's label is right, by predictions that did not see the label: float64 [N].

    It is the self-confidence of confident learning (Northcutt et al. 2021, "Confident Learning: Estimating Uncertainty
    in Dataset Labels", JAIR 70): the calibrated probability of the given label. Near-duplicates mostly show the same,
    so the mean log-odds of a photo's group are a second and quieter reading of it. A logistic regression of the label
    on both, fitted to the other folds, decides how much each is worth, and calibrates. Labels of the group do not
    count: a group that is wrong as a whole, such as a video, would vouch for itself.

    Args:
        labels: 0 or 1, [N].
        log_odds: Out-of-fold log-odds of roadwork, [N].
        groups: Near-duplicates have the same number, [N].
        fold: Number of the fold that held each photo out, [N]; each has both classes.
    """
    _, group = np.unique(groups, return_inverse=True)
    means = np.bincount(group, log_odds) / np.bincount(group)
    readings = np.stack([log_odds, means[group]], axis=1)
    found = np.empty(len(labels))
    for number in np.unique(fold):
        mine = fold == number
        scale = readings[~mine].std()
        fitted = LogisticRegression(C=WEAK_PENALTY).fit(readings[~mine] / scale, labels[~mine])
        roadwork = fitted.predict_proba(readings[mine] / scale)[:, 1]
        found[mine] = np.where(labels[mine] == 1, roadwork, 1 - roadwork)
    return found


def rank_suspects(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of suspects.csv: all photos of out_of_fold.csv, those with the most doubtful label first.

    Returns:
        rank from 1, key, split, source, label, `confidence` in the label (see `confidence_in_labels`), the photo's own
        out-of-fold probability of roadwork and prediction, place, group and fold.
    """
    columns = (table[name].to_numpy() for name in ("label", LOG_ODDS, "group", "fold"))
    confidence = confidence_in_labels(*columns)
    order = np.argsort(confidence, kind="stable")
    names = ["key", "split", "source", "label", PROBABILITY, PREDICTION, "place", "group", "fold"]
    ranked = table.iloc[order][names].reset_index(drop=True)
    ranked.insert(0, "rank", np.arange(1, len(ranked) + 1))
    ranked.insert(5, "confidence", confidence[order])
    return ranked
