"""What is decided once about all photos: groups, splits, clusters, weights, and which tar each one goes to.

A plan lies on the disk, as a header and one file for each tar, so that any process on any machine that sees the
folder can write a tar, and so that a run that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.decisions.association import associate
from data_prep.decisions.duplicates import near_duplicates
from data_prep.decisions.gps import assign_clusters, fit_centres, sample_weights, target_shares
from data_prep.decisions.splits import Assignment, geographic_splits, keep_splits, link_groups, random_splits
from data_prep.shards.intake import Intake, Photo
from data_prep.sources import content_to_json
from data_prep.work.workplace import HEADER_NAME
from pipeline.data.index import SPLITS, Cluster, Field
from pipeline.data.record import Metadata, Record
from pipeline.errors import require
from pipeline.files import write_bytes, write_json

if TYPE_CHECKING:
    from data_prep.photos.text import TextVectors

TARS_FOLDER = "plan"
TAR_BLOCK = 512
METADATA_FIELDS = tuple(Metadata.__dataclass_fields__)


@dataclass(frozen=True)
class Arguments:
    """What decides the content of the shards, beside the source; it stands in the index."""

    splits: str
    val_share: float
    test_share: float
    distance_m: float
    clusters: int
    temper: float
    target_gps: str
    """SHA-256 of the file with the places of the deployment; empty without one."""
    text_encoder: str
    check: str
    shard_mb: float
    seed: int

    def __post_init__(self) -> None:
        require(0 <= self.val_share < 1, "--val_share", self.val_share, "at least 0 and below 1")
        require(0 <= self.test_share < 1, "--test_share", self.test_share, "at least 0 and below 1")
        both = self.val_share + self.test_share
        require(both < 1, "--val_share + --test_share", both, "below 1, or nothing is left for training")
        require(self.distance_m >= 0, "--distance_m", self.distance_m, "0 or more metres")
        require(self.clusters >= 0, "--clusters", self.clusters, "0 for automatic, or the number of clusters")
        require(0 <= self.temper <= 1, "--temper", self.temper, "between 0 and 1")
        require(self.shard_mb > 0, "--shard_mb", self.shard_mb, "above 0")
        require(self.seed >= 0, "--seed", self.seed, "0 or more")


@dataclass(frozen=True)
class Decisions:
    """What was decided for each photo, in the order of the photos."""

    assignment: Assignment
    points: np.ndarray
    """Degrees, [N, 2], NaN where the GPS is NULL."""
    labels: np.ndarray
    """0, 1 or -1 for unknown, [N]."""
    groups: np.ndarray
    clusters: np.ndarray
    weights: np.ndarray
    centres: np.ndarray
    far_share: float | None
    """Of the deployment's places, those far from every cluster."""


@dataclass(frozen=True)
class PlannedTar:
    """A tar to be written."""

    name: str
    split: str
    samples: int
    bytes: int
    """About; the header of a plan is written before the tar."""


def decide(photos: list[Photo], arguments: Arguments, target: np.ndarray | None = None) -> Decisions:
    """Groups, splits, clusters and weights from the facts of all photos.

    Args:
        photos: In the source's order.
        arguments: See there.
        target: Places of the deployment in degrees, [M, 2]; None gives every cluster the same target share.
    """
    points = np.array([photo.parsed.metadata.gps or (np.nan, np.nan) for photo in photos])
    labels = np.array([-1 if photo.parsed.label is None else photo.parsed.label for photo in photos])
    videos = [photo.parsed.video for photo in photos]
    groups = link_groups(points, videos, _look_alikes(photos), arguments.distance_m)
    assignment = _assign(photos, points, labels, groups, arguments)
    train = assignment.splits == SPLITS.index("train")
    placed = train & ~np.isnan(points[:, 0])
    centres = fit_centres(points[placed], arguments.clusters, arguments.seed)
    clusters = assign_clusters(points, centres)
    shares, far_share = None, None
    if target is not None:
        shares, far_share = target_shares(target, centres, clusters[train])
    weights = np.ones(len(photos))
    weights[train] = sample_weights(clusters[train], labels[train], arguments.temper, shares)
    return Decisions(assignment, points, labels, groups, clusters, weights, centres, far_share)


def _look_alikes(photos: list[Photo]) -> Iterable[np.ndarray]:
    """Pairs of photos that show the same picture, int64 [pairs, 2] each; none where only headers were read."""
    if any(photo.facts.phash is None for photo in photos):
        return ()
    hashes = np.array([photo.facts.phash for photo in photos], dtype=np.uint64)
    thumbnails = np.stack([np.frombuffer(photo.facts.thumbnail, dtype=np.uint8) for photo in photos])
    return near_duplicates(hashes, thumbnails)


def _assign(
    photos: list[Photo], points: np.ndarray, labels: np.ndarray, groups: np.ndarray, arguments: Arguments
) -> Assignment:
    if arguments.splits == "keep":
        given = [photo.parsed.split for photo in photos]
        return keep_splits(given, groups, labels, arguments.val_share, arguments.seed)
    val, test = arguments.val_share, arguments.test_share
    shares = np.array([1 - val - test, val, test])
    if arguments.splits == "random":
        return random_splits(groups, labels, shares=shares, seed=arguments.seed)
    cities = [photo.parsed.metadata.city for photo in photos]
    return geographic_splits(points, cities, groups, labels, shares=shares, seed=arguments.seed)


