"""Checks for leaks from one split to another, made on the photos themselves and not on their groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from sklearn.neighbors import BallTree

from data_prep.audit.photos import Photos
from data_prep.decisions.duplicates import near_duplicates
from data_prep.decisions.gps import EARTH_RADIUS_M
from data_prep.decisions.links import components
from pipeline.data.index import SPLITS

Census = Callable[[np.ndarray, Photos], str]
"""Counts some photos, by their rows, in a few words."""


@dataclass(frozen=True)
class Finding:
    """Photos that should not be where they are, or not be labelled as they are."""

    rows: tuple[int, ...]
    """The photos' rows; where there are many, one for each split."""
    note: str
    distance_m: float | None = None
    """Distance on the ground in metres; None for findings of other kinds."""
    hash_bits: int | None = None
    """Bits of the perceptual hash in which the two photos differ; None for findings of other kinds."""


@dataclass(frozen=True)
class Section:
    """Everything that one check found."""

    name: str
    title: str
    meaning: str
    """Why it matters, for the page."""
    one: str
    """What one finding is called in a sentence; `several` is the plural."""
    several: str
    findings: list[Finding]
    leak: bool = True

    @property
    def sentence(self) -> str:
        """The findings in a sentence, such as `3 videos have frames in several splits`."""
        count = len(self.findings)
        return f"{count} {self.one if count == 1 else self.several}"


@dataclass(frozen=True)
class Distances:
    """How far the photos of a later split are from the nearest ones of an earlier split."""

    later: str
    earlier: str
    rows: np.ndarray
    """Photos of the later split that have GPS, int64 [n]."""
    nearest: np.ndarray
    """The nearest photo of the earlier split for each, int64 [n]."""
    metres: np.ndarray
    """Great-circle distance to it, [n]."""


def make_sections(
    photos: Photos, alike: np.ndarray, distances: Sequence[Distances], distance_m: float
) -> tuple[Section, ...]:
    """Run every check.

    Args:
        photos: All photos.
        alike: Rows of the photos that look like others, int64 [n].
        distances: Distances between the splits.
        distance_m: Largest distance in metres at which two photos show one place.
    """
    near = f"within {distance_m:g} m of a photo of another split"
    return (
        Section(
            "videos", "Videos in several splits", "Frames of one video differ by little more than noise.",
            "video has frames in several splits", "videos have frames in several splits", shared_videos(photos),
        ),
        Section(
            "places", f"Photos {near}", "Street, houses and often the very roadwork are the same.",
            f"photo lies {near}", f"photos lie {near}", near_places(distances, distance_m),
        ),
        Section(
            "copies", "The same file in several splits", "The answer was seen in training.",
            "file is in several splits", "files are in several splits", exact_copies(photos),
        ),
        Section(
            "look_alikes", "Look-alikes across splits",
            "Re-encoded or resized copies, or frames of a camera that stood still.",
            "set of look-alikes lies in two splits", "sets of look-alikes lie in two splits",
            look_alikes(photos, alike),
        ),
        Section(
            "label_conflicts", "The same picture with both labels",
            "No leak, but some of the labels are wrong, and bound what any model can reach.",
            "set of look-alikes has both labels", "sets of look-alikes have both labels",
            label_conflicts(photos, alike), leak=False,
        ),
    )  # fmt: skip


def link_look_alikes(photos: Photos, rows: np.ndarray) -> np.ndarray:
    """As few pairs of photos as connect all those that look the same, by their positions in `rows`.

    Args:
        photos: All photos.
        rows: Rows of the photos to compare, int64 [n].

    Returns:
        int64 [pairs, 2].
    """
    return np.concatenate([*near_duplicates(photos.hashes[rows], photos.thumbnails[rows])])


def photos_alike(photos: Photos, rows: np.ndarray) -> np.ndarray:
    """The rows among `rows` of photos that look like another one of them: int64 [n]."""
    return rows[np.unique(link_look_alikes(photos, rows))]


def shared_videos(photos: Photos) -> list[Finding]:
    """Videos with frames in several splits."""
    rows = np.array([row for row, record in enumerate(photos.records) if record.video is not None], dtype=np.int64)
    names = [photos.records[row].video for row in rows]
    groups = _across_splits(rows, names, photos)
    return [_across(group, str(photos.records[group[0]].video), photos) for group in groups]


def exact_copies(photos: Photos) -> list[Finding]:
    """Files that are in several splits, byte for byte."""
    rows = np.arange(len(photos.records))
    return [_across(group, "the same file", photos) for group in _across_splits(rows, photos.sha256, photos)]


def look_alikes(photos: Photos, alike: np.ndarray) -> list[Finding]:
    """For every two splits, sets of photos that look the same, lie in both splits and are not all one file.

    Args:
        photos: All photos.
        alike: Rows of the photos that look like others, int64 [n].
    """
    found = []
    for earlier, later in combinations(range(len(SPLITS)), 2):
        rows = alike[np.isin(photos.splits[alike], (earlier, later))]
        _, first, file = np.unique(photos.sha256[rows], return_index=True, return_inverse=True)
        links = link_look_alikes(photos, rows[first])
        # For each file, one photo in the earlier split and one in the later.
        homes = np.full((len(first), 2), -1)
        homes[file, (photos.splits[rows] == later).astype(np.int64)] = rows
        pairs = np.stack([homes[links, 0], homes[links[:, ::-1], 1]], axis=-1).reshape(-1, 2)
        pairs = pairs[(pairs >= 0).all(axis=1)]
        found += _closest(photos, rows, components(len(first), [links])[file], pairs, _census)
    return sorted(found, key=lambda finding: finding.hash_bits or 0)


