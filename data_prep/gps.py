"""GPS clusters of the training photos, and the weight with which each photo is sampled."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

AUTOMATIC_CLUSTERS = 12
PHOTOS_PER_CLUSTER = 20
WEIGHT_CAP = 10.0
RESTARTS = 4
EARTH_RADIUS_M = 6_371_008.8  # mean radius, IUGG
NO_GPS = 0


def unit_sphere(degrees: np.ndarray) -> np.ndarray:
    """Latitude and longitude [N, 2] in degrees as points [N, 3] of the unit sphere, without a date line."""
    latitude, longitude = np.radians(degrees).T
    return np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=1
    )


def fit_centres(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """K-Means on the sphere.

    Args:
        points: Latitude and longitude of the training photos in degrees, [N, 2], without NULL.
        clusters: How many; 0 takes 12, or one for every 20 photos if less. Never more than places.
        seed: Of the restarts.

    Returns:
        Centres in degrees, [k, 2], the most populous first.
    """
    if not len(points):
        return np.empty((0, 2))
    automatic = min(AUTOMATIC_CLUSTERS, max(1, len(points) // PHOTOS_PER_CLUSTER))
    count = min(clusters or automatic, len(np.unique(points, axis=0)))
    # One thread: the order in which threads add up changes the last bits, and equal runs give equal bytes.
    with threadpool_limits(1):
        fitted = KMeans(count, n_init=RESTARTS, random_state=seed).fit(unit_sphere(points))
    x, y, z = fitted.cluster_centers_.T
    centres = np.degrees(np.stack([np.arctan2(z, np.hypot(x, y)), np.arctan2(y, x)], axis=1)).round(6)
    members = np.bincount(assign_clusters(points, centres), minlength=count + 1)[1:]
    return centres[np.lexsort((centres[:, 1], centres[:, 0], -members))]


def assign_clusters(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Number of the nearest centre, from 1, for each photo; 0 where the GPS is NULL.

    Args:
        points: Degrees, [N, 2], NaN for NULL.
        centres: Degrees, [k, 2].

    Returns:
        int64 [N].
    """
    clusters = np.full(len(points), NO_GPS, dtype=np.int64)
    known = ~np.isnan(points[:, 0])
    if len(centres) and known.any():
        # On the unit sphere the nearest centre is the one with the largest dot product.
        clusters[known] = 1 + (unit_sphere(points[known]) @ unit_sphere(centres).T).argmax(axis=1)
    return clusters


def sample_weights(clusters: np.ndarray, labels: np.ndarray, temper: float) -> np.ndarray:
    """Weights of the training photos, with mean 1.

    weight = min(10, (target share of the cluster / its share) ** temper * n / (2 n_label)), over the mean of
    all. Every cluster that has photos (those without GPS are one) has the same target share. n and n_label
    count the labelled photos of the cluster; unlabelled photos, and clusters of one class only, get no class
    balance.

    Args:
        clusters: int [N].
        labels: 0, 1 or -1 for unknown, [N].
        temper: 0 leaves the clusters as they are, 1 makes them equal.
    """
    if not len(clusters):
        return np.empty(0)
    _, cluster, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    weights = (len(clusters) / (len(sizes) * sizes[cluster])) ** temper
    by_label = np.stack([np.bincount(cluster[labels == label], minlength=len(sizes)) for label in (0, 1)])
    has_both = np.logical_and(*(by_label > 0))
    rows = np.flatnonzero(has_both[cluster] & (labels >= 0))
    weights[rows] *= by_label.sum(axis=0)[cluster[rows]] / (2 * by_label[labels[rows], cluster[rows]])
    weights = np.minimum(weights, WEIGHT_CAP)
    return weights / weights.mean()
