"""Weights by which training photos are drawn: by GPS cluster, and controls that show whether GPS is the reason."""

from __future__ import annotations

import numpy as np

from data_prep.decisions.gps import assign_clusters, fit_centres
from pipeline.data.weights import sample_weights

KINDS = ("uniform", "class_balanced", "gps", "gps_permuted", "random_clusters")


def training_weights(
    kind: str, points: np.ndarray, labels: np.ndarray, groups: np.ndarray, temper: float, seed: int
) -> np.ndarray:
    """Weights of the training photos, float64 [N], with mean 1.

    Args:
        kind: `uniform`; `class_balanced`, by class alone; `gps`, as `data_prep shard` weighs photos; `gps_permuted`,
            the clusters' factors given to the wrong clusters; `random_clusters`, as `gps` after the clusters were given
            to other groups of photos, wherever these are.
        points: Latitude and longitude in degrees, [N, 2], NaN for NULL.
        labels: 0 or 1, [N].
        groups: Near-duplicates have the same number, [N].
        temper: See `pipeline.data.weights.sample_weights`.
        seed: Seed of the clusters and of the random choices.
    """
    if kind == "uniform":
        return np.ones(len(labels))
    if kind == "class_balanced":
        return sample_weights(np.zeros(len(labels), dtype=np.int64), labels, 0.0, balance=1.0)
    clusters = assign_clusters(points, fit_centres(points[~np.isnan(points[:, 0])], 0, seed))
    generator = np.random.default_rng([seed, KINDS.index(kind)])
    if kind == "random_clusters":
        clusters = shuffle_clusters(clusters, groups, generator)
    if kind == "gps_permuted":
        return permuted_weights(clusters, labels, temper, generator)
    return sample_weights(clusters, labels, temper)


def cluster_factors(clusters: np.ndarray, temper: float) -> np.ndarray:
    """The factor of each cluster that has photos, without class balance, in the order of the clusters' numbers: [k]."""
    _, first = np.unique(clusters, return_index=True)
    return sample_weights(clusters, np.full(len(clusters), -1), temper)[first]


def permuted_weights(
    clusters: np.ndarray, labels: np.ndarray, temper: float, generator: np.random.Generator
) -> np.ndarray:
    """GPS weights with the factors of other clusters; classes are balanced inside each cluster as before.

    With two clusters or more, no cluster keeps its own factor.
    """
    factors = cluster_factors(clusters, temper)
    _, of_photo = np.unique(clusters, return_inverse=True)
    weights = derange(factors, generator)[of_photo.ravel()] * sample_weights(clusters, labels, 0.0)
    return weights / weights.mean()


def derange(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The values in an order in which none is in its own place, by a cycle through a random order (Sattolo 1986)."""
    order = generator.permutation(len(values))
    moved = np.empty_like(values)
    moved[order] = values[np.roll(order, 1)]
    return moved


def shuffle_clusters(clusters: np.ndarray, groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Give clusters to other groups at random: each cluster gets as many groups as before, wherever they are."""
    _, first, of_photo = np.unique(groups, return_index=True, return_inverse=True)
    return generator.permutation(clusters[first])[of_photo.ravel()]
