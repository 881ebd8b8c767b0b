"""A journal on the disk of what was found out about photos: after a run was killed, they are not looked at again."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.photos.inspection import Facts, Reject
from data_prep.sources.content import Content, Location, content_to_json
from pipeline.parsing.typed_json import to_type


@dataclass(frozen=True)
class _Line:
    key: str
    facts: dict[str, Any] | None
    reject: dict[str, Any] | None = None


class Journal:
    """Facts and rejects of photos that are whole files, one line each, found again by name and status.

    Lines are handed to the system one by one, so a killed process loses none that it wrote. A line that a power cut
    left incomplete ends the reading, and the photos after it are looked at again.
    """

    def __init__(self, path: Path, conditions: dict[str, Any]):
        """Open a journal.

        Args:
            path: The journal's file; it is made if absent.
            conditions: What the facts depend on beside the photos; a journal with other conditions is started anew.
        """
        self._known: dict[str, Facts | Reject] = {}
        header = json.dumps(conditions, sort_keys=True)
        good = self._read(path, header) if path.exists() else 0
        self._stream = path.open("r+b" if good else "wb")
        self._stream.seek(good)
        self._stream.truncate()
        if not good:
            self._stream.write(f"{header}\n".encode())

    def _read(self, path: Path, header: str) -> int:
        """Read the lines of a journal; returns the number of bytes up to the end of the last good line."""
        with path.open("rb") as stream:
            first = stream.readline()
            if first != f"{header}\n".encode():
                return 0
            good = len(first)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                try:
                    values = to_type(json.loads(line), _Line)  # hashes of photos are numbers of more than 63 bits
                    known = Reject(**(values.reject or {})) if values.facts is None else Facts.from_json(values.facts)
                except (ValueError, KeyError, TypeError, RecursionError):  # what follows is looked at again
                    break
                self._known[values.key] = known
                good += len(line)
        return good

    def get(self, key: str | None) -> Facts | Reject | None:
        """What is known of the photo, if anything."""
        return None if key is None else self._known.get(key)

    def add(self, key: str | None, found: Facts | Reject) -> None:
        """Note what was found, unless the photo has no key or is known already."""
        if key is None or key in self._known:
            return
        known = {"facts": found.to_json()} if isinstance(found, Facts) else {"facts": None, "reject": asdict(found)}
        self._stream.write(json.dumps({"key": key, **known}).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the journal's file."""
        self._stream.close()


def status_of(content: Content) -> list[int] | None:
    """Size, times of modification and of change, and inode of a file; None for other content and for a missing file.

    Nobody can write to a file and leave all four as they were.
    """
    if not isinstance(content, Location) or content.size is not None:
        return None
    try:
        status = os.stat(content.path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def key_of(name: str, photo: Content, status: list[int] | None, mask: Content | None) -> str | None:
    """The key by which a photo is found again; None for a photo that is not a whole file.

    Args:
        name: Name of the input.
        photo: Where the photo's bytes are.
        status: Status of the photo's file; see `status_of`.
        mask: Where the photo's mask is, if it has one.
    """
    if status is None or isinstance(mask, bytes):
        return None
    known: list[Any] = [name, content_to_json(photo), status]
    if mask is not None:
        known += [content_to_json(mask), status_of(mask)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
