"""What was found out about photos, on the disk, so that a run that was killed does not look at them again."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.photos.inspection import Facts, Reject
from data_prep.sources.content import Content, Location, content_to_json


class Journal:
    """Facts and rejects of photos that are whole files, a line for each, found again by name and status.

    Lines reach the system one by one, so a killed process loses none that it wrote; one that a power cut tore
    ends the reading, and what stood behind it is looked at again.
    """

    def __init__(self, path: Path, conditions: dict[str, Any]):
        """Open a journal.

        Args:
            path: Made if absent.
            conditions: What the facts depend on beside the photos; a journal of others is begun anew.
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
        """Take in the lines of a journal; returns the bytes up to the end of the last good one."""
        with path.open("rb") as stream:
            first = stream.readline()
            if first != f"{header}\n".encode():
                return 0
            good = len(first)
            for line in stream:
                try:
                    values = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                facts = values["facts"]
                self._known[values["key"]] = Reject(**values["reject"]) if facts is None else Facts.from_json(facts)
                good += len(line)
        return good

    def get(self, key: str | None) -> Facts | Reject | None:
        """What is known of the photo, if anything."""
        return None if key is None else self._known.get(key)

    def add(self, key: str | None, found: Facts | Reject) -> None:
        """Note what was found; nothing where the photo has no key or is known."""
        if key is None or key in self._known:
            return
        known = {"facts": found.to_json()} if isinstance(found, Facts) else {"facts": None, "reject": asdict(found)}
        self._stream.write(json.dumps({"key": key, **known}).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        """End writing."""
        self._stream.close()


def status_of(content: Content) -> list[int] | None:
    """Size, times of modification and of change, and inode of a whole file; None for what is none, or is not there.

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
    """What a photo is found by again; None for one that is no whole file.

    Args:
        name: The input's.
        photo: Where its bytes are.
        status: The photo's; see `status_of`.
        mask: Where its mask is, if it has one.
    """
    if status is None or isinstance(mask, bytes):
        return None
    known: list[Any] = [name, content_to_json(photo), status]
    if mask is not None:
        known += [content_to_json(mask), status_of(mask)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
