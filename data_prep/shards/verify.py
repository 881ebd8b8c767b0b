"""The command `verify`: are the shards still what the index says?"""

from __future__ import annotations

import hashlib
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_prep.photos.inspection import check_mask
from data_prep.work.parallel import Workers
from data_prep.work.workplace import report_folder
from pipeline.data.index import Sample, Shard, read_index
from pipeline.data.integrity import MOST_TAIL_BYTES, Damage, check_layout, check_sample, check_tail
from pipeline.data.photo import BadPhoto
from pipeline.data.storage import explained, open_folder
from pipeline.errors import AuditFailed, require
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
        shards: Folder of shards, or its URL.
        out: Folder for summary.json; `verify` inside the shards' folder if not given.
        workers: Processes; 0 takes every core.
    """
    require(workers >= 0, "--workers", workers, "0 for every core, or the number of processes")
    shards = open_folder(shards).place
    start, index = time.monotonic(), read_index(shards)
    out = report_folder(shards, out, "verify")
    checks = []
    for name, split in index.splits.items():
        samples: list[list[Sample]] = [[] for _ in split.shards]
        for sample in split.samples:
            samples[sample.shard].append(sample)
        checks += [Check(shards, name, *pair) for pair in zip(split.shards, map(tuple, samples), strict=True)]
    with Workers(workers, preload=(__name__,)) as pool:
        results = track(pool.map(check_shard, checks), len(checks), "verifying", unit="tars")
        problems = [problem for _, found in results for problem in found]
    summary = {
        "shards": len(checks),
        "samples": sum(len(check.samples) for check in checks),
        "bytes": sum(check.expected.bytes for check in checks),
        "problems": problems,
        "wall_s": round(time.monotonic() - start, 3),
    }
    path = write_summary(out, summary)
    if problems:
        raise AuditFailed(f"{len(problems)} problems in {shards}, the first: {problems[0]}", path)
    say(f"{shards}: {summary['samples']} samples in {len(checks)} shards are what the index says")
    return path


def check_shard(check: Check) -> list[str]:
    """Every difference between a tar and its description, one sentence each.

    Raises:
        UserError: The tar is there but cannot be read, for want of rights or since its store does not answer.
    """
    name, folder = check.expected.name, open_folder(check.place)
    try:
        size = folder.size(name)
        if size != check.expected.bytes:
            return [f"{name} is {size} bytes long, the index says {check.expected.bytes}"]
        with folder.stream(name) as stream:
            hashed = Hashed(stream, check.place)
            problems = [f"{name}{problem}" for problem in Scan(check).problems(hashed)]
            if hashed.finish() != check.expected.sha256:
                problems.insert(0, f"{name} has another sha256 than the index says")
    except FileNotFoundError:
        return [f"{name} is missing"]
    return problems


class Hashed:
    """A stream that is hashed while it is read."""

    def __init__(self, stream: BinaryIO, place: str):
        """Start to hash a stream.

        Args:
            stream: A file, open at its beginning.
            place: The file's folder or URL, for messages.
        """
        self._stream, self._place, self._sha256 = stream, place, hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Read the next bytes. Raises UserError and FileNotFoundError, as folders do."""
        with explained(self._place):
            data = self._stream.read(size)
        self._sha256.update(data)
        return data

    def skip(self, size: int) -> None:
        """Skip this many bytes, which may be more than fit in memory, or more than there are."""
        while size > 0 and (data := self.read(min(size, READ_BYTES))):
            size -= len(data)

    def finish(self) -> str:
        """Read the rest; returns the SHA-256 of the whole stream, in hexadecimal."""
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
        """Members that were read of samples that are not complete yet, by key and extension."""

    def problems(self, stream: Hashed) -> Iterator[str]:
        """Read a tar to its end."""
        try:
            check_layout(self.check.expected, self.check.samples)
        except Damage as damage:
            yield f": {damage}"
        try:
            yield from self._members(stream)
        except tarfile.HeaderError as error:
            yield f" is no readable tar behind its first {len(self.seen)} members ({error})"
        for name, (sample, _) in self.awaited.items():
            if name not in self.seen:
                yield f", {sample.key}: {name} is missing"

    def _members(self, stream: Hashed) -> Iterator[str]:
        """Go from header to header. One that extends the format counts as a member that the index does not name."""
        offset = 0
        while any(block := stream.read(tarfile.BLOCKSIZE)):
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            offset += tarfile.BLOCKSIZE
            padded = -(-max(header.size, 0) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            problem = self._problem_of(header, offset)
            if problem is None:
                yield from self._take(header, stream.read(padded))
            else:
                yield problem
                stream.skip(padded)
            offset += padded
        try:
            check_tail(stream.read(MOST_TAIL_BYTES))
        except Damage as damage:
            yield f": {damage}"

    def _problem_of(self, header: tarfile.TarInfo, offset: int) -> str | None:
        """Why a member is not one that the index names; None if it is."""
        if header.name not in self.awaited:
            return f" holds {header.name!r}, which the index does not name"
        sample, extension = self.awaited[header.name]
        about = f", {sample.key}: {header.name}"
        if header.name in self.seen:
            return f"{about} is there twice"
        self.seen.add(header.name)
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            return f"{about} is not a file, but a link, a folder or a device"
        if (offset, header.size) != sample.members[extension]:
            return f"{about} is {header.size} bytes at {offset}, the index says otherwise"
        return None

    def _take(self, header: tarfile.TarInfo, data: bytes) -> Iterator[str]:
        """Keep a member until its sample is complete."""
        sample, extension = self.awaited[header.name]
        parts = self.parts.setdefault(sample.key, {})
        parts[extension] = data[: header.size]
        if len(parts) == len(sample.members):
            yield from self._sample(sample, self.parts.pop(sample.key))

    def _sample(self, sample: Sample, members: dict[str, bytes]) -> Iterator[str]:
        try:
            check_sample(sample, self.check.split, members)
            if "mask.png" in members:
                check_mask(members["mask.png"], (sample.width, sample.height))
        except (Damage, BadPhoto) as problem:
            yield f", {sample.key}: {problem}"
