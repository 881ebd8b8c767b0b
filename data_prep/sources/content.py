"""What a source yields: inputs whose bytes are read when they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from data_prep.sources.outlines import CocoMask
from pipeline.data.photo_files import read_file


@dataclass(frozen=True)
class Location:
    """Bytes on the disk: a whole file, or a part of one."""

    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Read the bytes; raises as `pipeline.data.photo_files.read_file` does."""
        return read_file(self.path, self.offset, self.size)


Content = Location | CocoMask | bytes
"""Content that any process can read again, or, from a source that streams, the bytes themselves.

Photos are never a `CocoMask`.
"""


def content_to_json(content: Content) -> dict[str, Any]:
    """Plain values for `json.dumps`; only for content that can be read again, not for bytes."""
    assert not isinstance(content, bytes)
    return {"kind": "coco_mask" if isinstance(content, CocoMask) else "location", **vars(content)}


def content_from_json(values: dict[str, Any]) -> Location | CocoMask:
    """The inverse of `content_to_json`."""
    rest = {name: value for name, value in values.items() if name != "kind"}
    if values["kind"] == "location":
        return Location(**rest)
    return CocoMask(**{**rest, "objects": tuple((value, counts) for value, counts in rest["objects"])})


@dataclass(frozen=True)
class Input:
    """One input of a source, whose photo was not looked at yet."""

    name: str
    """Path or address relative to the source; the same wherever the source lies."""
    photo: Location | bytes | None
    """The photo; None where `problem` says why there is none."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Raw metadata by the names of `metadata.COLUMNS`."""
    mask: Content | None = None
    problem: str = ""
    sha256: str = ""
    """What the photo's bytes hash to, where the source tells; otherwise empty."""


class Source(Protocol):
    """An ordered stream of inputs."""

    total: int | None
    """Number of inputs; None where it is known only at the end."""

    def stamp(self) -> str:
        """A digest that changes when the source changes, computed without reading the photos."""
        ...

    def explain_unlabelled(self) -> str:
        """Why no photo has a label, asked where none has one; empty where the user expects no labels."""
        ...

    def __iter__(self) -> Iterator[Input]: ...
