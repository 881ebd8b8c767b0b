"""Writing one tar from its plan, and the receipt that says it is whole."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import socket
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from data_prep.planning import TARS_FOLDER, PlannedTar
from data_prep.sources import content_from_json
from pipeline.data.storage import open_folder
from pipeline.errors import UserError
from pipeline.files import sha256_of, sync, write_json

RECEIPTS_FOLDER = "receipts"
OWNER = "roadwork"  # a fixed owner and time, or two equal runs differ


@dataclass(frozen=True)
class Job:
    """One tar to be written."""

    folder: str
    """Where the plan lies and the tar goes."""
    tar: PlannedTar
    upload: str | None
    """Where finished tars go instead of staying in the folder."""


@dataclass(frozen=True)
class Receipt:
    """A tar that was written: size, hash, and where the members of each sample lie."""

    bytes: int
    sha256: str
    members: tuple[dict[str, tuple[int, int]], ...]


class HashingStream(io.RawIOBase):
    """Passes bytes on to a file and hashes them, which saves reading the file again."""

    def __init__(self, stream: io.BufferedWriter):
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Hash and write all of `data`."""
        self.digest.update(data)
        return self.stream.write(data)

    def writable(self) -> bool:
        """True."""
        return True


def write_tar(job: Job) -> bool:
    """Write one tar, unless a receipt says that it is there; the same plan gives the same bytes.

    The tar gets its name when it is whole and on the disk, its receipt after that, so a tar with a receipt is never
    written again and one without is.

    Returns:
        Whether it had to be written.

    Raises:
        UserError: A photo changed since it was checked, or the disk is full.
    """
    if is_written(job):
        return False
    try:
        _write(job)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space is left on the disk of {job.folder}; the tars that are finished are kept there: free some "
            "space and give the same command again"
        ) from error
    return True


def is_written(job: Job) -> bool:
    """Whether the tar is there, with the bytes that its receipt says."""
    try:
        receipt = read_receipt(Path(job.folder), job.tar)
        if job.upload is not None:
            return open_folder(job.upload).size(job.tar.name) == receipt.bytes
        path = Path(job.folder) / job.tar.name
        return path.stat().st_size == receipt.bytes and sha256_of(path) == receipt.sha256
    except FileNotFoundError:
        return False


def has_receipt(folder: Path, tar: PlannedTar) -> bool:
    """Whether a tar was finished; `is_written` looks at the tar too."""
    return _receipt_path(folder, tar).exists()


def read_receipt(folder: Path, tar: PlannedTar) -> Receipt:
    """What was written down about a finished tar. Raises FileNotFoundError."""
    values = json.loads(_receipt_path(folder, tar).read_text())
    members = tuple({name: (at[0], at[1]) for name, at in places.items()} for places in values["members"])
    return Receipt(values["bytes"], values["sha256"], members)


def read_entries(folder: Path, tar: PlannedTar) -> list[dict[str, Any]]:
    """The samples that a tar shall hold."""
    entries: list[dict[str, Any]] = json.loads((folder / TARS_FOLDER / tar.name).with_suffix(".json").read_text())
    return entries


def _write(job: Job) -> None:
    folder, name = Path(job.folder), job.tar.name
    entries = read_entries(folder, job.tar)
    # Two machines may be told to write the same tar; neither must see the other's unfinished file.
    temporary = folder / f".{name}.{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            stream = HashingStream(file)
            with TarWriter(stream, encoder=False, mtime=0, user=OWNER, group=OWNER, compress=False) as tar:
                for entry in entries:
                    tar.write(_members(entry))
            file.flush()
            os.fsync(file.fileno())
        receipt = Receipt(temporary.stat().st_size, stream.digest.hexdigest(), _places(temporary, entries))
        if job.upload is not None:
            open_folder(job.upload).put(temporary, name)
        else:
            os.replace(temporary, folder / name)
            sync(folder)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(_receipt_path(folder, job.tar), asdict(receipt))


def _receipt_path(folder: Path, tar: PlannedTar) -> Path:
    return (folder / RECEIPTS_FOLDER / tar.name).with_suffix(".json")


def _members(entry: dict[str, Any]) -> dict[str, str | bytes]:
    record = entry["record"]
    changed = f"the photo {record['source']} changed while it was being sharded; give the same command again"
    try:
        photo = content_from_json(entry["photo"]).read()
        mask = None if entry["mask"] is None else content_from_json(entry["mask"]).read()
    except FileNotFoundError as error:
        raise UserError(changed) from error
    if hashlib.sha256(photo).hexdigest() != record["sha256"]:
        raise UserError(changed)
    members: dict[str, str | bytes] = {
        "__key__": record["key"],
        entry["extension"]: photo,
        "json": json.dumps(record, allow_nan=False).encode(),
    }
    if mask is not None:
        members["mask.png"] = mask
    return members


def _places(path: Path, entries: list[dict[str, Any]]) -> tuple[dict[str, tuple[int, int]], ...]:
    """Offset and size of every member of every sample, from the tar's own headers."""
    places: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            places.setdefault(key, {})[extension] = (member.offset_data, member.size)
    return tuple(places[entry["record"]["key"]] for entry in entries)
