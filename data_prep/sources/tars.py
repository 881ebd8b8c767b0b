"""WebDataset tars as a source: ours, or those of others.

Only the headers of a tar are read in passing; photos and masks stay where they are, as parts of the tar. The name of a
member says which sample it belongs to and what it is, and is never used as a path.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.sources.content import Input, Location
from data_prep.sources.coordinates import is_null
from data_prep.sources.folders import stamp_files
from data_prep.sources.metadata import BadLabel, parse_label, select_fields, split_in
from data_prep.sources.tables import flatten, shorten
from pipeline.data.photo import BadPhoto
from pipeline.data.photo_files import MAX_FILE_BYTES
from pipeline.errors import UserError
from pipeline.parsing.typed_json import Malformed, load_json
from pipeline.progress import say

PHOTO_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
JSON, CLASS, MASK = "json", "cls", "mask.png"
LABEL_KEYS = ("label", "class", "cls", "target", "roadwork")
OURS = frozenset({"key", "label", "split", "sha256", "sample_weight", "metadata"})
# WebDataset's own rule: the key is the path up to the first dot of the last part, and the rest is the extension.
KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
MOST_MEMBERS = 2_000_000  # of a tar, whose directory is held in memory
LONGEST_HEADER = 16 << 20  # bytes; extended headers hold a name or a few words
LONGEST_JSON, LONGEST_CLASS = 16 << 20, 1 << 10
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
CHECKED_AT_ONCE = 1 << 20


class BadSample(ValueError):
    """A sample that cannot be used; the message says why, in a few words."""


@dataclass
class Sample:
    """The members of a tar that have the same key."""

    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Extension in lower case to offset and size of the data in the tar."""
    problem: str = ""
    """Why the sample cannot be used, as far as the headers say."""


class TarSource:
    """Samples of tars; the photo is the member that ends in .jpg, .jpeg, .png or .webp.

    Metadata and label come from the `.json` member, whose keys are those of a table's columns, at the top or under
    `metadata`; the label may be there as any of `LABEL_KEYS`, or in a `.cls` member. `.mask.png` is a mask of ours. The
    members of a sample need not lie side by side.
    """

    def __init__(self, path: Path, tars: list[str]):
        """Read the headers of all tars.

        Args:
            path: Folder of the tars.
            tars: Their paths below the folder.

        Raises:
            UserError: A tar is damaged or cut off, or nothing tells the labels.
        """
        self.path, self.tars = path, tars
        self.total: int | None = 0
        found: Counter[str] = Counter()
        for tar in tars:
            samples = read_samples(path / tar)
            self.total += len(samples)
            found.update(extension for sample in samples.values() for extension in sample.parts)
        if not self.total:
            raise UserError(f"the tars in {path} hold no samples")
        self._told = bool({JSON, CLASS} & found.keys())
        others = {name: count for name, count in found.most_common() if not _is_read(name)}
        if others and not self._told:
            raise UserError(
                f"no sample in {path} has a .json or a .cls member, which would hold its label; there are members "
                f"{_dotted(others)}: write the label as 0 or 1 into a .cls member, or as label into a .json"
            )
        if others:
            counts = (f".{name} ({count})" for name, count in others.items())
            say(f"{path}: members that are not read: {shorten(counts, 5)}")

    def stamp(self) -> str:
        """Digest of the tars' names, sizes and times."""
        return stamp_files(self.path, [self.path / tar for tar in self.tars])

    def explain_unlabelled(self) -> str:
        """Why no photo has a label; empty where there are photos and masks only."""
        keys = ", ".join(LABEL_KEYS)
        return f"no .json member in {self.path} has one of {keys}, and no .cls member one" if self._told else ""

    def __iter__(self) -> Iterator[Input]:
        for tar in self.tars:
            split = split_in(tar)
            for key, sample in read_samples(self.path / tar).items():
                name = f"{tar}#{key}"
                try:
                    yield self._input(name, str(self.path / tar), sample, split)
                except BadSample as error:
                    yield Input(name, None, problem=str(error))

    def _input(self, name: str, path: str, sample: Sample, split: str | None) -> Input:
        if sample.problem:
            raise BadSample(sample.problem)
        photo = Location(path, *sample.parts[_photo_of(sample.parts)])
        values = _read_json(path, sample.parts)
        fields = fields_of_json(values)
        if CLASS in sample.parts:
            fields["label"] = _agreed(fields.get("label"), _read_class(path, sample.parts))
        if split is not None and is_null(fields.get("split")):
            fields["split"] = split
        mask = Location(path, *sample.parts[MASK]) if MASK in sample.parts else None
        sha256 = str(values["sha256"]) if is_ours(values) else ""
        return Input(name, photo, fields, mask, sha256=sha256)


def is_ours(values: Any) -> bool:
    """Whether the content of a `.json` member is a record of our shards."""
    return isinstance(values, dict) and values.keys() >= OURS


def fields_of_json(values: Any) -> dict[str, Any]:
    """The metadata that the `.json` member of a sample holds, by our names; a bare value is the label.

    Raises:
        BadSample: The JSON is nested too deeply.
    """
    if not isinstance(values, dict):
        return {} if values is None else {"label": values}
    inner = values.get("metadata")
    try:
        flat = flatten({**(inner if isinstance(inner, dict) else {}), **values})
    except Malformed as error:
        raise BadSample(f"its .json cannot be read: {error}") from error
    fields = select_fields(flat)
    fields.pop("mask", None)  # a path, which means nothing here
    by_name = {name.strip().lower(): value for name, value in flat.items()}
    label = next((by_name[key] for key in LABEL_KEYS if key in by_name), None)
    if label is not None:
        fields["label"] = label
    if is_ours(values) and isinstance(values.get("video"), str):
        kind, _, name = values["video"].partition(" ")
        del fields["video"]
        fields["sequence" if kind == "sequence" else "video"] = name
    return fields