def write_plan(
    folder: Path, intake: Intake, decisions: Decisions, texts: TextVectors | None, header: dict[str, Any]
) -> dict[str, Any]:
    """Lay the samples out in tars and put the plan on the disk, its header last.

    Args:
        folder: To write into.
        intake: The photos.
        decisions: About them.
        texts: Embeddings of their descriptions, if wanted.
        header: What the caller adds to it; `arguments` among it.

    Returns:
        The header, as `read_plan` gives it.
    """
    tars = []
    arguments = header["arguments"]
    for number, split in enumerate(SPLITS):
        rows = np.flatnonzero(decisions.assignment.splits == number)
        if split == "train":
            # Readers that go through the tars in order see a mixture; other splits keep the source's order.
            rows = np.random.default_rng(arguments["seed"]).permutation(rows)
        for part, filled in enumerate(_fill(intake.photos, rows.tolist(), arguments["shard_mb"] * 1e6)):
            name = f"{split}-{part:05d}"
            entries = [_entry(intake.photos[row], row, decisions, texts) for row in filled]
            write_bytes(folder / TARS_FOLDER / f"{name}.json", json.dumps(entries).encode())
            size = sum(_size(intake.photos[row]) for row in filled)
            tars.append(asdict(PlannedTar(f"{name}.tar", split, len(filled), size)))
    whole = {
        **header,
        "tars": tars,
        "clusters": [asdict(cluster) for cluster in _clusters(decisions)],
        "fields": {name: asdict(field) for name, field in _fields(intake.photos, decisions.labels).items()},
        "source_sha256": intake.sha256,
        "rejected": intake.rejected,
        "unknown_words": {f: dict(sorted(words.items())) for f, words in sorted(intake.unknown_words.items())},
        "summary": _summary(intake, decisions),
    }
    write_json(folder / HEADER_NAME, whole)
    return read_plan(folder)


def read_plan(folder: Path) -> dict[str, Any]:
    """The header of the plan in a folder. Raises OSError or ValueError where there is none."""
    return json.loads((folder / HEADER_NAME).read_text())


def tars_of(plan: dict[str, Any]) -> list[PlannedTar]:
    """The tars of a plan, in order."""
    return [PlannedTar(**tar) for tar in plan["tars"]]


def _entry(photo: Photo, row: int, decisions: Decisions, texts: TextVectors | None) -> dict[str, Any]:
    """What the writer of a tar needs to know about one sample."""
    return {
        "record": _record(photo, row, decisions, texts).to_json(),
        "extension": photo.facts.extension,
        "photo": content_to_json(photo.location),
        "status": photo.status,
        "mask": None if photo.mask is None else content_to_json(photo.mask),
        "mask_sha256": photo.facts.mask_sha256,
    }


def _record(photo: Photo, row: int, decisions: Decisions, texts: TextVectors | None) -> Record:
    short = hashlib.sha256(photo.name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return Record(
        key=f"{photo.number:08d}-{short}",
        label=photo.parsed.label,
        split=SPLITS[decisions.assignment.splits[row]],
        source=photo.name,
        sha256=photo.facts.sha256,
        width=photo.facts.width,
        height=photo.facts.height,
        group=int(decisions.groups[row]),
        gps_cluster=int(decisions.clusters[row]),
        sample_weight=round(float(decisions.weights[row]), 6),
        video=photo.parsed.video,
        metadata=photo.parsed.metadata,
        text_vector=None if texts is None else texts.vectors[row],
    )


def _size(photo: Photo) -> int:
    return photo.facts.size_bytes + 4 * TAR_BLOCK  # with two headers, the record and padding


def _fill(photos: list[Photo], rows: list[int], limit: float) -> list[list[int]]:
    """Cut rows into tars of about `limit` bytes."""
    tars: list[list[int]] = []
    room = 0.0
    for row in rows:
        if room <= 0:
            tars.append([])
            room = limit
        tars[-1].append(row)
        room -= _size(photos[row])
    return tars


def _clusters(decisions: Decisions) -> list[Cluster]:
    clusters = []
    for number in range(1 + len(decisions.centres)):
        rows = decisions.clusters == number
        served = np.unique(decisions.assignment.splits[rows])
        centre = decisions.centres[number - 1] if number else None
        clusters.append(
            Cluster(
                centre=None if centre is None else (float(centre[0]), float(centre[1])),
                split=SPLITS[served[0]] if len(served) == 1 else "mixed",
                samples=int(rows.sum()),
                roadwork=int((decisions.labels[rows] == 1).sum()),
                none=int((decisions.labels[rows] == 0).sum()),
            )
        )
    return clusters


def _fields(photos: list[Photo], labels: np.ndarray) -> dict[str, Field]:
    values = {name: [getattr(photo.parsed.metadata, name) for photo in photos] for name in METADATA_FIELDS}
    values["travel_alteration"] = [photo.parsed.travel_alteration for photo in photos]
    return associate(values, labels)


def _summary(intake: Intake, decisions: Decisions) -> dict[str, Any]:
    splits = {}
    for number, name in enumerate(SPLITS):
        rows = decisions.assignment.splits == number
        labels = Counter(decisions.labels[rows].tolist())
        splits[name] = {
            "samples": int(rows.sum()),
            "roadwork": labels[1],
            "none": labels[0],
            "unlabelled": labels[-1],
            "groups": len(np.unique(decisions.groups[rows])),
        }
    return {
        "inputs": intake.inputs,
        "written": len(intake.photos),
        "rejected": intake.rejected,
        "splits": splits,
        "split_rule": decisions.assignment.rule,
        "groups": int(decisions.groups.max()) + 1,
        "straddling_groups": decisions.assignment.straddling_groups,
        "masks": sum(photo.mask is not None for photo in intake.photos),
        "gps_dropped": dict(intake.gps_problems),
        "target_far_share": decisions.far_share,
    }
