"""The command `audit`: what is wrong with a set of shards, and what leaks between its splits."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import require


def audit(
    shards: str,
    out: Path | None = None,
    *,
    distance_m: float = 100.0,
    accept: list[str] = [],  # noqa: B006  (a list is what gives the flag several words)
    workers: int = 0,
) -> Path:
    """Look for what leaks between the splits of shards, and for metadata that gives the label away.

    Every photo is decoded and compared anew. The exit status is 3 when there is a leak: a video in several splits,
    photos of two splits near each other, copies or look-alikes across splits, or a field that tells the label.

    Args:
        shards: Folder of shards, or its URL.
        out: Folder for audit.html, map.png, findings.jsonl and summary.json; `audit` inside the shards' folder if
            not given.
        distance_m: Photos of two splits that are this close, in metres, are a leak.
        accept: Metadata fields that may tell the label without being counted as leaks, such as description in the NATIX
            set.
        workers: Processes; 0 takes every core.
    """
    require(distance_m >= 0, "--distance_m", distance_m, "0 or more metres")
    require(workers >= 0, "--workers", workers, "0 for every core, or the number of processes")
    from data_prep.audit.job import audit_shards  # scipy and scikit-learn: seconds that --help does not wait for

    return audit_shards(shards, out, distance_m, accept, workers)
