"""Writing one tar, and making a finished folder of them appear at once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from webdataset.writer import TarWriter

from data_prep.sources import Location
from pipeline.data.record import Record
from pipeline.errors import UserError
from pipeline.files import sha256_of

OWNER = "roadwork"  # a fixed owner and time, or two equal runs differ


@dataclass(frozen=True)
class Entry:
    """A sample to be written."""

    record: Record
    extension: str
    photo: Location
    mask: Location | None


@dataclass(frozen=True)
class ShardPlan:
    """A tar to be written."""

    path: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class WrittenShard:
    """A tar that was written: size, hash, and where the members of each sample lie."""

    bytes: int
    sha256: str
    members: tuple[dict[str, tuple[int, int]], ...]


def write_shard(plan: ShardPlan) -> WrittenShard:
    """Write one tar and sync it. The same plan gives the same bytes.

    Raises:
        UserError: A photo changed since it was checked.
    """
    path = Path(plan.path)
    with path.open("wb") as stream:
        with TarWriter(stream, encoder=False, mtime=0, user=OWNER, group=OWNER, compress=False) as tar:
            for entry in plan.entries:
                tar.write(_members(entry))
        stream.flush()
        os.fsync(stream.fileno())
    places: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            places.setdefault(key, {})[extension] = (member.offset_data, member.size)
    members = tuple(places[entry.record.key] for entry in plan.entries)
    return WrittenShard(path.stat().st_size, sha256_of(path), members)


def _members(entry: Entry) -> dict[str, str | bytes]:
    photo = entry.photo.read()
    if hashlib.sha256(photo).hexdigest() != entry.record.sha256:
        raise UserError(f"the photo {entry.record.source} changed while it was being sharded; run again")
    record = json.dumps(entry.record.to_json(), allow_nan=False).encode()
    members: dict[str, str | bytes] = {"__key__": entry.record.key, entry.extension: photo, "json": record}
    if entry.mask is not None:
        members["mask.png"] = entry.mask.read()
    return members


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to build in. It is gone at the end, published or because the work failed.

    What a killed run left there is removed first. A lock, which ends with the process, keeps two runs apart.

    Raises:
        UserError: Another run is building the same folder.
    """
    partial = out.parent / f".{out.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing {out} at this moment; wait for it, or choose another --out"
            ) from error
        try:
            for left in partial.iterdir():
                left.unlink()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def publish(partial: Path, out: Path) -> None:
    """Give a finished folder its name, after everything in it is on the disk."""
    sync_folder(partial)
    os.replace(partial, out)  # over an empty folder too
    sync_folder(out.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
