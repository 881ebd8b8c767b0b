"""Writing one tar from its plan, and the receipt that says it is whole."""

from __future__ import annotations

import errno
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
from data_prep.shards.planning import TARS_FOLDER, PlannedTar
from data_prep.sources import content_from_json
from pipeline.data.photo import BadPhoto
from pipeline.data.storage import open_folder
from pipeline.errors import UserError
from pipeline.files import sha256_of, sync, write_text

RECEIPTS_FOLDER = "receipts"
OWNER, MODE = "roadwork", 0o444  # a fixed owner and time, or two equal runs differ
COPIED_AT_ONCE = 4 << 20


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


class HashingStream(io.BufferedIOBase):
    """Passes bytes on to a file and hashes them, which saves reading the file again."""

    def __init__(self, stream: io.BufferedWriter):
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Hash and write all of `data`."""
        self.digest.update(data)
        return self.stream.write(data)

    def tell(self) -> int:
        """Bytes written."""
        return self.stream.tell()


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


def missing_tars(folder: Path, tars: list[PlannedTar], upload: str | None) -> list[str]:
    """Names of the tars without a receipt, or that are not where it says, or not as long.

    Args:
        folder: Where the plan lies.
        tars: Those of the plan.
        upload: Where finished tars went instead of staying in the folder.
    """
    sizes = open_folder(upload or folder).sizes([tar.name for tar in tars])
    return [
        tar.name
        for tar, size in zip(tars, sizes, strict=True)
        if not has_receipt(folder, tar) or read_receipt(folder, tar).bytes != size
    ]


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
    # Two machines may be told to write the same tar; neither must see the other's unfinished file.
    temporary = folder / f".{name}.{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            stream, members = HashingStream(file), []
            with tarfile.TarFile(
                fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT, copybufsize=COPIED_AT_ONCE
            ) as tar:
                for entry in read_entries(folder, job.tar):
                    key = entry["record"]["key"]
                    members.append({e: _add(tar, f"{key}.{e}", data) for e, data in _members(entry).items()})
            file.flush()
            os.fsync(file.fileno())
        receipt = Receipt(temporary.stat().st_size, stream.digest.hexdigest(), tuple(members))
        if job.upload is not None:
            open_folder(job.upload).put(temporary, name)
        else:
            os.replace(temporary, folder / name)
            sync(folder)
    finally:
        temporary.unlink(missing_ok=True)
    write_text(_receipt_path(folder, job.tar), json.dumps(vars(receipt)))


def _receipt_path(folder: Path, tar: PlannedTar) -> Path:
    return (folder / RECEIPTS_FOLDER / tar.name).with_suffix(".json")


def _members(entry: dict[str, Any]) -> dict[str, bytes]:
    """Extension to bytes, in the order in which they come to lie in the tar."""
    record = entry["record"]
    photo = _read(entry["photo"], record["sha256"], entry["status"], f"the photo {record['source']}")
    members = {entry["extension"]: photo, "json": json.dumps(record, allow_nan=False).encode()}
    if entry["mask"] is not None:
        members["mask.png"] = _read(entry["mask"], entry["mask_sha256"], None, f"the mask of {record['source']}")
    return dict(sorted(members.items()))


def _read(content: dict[str, Any], sha256: str, status: list[int] | None, what: str) -> bytes:
    """Bytes, if they are still those that were looked at.

    Args:
        content: Where they are.
        sha256: Of what was looked at.
        status: Of the file then; one whose status is the same after it was read need not be hashed once more.
        what: Names it for the user.

    Raises:
        UserError: They are others, or gone.
    """
    source, data = content_from_json(content), b""
    with suppress(FileNotFoundError, BadPhoto):
        data = source.read()
    untouched = status is not None and status_of(source) == status
    if not untouched and hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{what} changed while it was being sharded; give the same command again")
    return data


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Add a file to a tar; returns where its data lie and how many they are."""
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = len(data), MODE, 0
    header.uname = header.gname = OWNER
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(header, io.BytesIO(data))
    return start, len(data)
