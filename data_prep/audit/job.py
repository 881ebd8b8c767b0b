"""How the command `audit` works: read, check, write, and say what was found."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.audit.checks import Distances, Finding, Section, make_sections, nearest_distances, photos_alike
from data_prep.audit.page import write_page
from data_prep.audit.photos import Photos, read_photos
from data_prep.decisions.association import METADATA_FIELDS, associate, columns_of, count_labels
from data_prep.decisions.maps import draw_map
from data_prep.work.workplace import MAP_NAME, report_folder
from pipeline.data.index import SPLITS, Field, Index, read_index
from pipeline.data.storage import is_url, open_folder
from pipeline.errors import AuditFailed, UserError
from pipeline.files import write_summary, write_text
from pipeline.progress import say

EXAMPLES = 20  # of each kind in the summary; findings.jsonl has all
QUANTILES = {"min_m": 0.0, "p1_m": 0.01, "p5_m": 0.05, "p25_m": 0.25, "median_m": 0.5}


def audit_shards(shards: str, out: Path | None, distance_m: float, accept: Sequence[str], workers: int) -> Path:
    """Audit shards and write the report; see the command `audit` for the arguments."""
    shards = open_folder(shards).place
    start, index = time.monotonic(), read_index(shards)
    unknown = sorted(set(accept) - {*METADATA_FIELDS, *index.fields})
    if unknown:
        raise UserError(f"--accept {unknown[0]!r} is no field of these shards; there are {', '.join(METADATA_FIELDS)}")
    out, name = report_folder(shards, out, "audit"), _name_of(shards)
    photos = read_photos(shards, index, workers)
    alike = photos_alike(photos, np.arange(len(photos.records)))
    distances = nearest_distances(photos)
    sections = make_sections(photos, alike, distances, distance_m)
    fields = describe_fields(photos, index, accept)
    summary = {
        "data": index.arguments.get("source_kind", name),
        "source_sha256": index.source_sha256,
        "samples": len(photos.records),
        "distance_m": distance_m,
        "leaks": leaks_of(sections, fields),
        "splits": describe_splits(photos, alike),
        "clusters": describe_clusters(photos, index),
        "fields": fields,
        "distances": [_describe_distances(pair, distance_m) for pair in distances],
        **{
            s.name: {"count": len(s.findings), "examples": [to_json(f, photos) for f in s.findings[:EXAMPLES]]}
            for s in sections
        },
        "rejected": index.rejected,
        "unknown_words": index.unknown_words,
    }
    centres = np.array([cluster.centre for cluster in index.clusters if cluster.centre is not None]).reshape(-1, 2)
    draw_map(out / MAP_NAME, photos.points, photos.splits, photos.clusters, photos.weights, centres)
    write_page(out, name, summary, sections, photos, distances)
    _write_findings(out / "findings.jsonl", sections, photos)
    spent = time.monotonic() - start
    speed = {"wall_s": round(spent, 3), "images_per_s": round(len(photos.records) / spent, 2)}
    path = write_summary(out, {**summary, **speed})
    if summary["leaks"]:
        raise AuditFailed("; ".join(summary["leaks"]), path)
    say(f"{shards}: no leak in {len(photos.records)} photos")
    return path


def leaks_of(sections: Sequence[Section], fields: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for each leak, without a full stop."""
    found = [section.sentence for section in sections if section.leak and section.findings]
    return found + [
        f"the field {name} tells the label: {field['leaks']}"
        for name, field in fields.items()
        if field["leaks"] and field["in_shards"] and not field["accepted"]
    ]


def describe_fields(photos: Photos, index: Index, accept: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The association of each metadata field with the label.

    Fields of the records are measured anew; fields that only the source has are taken from the index. The latter are
    named where they leak, but no model can read them.
    """
    values = columns_of([record.metadata for record in photos.records])
    measured: dict[str, Field] = {**index.fields, **associate(values, photos.labels)}
    return {
        name: {
            **asdict(field),
            "in_shards": name in values,
            "accepted": name in accept,
            "null_rates": {
                split: round(float(np.mean([values[name][row] is None for row in rows])), 4)
                for split, rows in _rows_by_split(photos).items()
                if name in values and len(rows)
            },
        }
        for name, field in measured.items()
    }


def describe_splits(photos: Photos, alike: np.ndarray) -> dict[str, dict[str, Any]]:
    """Size, class balance and repetition of each split.

    Args:
        photos: All photos.
        alike: Rows of the photos that look like others, in any split, int64 [n].
    """
    described = {}
    for number, (name, rows) in enumerate(_rows_by_split(photos).items()):
        counts = count_labels(photos.labels[rows])
        labelled = counts["roadwork"] + counts["none"]
        records = [photos.records[row] for row in rows]
        described[name] = {
            "samples": len(rows),
            **counts,
            "roadwork_share": round(counts["roadwork"] / labelled, 4) if labelled else None,
            "groups": len({record.group for record in records}),
            "videos": len({record.video for record in records} - {None}),
            "cities": len({record.metadata.city for record in records} - {None}),
            "clusters": len(np.unique(photos.clusters[rows])),
            "look_alikes": len(photos_alike(photos, alike[photos.splits[alike] == number])),
        }
    return described


def describe_clusters(photos: Photos, index: Index) -> list[dict[str, Any]]:
    """The photos of each GPS cluster by split, its class balance, and the mean weight of its training photos."""
    described = []
    for number, cluster in enumerate(index.clusters):
        rows = np.flatnonzero(photos.clusters == number)
        counts = np.bincount(photos.splits[rows], minlength=len(SPLITS))
        trained = rows[photos.splits[rows] == SPLITS.index("train")]
        described.append(
            {
                "cluster": number,
                "centre": cluster.centre,
                "samples": {name: int(count) for name, count in zip(SPLITS, counts, strict=True)},
                "roadwork": int((photos.labels[rows] == 1).sum()),
                "none": int((photos.labels[rows] == 0).sum()),
                "mean_weight": round(float(photos.weights[trained].mean()), 4) if len(trained) else None,
            }
        )
    return described


def _describe_distances(pair: Distances, distance_m: float) -> dict[str, Any]:
    quantiles = {name: round(float(np.quantile(pair.metres, q)), 2) for name, q in QUANTILES.items()}
    within = int((pair.metres <= distance_m).sum())
    return {"from": pair.later, "to": pair.earlier, "photos": len(pair.rows), "within": within, **quantiles}


def _name_of(shards: str) -> str:
    """The last part of a path or URL; for the current folder its name instead of `.`."""
    return shards.rpartition("/")[2] if is_url(shards) else Path(shards).resolve().name


def _rows_by_split(photos: Photos) -> dict[str, np.ndarray]:
    return {name: np.flatnonzero(photos.splits == number) for number, name in enumerate(SPLITS)}


def to_json(finding: Finding, photos: Photos) -> dict[str, Any]:
    """A finding as JSON, with what identifies its photos in the shards and in the source."""
    records = [photos.records[row] for row in finding.rows]
    names = ("key", "split", "source", "label")
    described = [{name: getattr(record, name) for name in names} for record in records]
    measured = {"distance_m": finding.distance_m, "hash_bits": finding.hash_bits}
    return {"note": finding.note, **measured, "photos": described}


def _write_findings(path: Path, sections: Sequence[Section], photos: Photos) -> None:
    lines = ({"kind": s.name, **to_json(finding, photos)} for s in sections for finding in s.findings)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
