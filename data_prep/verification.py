"""The command `verify`: are the shards still what the index says?"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from data_prep.parallel import Workers
from pipeline.data.dataset import PHOTO_EXTENSIONS
from pipeline.data.index import Sample, Shard, read_index
from pipeline.data.record import Record
from pipeline.errors import AuditFailed, require
from pipeline.files import write_summary
from pipeline.progress import say, track


@dataclass(frozen=True)
class Check:
    """One tar to be checked."""

    path: str
    expected: Shard
    samples: tuple[Sample, ...]


def verify(shards: Path, out: Path | None = None, workers: int = 0) -> Path:
    """Check every shard's size and hash, and every sample's record and photo, against the index.

    The exit status is 3 when something differs.

    Args:
        shards: Folder that `shard` made.
        out: Folder for summary.json; `verify` inside the shards' folder if not given.
        workers: Processes; 0 takes every core.
    """
    require(workers >= 0, "--workers", workers, "0 for every core, or the number of processes")
    start, index = time.monotonic(), read_index(shards)
    checks = []
    for split in index.splits.values():
        for number, expected in enumerate(split.shards):
            samples = tuple(sample for sample in split.samples if sample.shard == number)
            checks.append(Check(str(shards / expected.name), expected, samples))
    with Workers(workers) as pool:
        results = track(pool.map(check_shard, checks), len(checks), "verifying", unit="tars")
        problems = [problem for _, found in results for problem in found]
    summary = {
        "shards": len(checks),
        "samples": sum(len(check.samples) for check in checks),
        "bytes": sum(check.expected.bytes for check in checks),
        "problems": problems,
        "wall_s": round(time.monotonic() - start, 3),
    }
    path = write_summary(out or shards / "verify", summary)
    if problems:
        raise AuditFailed(f"{len(problems)} problems in {shards}, the first: {problems[0]}", path)
    say(f"{shards}: {summary['samples']} samples in {len(checks)} shards are what the index says")
    return path


def check_shard(check: Check) -> list[str]:
    """Every difference between a tar and its description, one sentence each."""
    path, name = Path(check.path), check.expected.name
    try:
        size = path.stat().st_size
        if size != check.expected.bytes:
            return [f"{name} is {size} bytes long, the index says {check.expected.bytes}"]
        with path.open("rb") as stream:
            problems = []
            if hashlib.file_digest(stream, "sha256").hexdigest() != check.expected.sha256:
                problems.append(f"{name} has another sha256 than the index says")
            if len(check.samples) != check.expected.samples:
                problems.append(f"{name} has {check.expected.samples} samples, the index lists {len(check.samples)}")
            for sample in check.samples:
                members = {}
                for extension, (offset, length) in sample.members.items():
                    stream.seek(offset)
                    members[extension] = stream.read(length)
                problems += [f"{name}, {sample.key}: {problem}" for problem in check_sample(sample, members)]
            return problems
    except OSError as error:
        return [f"{name} cannot be read: {error.strerror}"]


def check_sample(sample: Sample, members: dict[str, bytes]) -> list[str]:
    """Differences between a sample's members, its record and the index."""
    try:
        record = Record.from_json(json.loads(members["json"]))
    except (KeyError, TypeError, ValueError):
        return ["its record cannot be read"]
    photos = [members[extension] for extension in PHOTO_EXTENSIONS if extension in members]
    if len(photos) != 1:
        return [f"it has {len(photos)} photos"]
    problems = []
    if hashlib.sha256(photos[0]).hexdigest() != record.sha256:
        problems.append("the photo is not the one of its record")
    described = (record.key, record.label, record.group, record.gps_cluster, record.width, record.height)
    if described != (sample.key, sample.label, sample.group, sample.cluster, sample.width, sample.height):
        problems.append("its record and the index differ")
    return problems
