"""What a source yields: inputs whose bytes are read when they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Location:
    """Bytes on the disk: a whole file, or a part of one."""

    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes. Raises OSError."""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(-1 if self.size is None else self.size)


Content = Location | bytes
"""What can be read again at will, in any process, or, from a source that streams, the bytes themselves."""


def content_to_json(content: Location) -> dict[str, Any]:
    """Plain values for `json.dumps`."""
    return asdict(content)


def content_from_json(values: dict[str, Any]) -> Location:
    """The inverse of `content_to_json`."""
    return Location(**values)


@dataclass(frozen=True)
class Input:
    """One input, not yet looked into."""

    name: str
    """Path or address relative to the source; the same wherever the source lies."""
    photo: Content | None
    """None where `problem` says why."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Raw metadata by the names of `metadata.COLUMNS`."""
    mask: Content | None = None
    problem: str = ""


class Source(Protocol):
    """An ordered stream of inputs."""

    total: int
    """Inputs that iterating yields."""

    def stamp(self) -> str:
        """A digest that changes when files of the source change, computed without reading the photos."""
        ...

    def __iter__(self) -> Iterator[Input]: ...
