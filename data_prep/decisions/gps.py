"""GPS clusters of the training photos, and the share of each cluster in a deployment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from sklearn.metrics.pairwise import haversine_distances
from threadpoolctl import threadpool_limits

from data_prep.sources.gps_notes import GpsNotes
from data_prep.sources.metadata import GPS_FIELDS, parse_gps, select_fields
from data_prep.sources.tables import read_rows, shorten
from pipeline.errors import UserError
from pipeline.names import EARTH_RADIUS_KM
from pipeline.progress import say

MOST_CLUSTERS = 30
PHOTOS_PER_CLUSTER = 20
SILHOUETTE_SAMPLE = 1000
# Photos spread evenly over a square reach 0.44, over a bell 0.39: below this, what K-Means cuts is one area
# (Kaufman & Rousseeuw 1990, "Finding Groups in Data", chapter 2, calls more than 0.5 a reasonable structure).
SEPARATED = 0.5
RESTARTS = 4
FAR_M = 50_000.0  # from a cluster's centre: another city
EARTH_RADIUS_M = 1000 * EARTH_RADIUS_KM
NO_GPS = 0


def unit_sphere(degrees: np.ndarray) -> np.ndarray:
    """Latitude and longitude [N, 2] in degrees as points [N, 3] of the unit sphere, without a date line."""
    latitude, longitude = np.radians(degrees).T
    across = np.cos(latitude)
    return np.stack([across * np.cos(longitude), across * np.sin(longitude), np.sin(latitude)], axis=1)


def fit_centres(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Cluster centres by K-Means on the sphere.

    Args:
        points: Latitude and longitude of the training photos in degrees, [N, 2], without NULL.
        clusters: Number of clusters; 0 leaves it to `choose_clusters`. It is lowered to the number of distinct places.
        seed: Seed of the restarts.

    Returns:
        Centres in degrees, [k, 2], the most populous first.
    """
    if not len(points):
        return np.empty((0, 2))
    vectors = _vectors(points)
    count = min(clusters or choose_clusters(points, seed), len(np.unique(vectors, axis=0)))
    # One thread: the order in which threads add up changes the last bits, and equal runs give equal bytes.
    with threadpool_limits(1):
        fitted = KMeans(count, n_init=RESTARTS, random_state=seed).fit(vectors)
    x, y, z = fitted.cluster_centers_.T
    centres = np.degrees(np.stack([np.arctan2(z, np.hypot(x, y)), np.arctan2(y, x)], axis=1)).round(6)
    members = np.bincount(assign_clusters(points, centres), minlength=count + 1)[1:]
    return centres[np.lexsort((centres[:, 1], centres[:, 0], -members))]


def choose_clusters(points: np.ndarray, seed: int) -> int:
    """The number of clusters with the best mean silhouette; 1 where none separates the photos.

    The silhouette (Rousseeuw 1987) compares each photo's great-circle distance to its own cluster with that to the
    next one. Numbers from 2 to 30 are tried, but at most one cluster for every 20 photos; of two equally good numbers
    the smaller one is taken.

    Args:
        points: Latitude and longitude in degrees, [N, 2], without NULL; of more than 1,000, a sample decides.
        seed: Seed of the sample and of K-Means.
    """
    most = min(MOST_CLUSTERS, len(points) // PHOTOS_PER_CLUSTER)
    if len(points) > SILHOUETTE_SAMPLE:
        points = np.random.default_rng(seed).choice(points, SILHOUETTE_SAMPLE, replace=False)
    vectors = _vectors(points)
    best, best_score = 1, SEPARATED
    with threadpool_limits(1):
        distances = haversine_distances(np.radians(points))
        for count in range(2, min(most, len(np.unique(vectors, axis=0))) + 1):
            members = KMeans(count, n_init=1, random_state=seed).fit_predict(vectors)
            score = silhouette_score(distances, members, metric="precomputed")
            if score > best_score:
                best, best_score = count, score
    return best


def _vectors(points: np.ndarray) -> np.ndarray:
    """Points of the unit sphere to 64 cm: K-Means works with squares, and cannot tell much closer ones apart."""
    return unit_sphere(points).round(7)


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


def target_shares(target_points: np.ndarray, centres: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, float]:
    """The share of a deployment's places that each cluster stands for.

    A place counts for the nearest centre, however far. Every cluster gets one place more than it has, so that none
    drops out of training. Photos without GPS say nothing about where they are, and keep their share.

    Args:
        target_points: Latitude and longitude of the deployment's places in degrees, [M, 2], without NULL.
        centres: Latitude and longitude of the centres in degrees, [k, 2].
        clusters: Number of each training photo's cluster, int [N].

    Returns:
        Shares by cluster number, [1 + k], summing to 1, and the share of places more than 50 km from every centre.

    Raises:
        UserError: No training photo has GPS, so there is no cluster to weigh.
    """
    if not len(centres):
        raise UserError("--target_gps weighs training photos by where they are, and none of them has GPS; leave it out")
    without_gps = float((clusters == NO_GPS).mean())
    places = 1 + np.bincount(assign_clusters(target_points, centres), minlength=1 + len(centres))[1:]
    shares = np.concatenate([[without_gps], (1 - without_gps) * places / places.sum()])
    nearest_m = EARTH_RADIUS_M * haversine_distances(np.radians(target_points), np.radians(centres)).min(axis=1)
    return shares, float((nearest_m > FAR_M).mean())


def read_target(path: Path) -> np.ndarray:
    """The places of a deployment from a table with a column gps, or latitude and longitude (lat, lon).

    Rows without usable coordinates are left out, and their number is reported.

    Args:
        path: CSV, JSONL or Parquet.

    Returns:
        Degrees, [M, 2].

    Raises:
        UserError: The file cannot be read, or has no usable row.
    """
    points: list[tuple[float, float]] = []
    notes, columns = GpsNotes(), dict[str, None]()
    for number, row in enumerate(read_rows(path), start=1):
        fields = select_fields(row)
        columns |= dict.fromkeys(row)
        place, problem = parse_gps(fields)
        told = [value for name, value in fields.items() if name in GPS_FIELDS]
        notes.add(f"row {number}", told, place, problem if place or problem else "empty")
        if place is not None:
            points.append(place)
    if not points:
        columns_told = f"; its columns are {shorten(columns)}" if columns else ""
        raise UserError(
            f"{path} names no place ({notes.reasons() or 'it has no rows'}{columns_told}); --target_gps needs a column "
            "gps, or latitude and longitude, in degrees"
        )
    if notes.problems:
        say(f"{path}: {len(points)} places; rows left out: {notes.reasons()}")
    for sentence in notes.doubts(str(path)):
        say(sentence)
    return np.array(points)
