"""Out-of-fold answers as a good model gives them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pipeline.crossvalidation.division import Places
from pipeline.crossvalidation.held_out import HEAD
from pipeline.crossvalidation.scores import out_of_fold_table
from pipeline.data.index import Sample

PHOTOS, FOLDS = 3000, 5


def make_answers(seed, alike):
    """Photos of videos in 24 places, with out-of-fold log-odds of about 0.98 AUROC.

    Args:
        alike: Share of the videos whose frames all have one true label.
    """
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(PHOTOS), rng.geometric(1 / 6, size=PHOTOS))[:PHOTOS]
    place = rng.integers(24, size=PHOTOS)[group]
    whole = (rng.random(PHOTOS) < 0.3)[group], (rng.random(PHOTOS) < alike)[group]
    truth = np.where(whole[1], whole[0], rng.random(PHOTOS) < 0.3).astype(int)
    noise = (0.5, place), (1.2, group), (1.2, np.arange(PHOTOS))
    log_odds = 5 * (truth - 0.5) + sum(sd * rng.normal(size=PHOTOS)[of] for sd, of in noise)
    return rng, truth, log_odds, group, place % FOLDS


def make_table(labels, log_odds, group, fold, seeds=2):
    """The rows of out_of_fold.csv for such answers, each video a place; heads spread around their mean."""
    samples = tuple(
        Sample(f"p{row}", 0, {}, int(label), int(number), 1, 1.0, 9, 9)
        for row, (label, number) in enumerate(zip(labels, group, strict=True))
    )
    places = Places(("train",) * len(labels), samples, group, "a GPS cluster")
    noise = np.random.default_rng(0).normal(size=(seeds, len(labels)))
    noise -= noise.mean(axis=0)
    heads = {HEAD.format(k): log_odds + noise[k] for k in range(seeds)}
    answers = pd.DataFrame({"key": places.keys, "source": [f"{key}.jpg" for key in places.keys], **heads})
    order = np.random.default_rng(1).permutation(len(labels))  # fold by fold, in another order than the photos
    return out_of_fold_table(places, dict(zip(places.keys, fold.tolist(), strict=True)), answers.iloc[order])
