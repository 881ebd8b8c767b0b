"""Out-of-fold predictions, and how good they are: calibrated by the other folds, with places and seeds drawn anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from pipeline.crossvalidation.division import Places
from pipeline.crossvalidation.held_out import HEAD
from pipeline.evaluation.calibration import fit
from pipeline.evaluation.metrics import accuracy_of, binary_metrics, confusion_counts, has_both, mcc_of
from pipeline.evaluation.place_bootstrap import ROUNDS, Estimate, PlaceBootstrap, bootstrap_units
from pipeline.evaluation.reliability import calibration_scores

SMALLEST_PLACE = 20  # photos; the MCC of fewer is noise
LOG_ODDS, PROBABILITY, PREDICTION = (f"out_of_fold_{name}" for name in ("log_odds", "probability", "prediction"))


def heads_of(table: pd.DataFrame) -> np.ndarray:
    """Out-of-fold log-odds of each head, float64 [S, N]."""
    count = sum(name.startswith(HEAD.format("")) for name in table.columns)
    return table[[HEAD.format(k) for k in range(count)]].to_numpy(np.float64).T


def out_of_fold_table(places: Places, part_of: Mapping[str, int], answers: pd.DataFrame) -> pd.DataFrame:
    """The rows of out_of_fold.csv: all labelled photos, each as the fold that held it out answers.

    A photo's probability comes from the cut and the slope that the answers of all other folds have.

    Args:
        places: The photos.
        part_of: Number of the fold that holds each photo out, by its key.
        answers: See `answer_held_out`, of all folds together.
    """
    answers = answers.set_index("key").loc[places.keys].reset_index()
    labels, fold = places.labels, np.array([part_of[key] for key in places.keys])
    log_odds = heads_of(answers).mean(axis=0)
    cuts, slopes = cross_fit(labels, log_odds, fold)
    probabilities = expit(slopes * (log_odds - cuts))
    return pd.DataFrame({
        "key": answers["key"], "split": places.splits, "source": answers["source"], "label": labels,
        "place": places.numbers, "group": places.groups, "fold": fold,
        LOG_ODDS: log_odds, PROBABILITY: probabilities, PREDICTION: (probabilities > 0.5).astype(int),
        **{name: answers[name] for name in answers.columns if name.startswith(HEAD.format(""))},
    })  # fmt: skip


def cross_fit(labels: np.ndarray, log_odds: np.ndarray, fold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each photo, the cut and the slope that fit the out-of-fold log-odds of all other folds: float64 [N] each."""
    cuts, slopes = np.zeros(len(labels)), np.ones(len(labels))
    for number in np.unique(fold):
        mine = fold == number
        found = fit(labels[~mine], log_odds[~mine])
        cuts[mine], slopes[mine] = found.cut, found.slope
    return cuts, slopes


def score(table: pd.DataFrame) -> dict[str, Any]:
    """The scores in summary.json, all of out-of-fold predictions.

    Returns:
        `ensemble`: the mean log-odds of each fold's S heads, pooled over the folds; `one_head`: the mean over the S
        heads; `places`: the ensemble in each place, worst first; `interval`: what the intervals are over.
    """
    labels, log_odds, fold = (table[name].to_numpy() for name in ("label", LOG_ODDS, "fold"))
    probabilities, heads = table[PROBABILITY].to_numpy(), heads_of(table)
    everything = np.ones(len(table), dtype=bool)
    units, unit_name = bootstrap_units(table["place"].to_numpy(), table["group"].to_numpy(), everything)
    bootstrap = PlaceBootstrap(units, len(heads))
    cuts, _ = cross_fit(labels, log_odds, fold)
    above = [z - cross_fit(labels, z, fold)[0] for z in heads]
    outcomes = np.stack([confusion_counts(labels, z, 0.0) for z in above])
    one, all_heads = bootstrap.mcc_of_heads(outcomes), bootstrap.mcc_of_ensemble(labels, heads, cuts)
    return {
        "ensemble": {
            **binary_metrics(labels, probabilities, ranking=log_odds),
            "ci95": {"mcc": bounds(all_heads)},
            "calibration": calibration_scores(labels, probabilities, log_odds, table["place"].to_numpy()),
        },
        "one_head": {
            "mcc": one.value,
            "ci95": {"mcc": bounds(one)},
            "by_head": mcc_of(*outcomes.sum(axis=1).T).tolist(),
        },
        "places": score_places(table),
        "interval": {
            "drawn": f"{unit_name} and seeds" if len(heads) > 1 else unit_name,
            "units": len(np.unique(units)),
            "seeds": len(heads),
            "rounds": ROUNDS,
        },
    }


def bounds(estimate: Estimate) -> list[float] | None:
    """The interval's ends for JSON, which has no infinities."""
    return [estimate.low, estimate.high] if np.isfinite([estimate.low, estimate.high]).all() else None


def score_places(table: pd.DataFrame) -> list[dict[str, Any]]:
    """MCC and accuracy in each place that is large enough, worst first; places with one class have no MCC."""
    found = []
    for place, rows in table.groupby("place"):
        if len(rows) < SMALLEST_PLACE:
            continue
        labels = rows["label"].to_numpy()
        tn, fp, fn, tp = confusion_counts(labels, rows[PREDICTION].to_numpy(), 0.5).sum(axis=0)
        found.append(
            {
                "place": int(str(place)),
                "fold": int(rows["fold"].iloc[0]),
                "n": len(rows),
                "roadwork": int(labels.sum()),
                "mcc": float(mcc_of(tn, fp, fn, tp)) if has_both(labels) else None,
                "accuracy": float(accuracy_of(tn, fp, fn, tp)),
            }
        )
    return sorted(found, key=lambda one: (one["mcc"] is None, one["mcc"] or 0.0, one["accuracy"]))


def in_words(scores: dict[str, Any]) -> str:
    """The headline in one readable line."""
    ensemble, drawn = scores["ensemble"], scores["interval"]["drawn"]
    ends = ensemble["ci95"]["mcc"]
    interval = f", 95 % interval over {drawn} {ends[0]:.3f} to {ends[1]:.3f}" if ends else ""
    heads = scores["interval"]["seeds"]
    beside = f"; one head alone {scores['one_head']['mcc']:.3f}" if heads > 1 else ""
    return f"out of fold: MCC {ensemble['mcc']:.3f}{interval} (metadata NULL, n={ensemble['n']}){beside}"
