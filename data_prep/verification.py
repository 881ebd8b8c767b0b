"""The command `verify`: are the shards still what the index says?"""

from __future__ import annotations

import hashlib
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from data_prep.inspection import check_mask
from data_prep.parallel import Workers
from pipeline.data.index import Sample, Shard, read_index
from pipeline.data.integrity import Damage, check_layout, check_sample
from pipeline.data.photo import BadPhoto
from pipeline.data.storage import explained, is_url, open_folder
from pipeline.errors import AuditFailed, UserError, require
from pipeline.files import write_summary
from pipeline.progress import say, track

READ_BYTES = 2**20


@dataclass(frozen=True)
class Check:
    """One tar to be checked."""

    place: str
    split: str
    expected: Shard
    samples: tuple[Sample, ...]


def verify(shards: str, out: Path | None = None, workers: int = 0) -> Path:
    """Check every byte of every shard: its hash, each member, each record and photo, against the index.

    The exit status is 3 when something differs.

    Args:
        shards: Folder that `shard` made, or its URL.
        out: Folder for summary.json; `verify` inside the shards' folder if not given.
        workers: Processes; 0 takes every core.
    """
    require(workers >= 0, "--workers", workers, "0 for every core, or the number of processes")
    require(out is not None or not is_url(shards), "--out", out, "a folder of this machine when the shards are not")
    start, index = time.monotonic(), read_index(shards)
    checks = []
    for name, split in index.splits.items():
        samples: list[list[Sample]] = [[] for _ in split.shards]
        for sample in split.samples:
            samples[sample.shard].append(sample)
        checks += [Check(str(shards), name, *pair) for pair in zip(split.shards, map(tuple, samples), strict=True)]
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
    path = write_summary(out or Path(shards) / "verify", summary)
    if problems:
        raise AuditFailed(f"{len(problems)} problems in {shards}, the first: {problems[0]}", path)
    say(f"{shards}: {summary['samples']} samples in {len(checks)} shards are what the index says")
    return path


def check_shard(check: Check) -> list[str]:
    """Every difference between a tar and its description, one sentence each."""
    name, folder = check.expected.name, open_folder(check.place)
    try:
        size = folder.size(name)
        if size != check.expected.bytes:
            return [f"{name} is {size} bytes long, the index says {check.expected.bytes}"]
        with explained(check.place), folder.stream(name) as stream:
            hashed = Hashed(stream)
            problems = [f"{name}{problem}" for problem in Scan(check).problems(hashed)]
            if hashed.finish() != check.expected.sha256:
                problems.insert(0, f"{name} has another sha256 than the index says")
    except FileNotFoundError:
        return [f"{name} is missing"]
    except UserError as error:
        return [f"{name}: {error}"]
    return problems


class Hashed:
    """A stream that is hashed while it is read."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._sha256 = stream, hashlib.sha256()

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data = self._stream.read(size)
        self._sha256.update(data)
        return data

    def finish(self) -> str:
        """Read what is left; the SHA-256 of everything, in hexadecimal."""
        while self.read(READ_BYTES):
            pass
        return self._sha256.hexdigest()


class Scan:
    """One pass over a tar, member by member; what is wrong is said about the shard, its sample or its member."""

    def __init__(self, check: Check):
        self.check = check
        self.awaited = {f"{s.key}.{extension}": (s, extension) for s in check.samples for extension in s.members}
        self.seen: set[str] = set()
        self.parts: dict[str, dict[str, bytes]] = {}
        """Key to members, of samples that are not complete yet."""

    def problems(self, stream: Hashed) -> Iterator[str]:
        """Read a tar to its end."""
        try:
            check_layout(self.check.expected, self.check.samples)
        except Damage as damage:
            yield f": {damage}"
        try:
            with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|", bufsize=READ_BYTES) as tar:
                for member in tar:
                    yield from self._member(tar, member)
        except tarfile.TarError as error:
            yield f" is no readable tar behind its first {len(self.seen)} members ({error})"
        for name, (sample, _) in self.awaited.items():
            if name not in self.seen:
                yield f", {sample.key}: {name} is missing"

    def _member(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[str]:
        if member.name not in self.awaited:
            yield f" holds {member.name!r}, which the index does not name"
            return
        sample, extension = self.awaited[member.name]
        about = f", {sample.key}: {member.name}"
        if member.name in self.seen:
            yield f"{about} is there twice"
            return
        self.seen.add(member.name)
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield f"{about} is not a file, but a link, a folder or a device"
            return
        if (member.offset_data, member.size) != sample.members[extension]:
            yield f"{about} is {member.size} bytes at {member.offset_data}, the index says otherwise"
            return
        data = tar.extractfile(member)
        assert data is not None  # it is a regular file
        parts = self.parts.setdefault(sample.key, {})
        parts[extension] = data.read()
        if len(parts) == len(sample.members):
            yield from self._sample(sample, self.parts.pop(sample.key))

    def _sample(self, sample: Sample, members: dict[str, bytes]) -> Iterator[str]:
        try:
            check_sample(sample, self.check.split, members)
            if "mask.png" in members:
                check_mask(members["mask.png"])
        except (Damage, BadPhoto) as problem:
            yield f", {sample.key}: {problem}"
