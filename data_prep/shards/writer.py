"""Write one tar from its plan, and note with a receipt that it is whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards.journal import status_of
from data_prep.shards.plan import PlannedTar, read_entries
from data_prep.sources.content import content_from_json
from data_prep.work.receipts import Receipts, explain_full_disk
from pipeline.data.photo import BadPhoto
from pipeline.data.storage import open_folder
from pipeline.errors import UserError
from pipeline.files import sync

OWNER, MODE = "roadwork", 0o444  # owner and time are fixed, or two equal runs would differ
COPIED_AT_ONCE = 4 << 20


@dataclass(frozen=True)
class Job:
    """One tar to be written."""

    folder: str
    """Folder of the plan, in which the tar is written."""
    tar: PlannedTar
    upload: str | None
    """Folder or URL that finished tars are moved to; None leaves them in `folder`."""


class HashingStream(io.BufferedIOBase):
    """Passes bytes on to a file and hashes them, which saves reading the file again."""

    def __init__(self, stream: io.BufferedWriter):
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Hash and write all of `data`."""
        self.digest.update(data)
        return self.stream.write(data)

    def tell(self) -> int:
        """The number of bytes written so far."""
        return self.stream.tell()


def write_tar(job: Job) -> bool:
    """Write one tar, unless a receipt says that it is there; the same plan gives the same bytes.

    The tar gets its name once it is whole and on the disk, and its receipt after that. A tar with a receipt is never
    written again; one without a receipt is.

    Returns:
        Whether it had to be written.

    Raises:
        UserError: A photo changed since it was checked, or the disk is full.
    """
    if Receipts(job.folder, job.upload).is_whole(job.tar.name):
        return False
    with explain_full_disk(job.folder, "tars"):
        _write(job)
    return True


def _write(job: Job) -> None:
    folder, name = Path(job.folder), job.tar.name
    # Two machines may be told to write the same tar; neither must see the other's unfinished file.
    temporary = folder / f".{name}.{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            stream, members = HashingStream(file), []
            with tarfile.TarFile(
                fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT, copybufsize=COPIED_AT_ONCE
            ) as tar:
                for entry in read_entries(folder, name):
                    key = entry["record"]["key"]
                    members.append({e: _add(tar, f"{key}.{e}", data) for e, data in _members(entry).items()})
            file.flush()
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        if job.upload is not None:
            open_folder(job.upload).put(temporary, name)
        else:
            os.replace(temporary, folder / name)
            sync(folder)
    finally:
        temporary.unlink(missing_ok=True)
    # The receipt also has the offset and size of each sample's members.
    Receipts(folder).write(name, {"bytes": size, "sha256": stream.digest.hexdigest(), "members": members})


def _members(entry: dict[str, Any]) -> dict[str, bytes]:
    """The members of a sample by extension, in the order of the tar."""
    record = entry["record"]
    photo = _read(entry["photo"], record["sha256"], entry["status"], f"the photo {record['source']}")
    members = {entry["extension"]: photo, "json": record_bytes(record)}
    if entry["mask"] is not None:
        members["mask.png"] = _read(entry["mask"], entry["mask_sha256"], None, f"the mask of {record['source']}")
    return dict(sorted(members.items()))


def record_bytes(record: dict[str, Any]) -> bytes:
    """A record as the member `json` of a tar."""
    return json.dumps(record, allow_nan=False).encode()


def _read(content: dict[str, Any], sha256: str, status: list[int] | None, what: str) -> bytes:
    """Read bytes, and check that they are still those that were looked at.

    Args:
        content: Where the bytes are.
        sha256: Hash of the bytes that were looked at.
        status: The file's status then; a file whose status is the same after it was read need not be hashed again.
        what: Name of the content for the user.

    Raises:
        UserError: The bytes have changed, or are gone.
    """
    source, data = content_from_json(content), b""
    with suppress(FileNotFoundError, BadPhoto):
        data = source.read()
    untouched = status is not None and status_of(source) == status
    if not untouched and hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{what} changed while it was being sharded; give the same command again")
    return data


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Add a file to a tar; returns the offset and the size of its data in bytes."""
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = len(data), MODE, 0
    header.uname = header.gname = OWNER
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(header, io.BytesIO(data))
    return start, len(data)
