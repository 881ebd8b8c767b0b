"""Which photos are folded together: whole places, and near-duplicates always stay together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.data.balance import fill_splits
from pipeline.data.folds import Folds
from pipeline.data.index import Index, Sample
from pipeline.errors import UserError

NO_GPS = 0  # the cluster of photos without GPS
PLACES_PER_PART = 2


@dataclass(frozen=True)
class Places:
    """N labelled photos, and where they were taken."""

    splits: tuple[str, ...]
    """For each photo, the split of the shards that it belongs to."""
    samples: tuple[Sample, ...]
    numbers: np.ndarray
    """Number of each photo's place, from 0: int64 [N]."""
    rule: str
    """What a place is."""

    @property
    def keys(self) -> list[str]:
        """The photos' keys."""
        return [sample.key for sample in self.samples]

    @property
    def labels(self) -> np.ndarray:
        """0 or 1, int64 [N]."""
        return np.array([sample.label for sample in self.samples], dtype=np.int64)

    @property
    def groups(self) -> np.ndarray:
        """Near-duplicates have the same number: int64 [N]."""
        return np.array([sample.group for sample in self.samples], dtype=np.int64)


def find_places(index: Index, splits: Sequence[str], parts: int) -> Places:
    """Find the places of all labelled photos.

    A place is a GPS cluster; clusters that share a group of near-duplicates are one place. A photo without GPS is of
    the place of its near-duplicates, and if they have none either, their group is a place. Where the clusters make
    fewer than two places for each part, every group of near-duplicates is a place.

    Args:
        index: The shards' index.
        splits: Splits whose photos are taken.
        parts: Number of parts that the places are for.

    Raises:
        UserError: There are too few places.
    """
    known = [(name, s) for name in splits for s in index.splits[name].samples if s.label is not None]
    if not known:
        raise UserError(f"the shards have no labelled photo in the splits {', '.join(splits)}; choose other --splits")
    names, samples = zip(*known, strict=True)
    groups = np.array([sample.group for sample in samples])
    clusters = np.array([sample.cluster for sample in samples])
    numbers = join(groups, clusters)
    needed, rule = PLACES_PER_PART * parts, "a GPS cluster"
    if (clusters == NO_GPS).any():
        rule += ", or a group of near-duplicates without GPS"
    if len(np.unique(numbers[clusters != NO_GPS])) < needed:
        numbers, rule = np.unique(groups, return_inverse=True)[1], "a group of near-duplicates"
    found = int(numbers.max()) + 1
    if found < needed:
        raise UserError(
            f"the {len(samples)} labelled photos lie in {found} places ({rule}), and {parts} folds need {needed}, "
            f"{PLACES_PER_PART} for each; choose a smaller --folds, or add photos of other places"
        )
    return Places(names, samples, numbers, rule)


def join(groups: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Number the connected components of groups and GPS clusters, which each photo links: int64 [N], from 0.

    Args:
        groups: Number of each photo's group, int64 [N].
        clusters: Number of each photo's cluster, int64 [N]; `NO_GPS` links nothing.
    """
    _, group = np.unique(groups, return_inverse=True)
    _, cluster = np.unique(clusters, return_inverse=True)
    size, on_map = group.max() + 1, clusters != NO_GPS
    nodes = int(size + cluster.max() + 1)
    links = coo_array((np.ones(on_map.sum()), (group[on_map], size + cluster[on_map])), shape=(nodes, nodes))
    _, component = connected_components(links, directed=False)
    numbers: np.ndarray = np.unique(component[group], return_inverse=True)[1]
    return numbers


def divide(places: Places, parts: int, seed: int, source_sha256: str) -> Folds:
    """Divide the places into parts of about equal size and shares of roadwork.

    Args:
        places: The photos and their places.
        parts: Number of parts, and so of folds.
        seed: Decides between equally good divisions.
        source_sha256: Fingerprint of the shards.

    Raises:
        UserError: A part would lack one of the classes.
    """
    labels = places.labels
    part_of = fill_splits(places.numbers, labels, np.full(parts, 1 / parts), seed)
    counts = np.stack([np.bincount(part_of[labels == label], minlength=parts) for label in (0, 1)])
    if not counts.all():
        roadwork = len(np.unique(places.numbers[labels == 1]))
        none = len(np.unique(places.numbers[labels == 0]))
        raise UserError(
            f"{parts} folds need photos of both classes in each, and roadwork is in {roadwork} places and none in "
            f"{none} ({places.rule}); choose a smaller --folds, or label photos of other places"
        )
    return Folds(source_sha256, parts, dict(zip(places.keys, part_of.tolist(), strict=True)))