def read_samples(path: Path) -> dict[str, Sample]:
    """The samples of a tar by their keys, in the order of their first members; only headers are read.

    Hidden members, folders, and members whose name begins with two underscores are no samples.

    Raises:
        UserError: The tar cannot be read, is damaged or cut off.
    """
    samples: dict[str, Sample] = {}
    for number, member in enumerate(_members(path)):
        if number >= MOST_MEMBERS:
            raise UserError(f"the tar {path} has more than {MOST_MEMBERS:,} members; divide it into several")
        last = PurePosixPath(member.name).name
        if member.isdir() or last.startswith((".", "__")):
            continue
        match = KEY_AND_EXTENSION.fullmatch(member.name)
        if match is None:
            samples[member.name] = Sample(problem="its name has no key and extension, as in 0001.jpg")
            continue
        sample, extension = samples.setdefault(match[1], Sample()), match[2].lower()
        if not member.isreg() or member.sparse is not None:
            sample.problem = sample.problem or f"its .{extension[:20]} is a link or a device, and not a file"
        elif extension in sample.parts:
            sample.problem = sample.problem or f"several members .{extension[:20]} have the same key"
        sample.parts[extension] = (member.offset_data, member.size)
    return samples


class _Headers(io.BufferedIOBase):
    """Reads a file, but never so much at once that it cannot be a header."""

    def __init__(self, stream: io.BufferedReader):
        self._stream = stream

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError("a header that is too long")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar in their order; at the end, its end mark is checked."""
    try:
        if not path.is_file():
            raise UserError(f"the tar {path} is not a file")
        with path.open("rb") as stream:
            yield from _walk(path, stream)
    except OSError as error:
        raise UserError(f"the tar {path} cannot be read: {error.strerror or error}") from error


def _walk(path: Path, stream: io.BufferedReader) -> Iterator[tarfile.TarInfo]:
    if stream.read(6).startswith(COMPRESSED):
        raise UserError(f"the tar {path} is compressed; decompress it first")
    stream.seek(0)
    last = -1
    try:
        with tarfile.TarFile(fileobj=_Headers(stream), mode="r") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                if member.offset <= last or member.size < 0:
                    raise tarfile.ReadError("a header leads back")
                last = member.offset
                yield member
            end = tar.offset
    except (OSError, UserError):
        raise
    except Exception as error:  # tarfile lets many kinds of errors through on damaged headers
        raise UserError(f"the tar {path} is damaged or cut off after byte {max(last, 0):,}: {error}") from error
    stream.seek(end)
    mark = stream.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE:
        raise UserError(f"the tar {path} is cut off: it ends at byte {end:,} without an end mark; fetch it again")
    if any(mark):
        raise UserError(f"the tar {path} is damaged: there is no header at byte {end:,}; fetch it again")
    while data := stream.read(CHECKED_AT_ONCE):
        if any(data):
            raise UserError(f"the tar {path} goes on after its end mark at byte {end:,}, as joined tars do; divide it")


def _photo_of(extensions: Iterable[str]) -> str:
    """The extension of the sample's photo: .jpg and the like, or a single one such as .left.jpg."""
    ending = [one for one in extensions if one != MASK and one.rpartition(".")[2] in PHOTO_EXTENSIONS]
    photos = [one for one in ending if one in PHOTO_EXTENSIONS] or ending
    if len(photos) > 1:
        raise BadSample(f"several photos have the same key: {_dotted(photos)}; a key ends at the first dot")
    if not photos:
        raise BadSample(f"it has no photo, .jpg, .jpeg, .png or .webp: only {_dotted(extensions)}")
    return photos[0]


def _dotted(extensions: Iterable[str]) -> str:
    return shorten((f".{one}" for one in sorted(extensions)), 5)


def _is_read(extension: str) -> bool:
    return extension in (JSON, CLASS, MASK) or extension.rpartition(".")[2] in PHOTO_EXTENSIONS


def _read_json(path: str, parts: dict[str, tuple[int, int]]) -> Any:
    if JSON not in parts:
        return None
    try:
        return load_json(_read(path, parts[JSON], LONGEST_JSON, JSON), lenient=True)
    except Malformed as error:
        raise BadSample(f"its .json cannot be read: {error}") from error


def _read_class(path: str, parts: dict[str, tuple[int, int]]) -> str:
    return _read(path, parts[CLASS], LONGEST_CLASS, CLASS).decode("utf-8", "replace").strip()


def _read(path: str, part: tuple[int, int], longest: int, extension: str) -> bytes:
    offset, size = part
    if size > min(longest, MAX_FILE_BYTES):
        raise BadSample(f"its .{extension} has {size:,} bytes, more than {longest:,}")
    try:
        return Location(path, offset, size).read()
    except (OSError, BadPhoto) as error:
        raise BadSample(f"its .{extension} cannot be read: {error}") from error


def _agreed(from_json: Any, from_class: str) -> Any:
    """The label of a sample that has a `.cls` member, and perhaps another in its `.json`."""
    if is_null(from_json):
        return from_class
    with suppress(BadLabel):  # told later, by its value
        if None is not parse_label(from_class) != parse_label(from_json):
            raise BadSample(f"its .json says {str(from_json)[:20]!r}, its .cls {from_class[:20]!r}")
    return from_json
