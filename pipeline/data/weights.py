"""The weight with which each training photo is sampled, by its GPS cluster and its label."""

from __future__ import annotations

import numpy as np

TEMPER, BALANCE = 0.5, 0.5
"""How far weights even out the clusters, and the two classes inside each cluster, from 0 to 1: the defaults of
`prep shard`."""


def sample_weights(
    clusters: np.ndarray,
    labels: np.ndarray,
    temper: float,
    target: np.ndarray | None = None,
    balance: float = BALANCE,
) -> np.ndarray:
    """Weights of the training photos, with mean 1.

    weight = (target share of the cluster / its share) ** temper * (n / (2 n_label)) ** balance / m, over the mean of
    all. Without a target, every cluster that has photos (those without GPS are one) has the same target share.
    n and n_label count the labelled photos of the cluster, and m is the mean of the factor before it over them, so
    that the balance moves weight between the classes of a cluster and not between clusters. Unlabelled photos, and
    clusters of one class only, get no class balance.

    No weight is capped here: how often training may show a photo is decided by its `data.max_repeats`.

    Args:
        clusters: int [N].
        labels: 0, 1 or -1 for unknown, [N].
        temper: 0 leaves the clusters as they are, 1 gives them their target shares.
        target: Share of each cluster in the deployment by its number, above 0, [1 + k]; see
            `data_prep.decisions.gps.target_shares`.
        balance: 0 leaves the classes as they are, 1 gives both classes of a cluster the same share.

    Returns:
        float64 [N].
    """
    if not len(clusters):
        return np.empty(0)
    numbers, cluster, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    wanted = np.full(len(sizes), 1 / len(sizes)) if target is None else target[numbers]
    weights = (wanted * len(clusters) / sizes)[cluster] ** temper
    by_label = np.stack([np.bincount(cluster[labels == label], minlength=len(sizes)) for label in (0, 1)])
    both = (by_label > 0).all(axis=0)
    counts = by_label[:, both]
    factors = np.ones(by_label.shape)
    factors[:, both] = (counts.sum(axis=0) / (2 * counts)) ** balance
    factors[:, both] /= (factors[:, both] * counts).sum(axis=0) / counts.sum(axis=0)
    known = labels >= 0
    weights[known] *= factors[labels[known], cluster[known]]
    return weights / weights.mean()
