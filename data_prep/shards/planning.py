"""The decisions about all photos, made once: groups, splits, clusters, weights, and the tar of each photo."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.decisions.association import associate, columns_of, count_labels
from data_prep.decisions.duplicates import near_duplicates
from data_prep.decisions.gps import assign_clusters, fit_centres, target_shares
from data_prep.decisions.splits import Assignment, geographic_splits, keep_splits, link_groups, random_splits
from data_prep.shards.intake import Intake, Photo
from data_prep.shards.options import Arguments
from data_prep.shards.plan import Plan, PlannedTar, Wanted, entries_path
from data_prep.sources.content import content_to_json
from data_prep.work.workplace import HEADER_NAME
from pipeline.data.index import SPLITS, Cluster, Field
from pipeline.data.record import Record
from pipeline.data.weights import sample_weights
from pipeline.files import write_json, write_text

if TYPE_CHECKING:
    from data_prep.photos.text import TextVectors


@dataclass(frozen=True)
class Decisions:
    """What was decided for each photo, in the order of the photos."""

    assignment: Assignment
    points: np.ndarray
    """Latitude and longitude in degrees, [N, 2], NaN where the GPS is NULL."""
    labels: np.ndarray
    """0, 1 or -1 for unknown, [N]."""
    groups: np.ndarray
    clusters: np.ndarray
    weights: np.ndarray
    centres: np.ndarray
    far_share: float | None
    """Share of the deployment's places that are far from every cluster."""


def decide(photos: list[Photo], arguments: Arguments, target: np.ndarray | None = None) -> Decisions:
    """Decide groups, splits, clusters and weights from the facts of all photos.

    Args:
        photos: All photos, in the source's order.
        arguments: How to split, cluster and weigh.
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
    weights[train] = sample_weights(clusters[train], labels[train], arguments.temper, shares, arguments.balance)
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
    folder: Path, wanted: Wanted, source_kind: str, intake: Intake, decisions: Decisions, texts: TextVectors | None
) -> Plan:
    """Distribute the samples over tars, and write the plan to the disk, its header last.

    Args:
        folder: Folder to write into.
        wanted: What the run is asked for.
        source_kind: What the photos are, for reports.
        intake: The photos.
        decisions: The decisions about the photos.
        texts: Embeddings of the photos' descriptions, if wanted.
    """
    tars = []
    for number, split in enumerate(SPLITS):
        rows = np.flatnonzero(decisions.assignment.splits == number)
        if split == "train":
            # Readers that go through the tars in order see a mixture; other splits keep the source's order.
            rows = np.random.default_rng(wanted.arguments.seed).permutation(rows)
        for part, filled in enumerate(_fill(intake.photos, rows.tolist(), wanted.arguments.shard_mb * 1e6)):
            name = f"{split}-{part:05d}.tar"
            entries = [_entry(intake.photos[row], row, decisions, texts) for row in filled]
            write_text(entries_path(folder, name), json.dumps(entries))
            tars.append(PlannedTar(name, split, len(filled), sum(_size(intake.photos[row]) for row in filled)))
    plan = Plan(
        **vars(wanted),
        text_dim=0 if texts is None else texts.dim,
        source_kind=source_kind,
        tars=tuple(tars),
        clusters=tuple(_clusters(decisions)),
        fields=_fields(intake.photos, decisions.labels),
        source_sha256=intake.sha256,
        rejected=intake.rejected,
        unknown_words={f: dict(sorted(words.items())) for f, words in sorted(intake.unknown_words.items())},
        summary=_summary(intake, decisions),
    )
    write_json(folder / HEADER_NAME, plan.to_json())
    return plan


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
    seen = {name: getattr(photo.facts, name) for name in ("sha256", "width", "height")}
    told = {name: getattr(photo.parsed, name) for name in ("label", "video", "metadata")}
    return Record(
        key=f"{photo.number:08d}-{short}",
        split=SPLITS[decisions.assignment.splits[row]],
        source=photo.name,
        group=int(decisions.groups[row]),
        gps_cluster=int(decisions.clusters[row]),
        sample_weight=round(float(decisions.weights[row]), 6),
        text_vector=None if texts is None else texts[row],
        mask_sha256=photo.facts.mask_sha256,
        **seen,
        **told,
    )


def _size(photo: Photo) -> int:
    return photo.facts.size_bytes + 4 * tarfile.BLOCKSIZE  # with two headers, the record and padding


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
    for number, centre in enumerate([None, *map(tuple, decisions.centres.tolist())]):
        rows = decisions.clusters == number
        served, counts = np.unique(decisions.assignment.splits[rows]), count_labels(decisions.labels[rows])
        split = SPLITS[served[0]] if len(served) == 1 else "mixed"
        clusters.append(Cluster(centre, split, int(rows.sum()), counts["roadwork"], counts["none"]))
    return clusters


def _fields(photos: list[Photo], labels: np.ndarray) -> dict[str, Field]:
    values = columns_of([photo.parsed.metadata for photo in photos])
    return associate({**values, "travel_alteration": [photo.parsed.travel_alteration for photo in photos]}, labels)


def _summary(intake: Intake, decisions: Decisions) -> dict[str, Any]:
    splits = {}
    for number, name in enumerate(SPLITS):
        rows = decisions.assignment.splits == number
        splits[name] = {
            "samples": int(rows.sum()),
            **count_labels(decisions.labels[rows]),
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
        "gps_dropped": dict(intake.gps.problems),
        "target_far_share": decisions.far_share,
    }
