"""Checks of a tar's content against the index: one set of rules for both readers and for `verify`."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.data.index import HEADER_BYTES, Sample, Shard
from pipeline.data.photo import BadPhoto
from pipeline.data.record import Record
from pipeline.data.storage import open_folder
from pipeline.errors import UserError
from pipeline.parsing.typed_json import Malformed, parse_json

# A tar ends with two empty blocks, padded to a multiple of RECORDSIZE.
MOST_TAIL_BYTES = 2 * HEADER_BYTES + tarfile.RECORDSIZE


class Damage(ValueError):
    """Data that differs from the index; the message says how, in a few words."""


class CheckedFiles:
    """Files of a folder whose names and sizes an index gives; what differs from it is a `UserError`."""

    def __init__(self, place: Path | str, files: Sequence[Any], remedy: str, used: Sequence[int] | None = None):
        """Open the folder, and check the files' sizes.

        Args:
            place: Folder or URL.
            files: The index's entries, each with `name` and `bytes`.
            remedy: What the user does about damage, for messages.
            used: Numbers of the files that are read, which must be there; None for all.
        """
        self.place, self.folder, self.files, self.remedy = place, open_folder(place), files, remedy
        numbers = range(len(files)) if used is None else used
        sizes = self.folder.sizes([files[number].name for number in numbers])
        for number, size in zip(numbers, sizes, strict=True):
            with self.naming(number):
                if size != files[number].bytes:
                    raise Damage(f"it is missing or not {files[number].bytes} bytes long")

    @contextmanager
    def naming(self, number: int, sample: Any = None) -> Iterator[None]:
        """Name the file, and the sample by its `key`, in errors about damaged data."""
        try:
            yield
        except (Damage, BadPhoto, FileNotFoundError) as problem:
            what = "it is gone" if isinstance(problem, FileNotFoundError) else str(problem)
            where = f"{self.place}/{self.files[number].name}" + (f", sample {sample.key}" if sample else "")
            raise UserError(f"{where}: {what}; {self.remedy}") from problem

    def read_range(self, number: int, start: int, end: int) -> bytes:
        """Bytes of a file from `start` up to `end`, all of them."""
        data = self.folder.read_range(self.files[number].name, start, end)
        if len(data) != end - start:
            raise Damage(f"it ends before its byte {end}")
        return data

    def read_into(self, number: int, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with a file's bytes from `start` on, all of them."""
        if self.folder.read_into(self.files[number].name, start, buffer) != len(buffer):
            raise Damage(f"it ends before its byte {start + len(buffer)}")


def members_in_order(samples: Sequence[Sample]) -> list[tuple[Sample, str]]:
    """Sample and extension of every member of a tar, in the tar's order.

    Args:
        samples: All samples of the tar.
    """
    members = [(sample, extension) for sample in samples for extension in sample.members]
    return sorted(members, key=lambda member: member[0].members[member[1]])


def check_layout(shard: Shard, samples: Sequence[Sample]) -> int:
    """Check that a tar's members, by the offsets in the index, follow each other without room for others.

    Args:
        shard: The tar.
        samples: The samples that the index lists for it.

    Returns:
        End of the last member in bytes; only zeros may follow.

    Raises:
        Damage: There is a gap or an overlap, or the number of samples is not the shard's.
    """
    if len(samples) != shard.samples:
        raise Damage(f"the index lists {len(samples)} of its {shard.samples} samples")
    end = 0
    for sample, extension in members_in_order(samples):
        offset, size = sample.members[extension]
        if offset != end + HEADER_BYTES:
            raise Damage(f"in the index, {sample.key}.{extension} does not follow the member before it")
        end = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if shard.bytes - end > MOST_TAIL_BYTES:
        raise Damage(f"{shard.bytes - end} bytes follow the last member that the index names")
    return end


def check_tail(tail: bytes) -> None:
    """Check that nothing follows a tar's last member.

    Raises:
        Damage: Something follows; the message names the member.
    """
    if not any(tail):
        return
    try:
        name = tarfile.TarInfo.frombuf(tail[:HEADER_BYTES], "utf-8", "surrogateescape").name
    except tarfile.HeaderError:
        raise Damage("bytes that belong to no member follow the last one") from None
    raise Damage(f"it holds {name!r}, which the index does not name")


def check_header(block: bytes, name: str, size: int) -> None:
    """Check that the block before a member's data announces this member and nothing else.

    Raises:
        Damage: The header is another one.
    """
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise Damage(f"{name} is not where the index says ({error})") from error
    if header.name != name:
        raise Damage(f"{name} is not where the index says, but {header.name!r}")
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise Damage(f"{name} is not a file, but a link, a folder or a device")
    if header.size != size:
        raise Damage(f"{name} is {header.size} bytes long, the index says {size}")


def read_record(sample: Sample, split: str, data: bytes) -> Record:
    """Read a sample's record, and check that it agrees with the index.

    Args:
        sample: The sample's entry in the index.
        split: The split that is read.
        data: The member `json`.

    Raises:
        Damage: The record cannot be read, or disagrees with the index.
    """
    try:
        record = parse_json(data, Record)
    except Malformed as error:
        raise Damage(f"its record cannot be read ({error})") from error
    recorded = {**vars(record), "GPS cluster": record.gps_cluster, "weight": record.sample_weight}
    indexed = {**vars(sample), "GPS cluster": sample.cluster, "split": split}
    compared = ("key", "split", "label", "group", "GPS cluster", "weight", "width", "height")
    differing = [name for name in compared if recorded[name] != indexed[name]]
    if differing:
        raise Damage(f"its record and the index differ in {', '.join(differing)}")
    return record


def read_member_record(sample: Sample, split: str, data: bytes) -> Record:
    """`read_record` of a tar's own member, whose bytes are those that the index has the hash of."""
    record = read_record(sample, split, data)
    if sample.record_sha256 is not None and hashlib.sha256(data).hexdigest() != sample.record_sha256:
        raise Damage("its record is not the one of the index")
    return record


def check_sample(sample: Sample, split: str, members: Mapping[str, bytes]) -> Record:
    """Read a sample's record, and check that record, photo and mask are those of the index.

    The index has the record's hash, and the record those of photo and mask; shards of before December 2026 have the
    photo's alone.

    Args:
        sample: The sample's entry in the index.
        split: The split that is read.
        members: By extension the bytes of `json`, and of the photo and the mask as far as they are read.

    Raises:
        Damage: One of them is not.
    """
    record, photo = read_member_record(sample, split, members["json"]), sample.photo_extension
    hashes = {photo: ("photo", record.sha256), "mask.png": ("mask", record.mask_sha256)}
    if record.mask_sha256 is not None and "mask.png" not in sample.members:
        raise Damage("the mask of its record is missing")
    for extension, (what, wanted) in hashes.items():
        known = wanted is not None and extension in members
        if known and hashlib.sha256(members[extension]).hexdigest() != wanted:
            raise Damage(f"the {what} is not the one of its record")
    return record
