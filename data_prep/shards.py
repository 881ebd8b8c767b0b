"""The command `shard`: photos and metadata become WebDataset tars and the index that describes them.

Two passes. The first reads and decodes every photo and keeps a few facts of each (`intake`). From these,
splits, clusters, weights and the place of every sample are decided here. The second copies bytes (`writer`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.duplicates import near_duplicates
from data_prep.gps import assign_clusters, fit_centres, sample_weights
from data_prep.intake import Intake, Photo, take_in
from data_prep.parallel import Workers
from data_prep.sources import open_source
from data_prep.splits import Assignment, geographic_splits, keep_splits, link_groups
from data_prep.writer import Entry, ShardPlan, WrittenShard, building, publish, write_shard
from pipeline.data.index import INDEX_NAME, SPLITS, Cluster, Index, Sample, Shard, Split, read_index
from pipeline.data.record import Metadata, Record
from pipeline.errors import UserError, require
from pipeline.files import write_json, write_summary, write_text
from pipeline.progress import say, track

METADATA_FIELDS = tuple(Metadata.__dataclass_fields__)
SPOOL_NAME, SUMMARY_NAME = "spool", "summary.json"
TAR_BLOCK = 512


@dataclass(frozen=True)
class Arguments:
    """What decides the content of the shards, beside the source; it stands in the index."""

    splits: str
    val_share: float
    test_share: float
    distance_m: float
    clusters: int
    temper: float
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
class Plan:
    """What was decided for each photo, in the order of the photos."""

    assignment: Assignment
    groups: np.ndarray
    clusters: np.ndarray
    weights: np.ndarray
    centres: np.ndarray


def shard(
    source: Path,
    out: Path,
    *,
    metadata: Path | None = None,
    splits: Literal["geographic", "keep"] = "geographic",
    val_share: float = 0.15,
    test_share: float = 0.15,
    distance_m: float = 100.0,
    clusters: int = 0,
    temper: float = 0.5,
    shard_mb: float = 64.0,
    seed: int = 0,
    workers: int = 0,
    max_rejects: float | None = None,
) -> Path:
    """Turn photos and metadata into WebDataset tars with an index, ready for training.

    Args:
        source: Folder of photos, with or without a metadata table, or of a hub data set's Parquet files.
        out: Folder to make. It appears when all is done; if it has the same content already, it is kept.
        metadata: CSV, JSONL or Parquet table with a column file_name; if not given, metadata.* in the source.
        splits: geographic puts whole cities into one split, keep takes the splits that the source has.
        val_share: Share of the photos for validation; with keep, of the training photos if the source has no
            validation split (0 leaves it without).
        test_share: Share of the photos for the test; unused with keep.
        distance_m: Photos closer than this, in metres, stay in one split.
        clusters: GPS clusters for the sampling weights; 0 takes 12, or one for every 20 photos if less.
        temper: How far weights even out the clusters, from 0, not at all, to 1, completely.
        shard_mb: A tar is closed when it has grown to this many megabytes.
        seed: Of the splits, the clusters and the order of training samples.
        workers: Processes; 0 takes every core. The result is the same.
        max_rejects: Stop at more rejects than this: a share below 1, or a number. Unlimited if not given.
    """
    arguments = Arguments(splits, val_share, test_share, distance_m, clusters, temper, shard_mb, seed)
    require(workers >= 0, "--workers", workers, "0 for every core, or the number of processes")
    require(max_rejects is None or max_rejects >= 0, "--max_rejects", max_rejects, "0 or more")
    start, out = time.monotonic(), out.resolve()
    photos = open_source(source, metadata)
    finished, stamp = _finished(out, arguments), photos.stamp()
    if finished is not None and finished["source_stamp"] == stamp:
        say(f"{out} is finished already: the same source, the same arguments")
        return out / SUMMARY_NAME
    with building(out) as partial, Workers(workers, preload=(write_shard.__module__,)) as pool:
        intake = take_in(photos, partial / SPOOL_NAME, pool, max_rejects)
        if finished is not None:
            if finished["source_sha256"] != intake.sha256:
                raise UserError(
                    f"{out} holds shards of other photos than {source} has; choose another --out or remove it"
                )
            say(f"{out} is finished already: the same photos, the same arguments")
            return write_summary(out, {**finished, "source_stamp": stamp})
        plan = make_plan(intake.photos, arguments)
        index = _write_tars(partial, intake, plan, {**asdict(arguments), "source_kind": kind_of(source)}, pool)
        (partial / SPOOL_NAME).unlink()
        _write_rejects(partial / "rejects.jsonl", intake)
        summary = {
            **_summary(intake, plan, index),
            "source_stamp": stamp,
            "wall_s": round(time.monotonic() - start, 3),
            "images_per_s": round(intake.inputs / (time.monotonic() - start), 2),
        }
        write_summary(partial, summary)
        write_json(partial / INDEX_NAME, index.to_json())
        publish(partial, out)
    _tell(summary, out)
    return out / SUMMARY_NAME


def kind_of(source: Path) -> str:
    """What the photos are, as the summary of the command that made them says; else just photographs."""
    try:
        return str(json.loads((source / SUMMARY_NAME).read_text())["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return "photographs"


def make_plan(photos: list[Photo], arguments: Arguments) -> Plan:
    """Decide groups, splits, clusters and weights from the facts of all photos."""
    points = np.array([photo.parsed.metadata.gps or (np.nan, np.nan) for photo in photos])
    labels = np.array([-1 if photo.parsed.label is None else photo.parsed.label for photo in photos])
    hashes = np.array([photo.facts.phash for photo in photos], dtype=np.uint64)
    thumbnails = np.stack([np.frombuffer(photo.facts.thumbnail, dtype=np.uint8) for photo in photos])
    videos = [photo.parsed.video for photo in photos]
    groups = link_groups(points, videos, near_duplicates(hashes, thumbnails), arguments.distance_m)
    if arguments.splits == "keep":
        given = [photo.parsed.split for photo in photos]
        assignment = keep_splits(given, groups, labels, arguments.val_share, arguments.seed)
    else:
        val, test = arguments.val_share, arguments.test_share
        shares = np.array([1 - val - test, val, test])
        cities = [photo.parsed.metadata.city for photo in photos]
        assignment = geographic_splits(points, cities, groups, labels, shares=shares, seed=arguments.seed)
    train = assignment.splits == SPLITS.index("train")
    placed = train & ~np.isnan(points[:, 0])
    centres = fit_centres(points[placed], arguments.clusters, arguments.seed)
    clusters = assign_clusters(points, centres)
    weights = np.ones(len(photos))
    weights[train] = sample_weights(clusters[train], labels[train], arguments.temper)
    return Plan(assignment, groups, clusters, weights, centres)


def _finished(out: Path, arguments: Arguments) -> dict[str, Any] | None:
    """The summary of a finished `out`, or None if it can be made.

    Raises:
        UserError: It has other content, or tars are missing.
    """
    remedy = "choose another --out or remove it"
    if not all((out / name).is_file() for name in (INDEX_NAME, SUMMARY_NAME)):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and holds no finished shards; {remedy}")
        return None
    index = read_index(out)
    for name, value in asdict(arguments).items():
        if index.arguments.get(name) != value:
            made_with = index.arguments.get(name)
            raise UserError(f"{out} holds shards made with --{name} {made_with}, not {value}; {remedy}")
    for tar in (tar for split in index.splits.values() for tar in split.shards):
        path = out / tar.name
        if not path.is_file() or path.stat().st_size != tar.bytes:
            raise UserError(f"{out} is damaged, {tar.name} is missing or not {tar.bytes} bytes long; {remedy}")
    return json.loads((out / SUMMARY_NAME).read_text())


def _record(photo: Photo, row: int, plan: Plan) -> Record:
    short = hashlib.sha256(photo.name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return Record(
        key=f"{photo.number:08d}-{short}",
        label=photo.parsed.label,
        split=SPLITS[plan.assignment.splits[row]],
        source=photo.name,
        sha256=photo.facts.sha256,
        width=photo.facts.width,
        height=photo.facts.height,
        group=int(plan.groups[row]),
        video=photo.parsed.video,
        gps_cluster=int(plan.clusters[row]),
        sample_weight=round(float(plan.weights[row]), 6),
        metadata=photo.parsed.metadata,
    )


def _write_tars(folder: Path, intake: Intake, plan: Plan, arguments: dict[str, Any], pool: Workers) -> Index:
    """Lay the samples out in tars, write these, and describe them."""
    tars: list[tuple[str, ShardPlan]] = []
    for number, name in enumerate(SPLITS):
        rows = np.flatnonzero(plan.assignment.splits == number)
        if name == "train":
            # Readers that go through the tars in order see a mixture; other splits keep the source's order.
            rows = np.random.default_rng(arguments["seed"]).permutation(rows)
        entries = [_entry(intake.photos[row], row, plan) for row in rows.tolist()]
        for part, filled in enumerate(_fill(entries, arguments["shard_mb"] * 1e6)):
            tars.append((name, ShardPlan(str(folder / f"{name}-{part:05d}.tar"), tuple(filled))))
    written: dict[str, list[tuple[ShardPlan, WrittenShard]]] = {name: [] for name in SPLITS}
    results = track(pool.map(write_shard, [tar for _, tar in tars]), len(tars), "writing", unit="tars")
    for (name, _), result in zip(tars, results, strict=True):
        written[name].append(result)
    return Index(
        splits={name: _describe(tars_of) for name, tars_of in written.items()},
        clusters=_clusters(intake.photos, plan),
        fields={},
        arguments=arguments,
        version=version("roadwork"),
        source_sha256=intake.sha256,
        rejected=intake.rejected,
        unknown_words={field: dict(sorted(words.items())) for field, words in sorted(intake.unknown_words.items())},
    )


def _entry(photo: Photo, row: int, plan: Plan) -> tuple[int, Entry]:
    size = photo.facts.size_bytes + 4 * TAR_BLOCK  # with two headers, the record and padding
    return size, Entry(_record(photo, row, plan), photo.facts.extension, photo.location, photo.mask)


def _fill(entries: list[tuple[int, Entry]], limit: float) -> list[list[Entry]]:
    """Cut a list of sized entries into tars of about `limit` bytes."""
    tars: list[list[Entry]] = []
    room = 0.0
    for size, entry in entries:
        if room <= 0:
            tars.append([])
            room = limit
        tars[-1].append(entry)
        room -= size
    return tars


def _describe(tars: list[tuple[ShardPlan, WrittenShard]]) -> Split:
    shards, samples = [], []
    for number, (tar, written) in enumerate(tars):
        shards.append(Shard(Path(tar.path).name, written.bytes, written.sha256, len(tar.entries)))
        for entry, members in zip(tar.entries, written.members, strict=True):
            r = entry.record
            samples.append(
                Sample(
                    r.key,
                    number,
                    members,
                    r.label,
                    r.group,
                    r.gps_cluster,
                    r.sample_weight,
                    r.width,
                    r.height,
                )
            )
    return Split(tuple(shards), tuple(samples))


def _clusters(photos: list[Photo], plan: Plan) -> tuple[Cluster, ...]:
    labels = np.array([-1 if photo.parsed.label is None else photo.parsed.label for photo in photos])
    clusters = []
    for number in range(1 + len(plan.centres)):
        rows = plan.clusters == number
        served = np.unique(plan.assignment.splits[rows])
        centre = plan.centres[number - 1] if number else None
        clusters.append(
            Cluster(
                centre=None if centre is None else (float(centre[0]), float(centre[1])),
                split=SPLITS[served[0]] if len(served) == 1 else "mixed",
                samples=int(rows.sum()),
                roadwork=int((labels[rows] == 1).sum()),
                none=int((labels[rows] == 0).sum()),
            )
        )
    return tuple(clusters)


def _write_rejects(path: Path, intake: Intake) -> None:
    write_text(path, "".join(json.dumps(asdict(reject)) + "\n" for reject in intake.rejects))


def _summary(intake: Intake, plan: Plan, index: Index) -> dict[str, Any]:
    written = [photo.parsed.metadata for photo in intake.photos]
    splits = {}
    for number, name in enumerate(SPLITS):
        split, rows = index.splits[name], plan.assignment.splits == number
        labels = Counter(split.labels.tolist())
        splits[name] = {
            "samples": len(split.samples),
            "roadwork": labels[1],
            "none": labels[0],
            "unlabelled": labels[-1],
            "groups": len(np.unique(plan.groups[rows])),
            "shards": len(split.shards),
            "bytes": sum(tar.bytes for tar in split.shards),
        }
    return {
        "inputs": intake.inputs,
        "written": len(intake.photos),
        "rejected": intake.rejected,
        "splits": splits,
        "split_rule": plan.assignment.rule,
        "groups": int(plan.groups.max()) + 1,
        "straddling_groups": plan.assignment.straddling_groups,
        "clusters": [asdict(cluster) for cluster in index.clusters],
        "masks": sum(photo.mask is not None for photo in intake.photos),
        "null_rates": {
            name: round(sum(getattr(m, name) is None for m in written) / len(written), 4) for name in METADATA_FIELDS
        },
        "gps_dropped": dict(intake.gps_problems),
        "unknown_words": index.unknown_words,
        "source_sha256": intake.sha256,
    }


def _tell(summary: dict[str, Any], out: Path) -> None:
    splits = ", ".join(f"{name} {values['samples']}" for name, values in summary["splits"].items())
    rejected = sum(summary["rejected"].values())
    counts = f"{summary['written']} of {summary['inputs']} photos written"
    say(f"{out}: {counts}, {splits}, by {summary['split_rule']}")
    if rejected:
        reasons = ", ".join(f"{count} {kind}" for kind, count in summary["rejected"].items())
        say(f"{rejected} rejected, listed in rejects.jsonl: {reasons}")
    if summary["straddling_groups"]:
        say(f"{summary['straddling_groups']} groups of near-duplicates lie in several of the source's splits")