def label_conflicts(photos: Photos, alike: np.ndarray) -> list[Finding]:
    """Sets of photos that look the same, some labelled roadwork and some not, in whatever splits.

    Args:
        photos: All photos.
        alike: Rows of the photos that look like others, int64 [n].
    """
    # Unlabelled copies are left out first: one of them between two others in a chain would hide that those disagree.
    rows = alike[photos.labels[alike] >= 0]
    links = link_look_alikes(photos, rows)
    pairs = rows[links]
    pairs = pairs[photos.labels[pairs[:, 0]] != photos.labels[pairs[:, 1]]]
    return _closest(photos, rows, components(len(rows), [links]), pairs, _label_census)


def nearest_distances(photos: Photos) -> list[Distances]:
    """Distances between every two splits that have photos with GPS."""
    known = ~np.isnan(photos.points[:, 0])
    rows = [np.flatnonzero(known & (photos.splits == number)) for number in range(len(SPLITS))]
    found = []
    for earlier, later in combinations(range(len(SPLITS)), 2):
        if not len(rows[earlier]) or not len(rows[later]):
            continue
        tree = BallTree(np.radians(photos.points[rows[earlier]]), metric="haversine")
        angles, nearest = tree.query(np.radians(photos.points[rows[later]]), k=1)
        metres = EARTH_RADIUS_M * angles[:, 0]
        found.append(Distances(SPLITS[later], SPLITS[earlier], rows[later], rows[earlier][nearest[:, 0]], metres))
    return found


def near_places(distances: Sequence[Distances], distance_m: float) -> list[Finding]:
    """Photos within `distance_m` of photos of an earlier split, each with the nearest of them, closest first."""
    closest: dict[int, tuple[float, int]] = {}
    for pair in distances:
        within = pair.metres <= distance_m
        for row, near, metres in zip(pair.rows[within], pair.nearest[within], pair.metres[within], strict=True):
            closest[int(row)] = min(closest.get(int(row), (np.inf, -1)), (float(metres), int(near)))
    found = sorted((metres, near, row) for row, (metres, near) in closest.items())
    return [Finding((near, row), f"{metres:.1f} m apart", round(metres, 2)) for metres, near, row in found]


def _closest(
    photos: Photos, rows: np.ndarray, component: np.ndarray, pairs: np.ndarray, census: Census
) -> list[Finding]:
    """A finding for each component that has pairs: the pair that differs least, and a count of the other photos.

    Args:
        photos: All photos.
        rows: Rows of the photos in components, int64 [n].
        component: Number of the component of each photo in `rows`, int64 [n].
        pairs: Pairs of photos that look the same and should not, int64 [pairs, 2].
        census: Counts the photos of a component.
    """
    number = np.full(len(photos.records), -1)
    number[rows] = component
    order = np.argsort(component, kind="stable")
    members = np.split(rows[order], np.flatnonzero(np.diff(component[order])) + 1)  # components count from 0
    bits = np.bitwise_count(photos.hashes[pairs[:, 0]] ^ photos.hashes[pairs[:, 1]])
    least_first = np.argsort(bits, kind="stable")
    _, first = np.unique(number[pairs[least_first, 0]], return_index=True)
    return [
        Finding(
            (int(pairs[i, 0]), int(pairs[i, 1])),
            f"{census(members[number[pairs[i, 0]]], photos)}; these two differ in {bits[i]} of 64 bits of the hash",
            hash_bits=int(bits[i]),
        )
        for i in least_first[np.sort(first)]
    ]


def _across_splits(rows: np.ndarray, values: Sequence[object] | np.ndarray, photos: Photos) -> Iterator[np.ndarray]:
    """Yield the rows of each value that occurs in several splits."""
    if not len(rows):
        return
    _, number = np.unique(np.asarray(values, dtype=object), return_inverse=True)
    order = np.argsort(number, kind="stable")
    for group in np.split(rows[order], np.flatnonzero(np.diff(number[order])) + 1):
        if len(np.unique(photos.splits[group])) > 1:
            yield group


def _across(group: np.ndarray, what: str, photos: Photos) -> Finding:
    """What some photos have in common, with one of them from each split."""
    _, first = np.unique(photos.splits[group], return_index=True)
    return Finding(tuple(int(row) for row in group[first]), f"{what}: {_census(group, photos)}")


def _census(group: np.ndarray, photos: Photos) -> str:
    """The number of photos by split, such as `12 in train, 3 in test`."""
    counts = np.bincount(photos.splits[group], minlength=len(SPLITS))
    return ", ".join(f"{count} in {name}" for name, count in zip(SPLITS, counts, strict=True) if count)


def _label_census(group: np.ndarray, photos: Photos) -> str:
    """The number of photos by label, such as `3 with roadwork, 1 without`."""
    with_roadwork = int((photos.labels[group] == 1).sum())
    return f"{with_roadwork} with roadwork, {len(group) - with_roadwork} without"
