"""Which photos are to be answered for: found lazily, and listed on disk, so that a million need no memory."""

from __future__ import annotations

import glob
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.photo_files import is_photo_name
from pipeline.errors import UserError, require
from pipeline.progress import track

# `path` has zero bytes for slashes: then a folder's photos are sorted as the folder is, whatever its name is made of.
TABLES = """
    CREATE TABLE found (place INTEGER NOT NULL, path BLOB NOT NULL);
    CREATE TABLE photo (number INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE);
"""


class PhotoList:
    """The paths of a list that `write_list` wrote, read one at a time; for any number of processes and their forks."""

    def __init__(self, file: Path):
        """Name the list's SQLite file, which must not change as long as this is in use."""
        self.file = file
        self._process = 0
        self._connection: sqlite3.Connection | None = None

    def __len__(self) -> int:
        length: int = self._read("SELECT count(*) FROM photo")[0]
        return length

    def __getitem__(self, row: int) -> Path:
        """The path of a photo, by its place in the list."""
        return path_of(self._read("SELECT path FROM photo WHERE number = ?", row + 1)[0])

    def close(self) -> None:
        """Close the file, which some shared disks need before it can be removed."""
        if self._connection is not None and self._process == os.getpid():
            self._connection.close()
        self._connection = None

    def _read(self, query: str, *values: int) -> tuple[Any, ...]:
        if self._connection is None or self._process != os.getpid():  # connections must not be used after a fork
            self._process, self._connection = os.getpid(), open_to_read(self.file)
        row: tuple[Any, ...] = self._connection.execute(query, values).fetchone()
        return row


def open_to_read(file: Path) -> sqlite3.Connection:
    """Open a file that nobody writes to at this time, without the locks that some shared disks lack."""
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


def check_inputs(inputs: list[str], listed: Path | None) -> None:
    """Refuse inputs that lead to no photo.

    Args:
        inputs: Files, folders and patterns.
        listed: A file with more paths.

    Raises:
        UserError: One of them matches nothing, or there are none.
    """
    require(bool(inputs) or listed is not None, "--input", inputs, "files, folders or glob patterns, or --list a file")
    for name in inputs:
        if next(photos_of(name), None) is None:
            raise UserError(f"--input {name!r} leads to no photo; name files, folders with images, or a pattern")
    if listed is not None and next(lines_of(listed), None) is None:
        raise UserError(f"--list {str(listed)!r} names no photo; write one path on each line")


def photos_of(name: str) -> Iterator[str]:
    """The photos that a path, folder or pattern leads to, in no order. A file that is named may have any suffix."""
    # A file's name may contain a pattern's characters, so existing paths go first.
    places = [name] if Path(name).exists() else glob.iglob(name, recursive=True)
    for place in map(Path, places):
        yield from images_under(os.fspath(place)) if place.is_dir() else (os.fspath(place),)


def images_under(folder: str) -> Iterator[str]:
    """The images of a folder and of the folders in it, but not of those that are symbolic links.

    Those that cannot be read are among them, such as a HEIC or a link to nothing: each gets an answer that says so.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from images_under(entry.path)
            elif is_photo_name(entry.name) and not entry.is_dir():
                yield entry.path


def lines_of(listed: Path) -> Iterator[str]:
    """The paths in a file that has one on each line; empty lines count for nothing."""
    try:
        with listed.open(encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                if path := line.rstrip("\r\n"):
                    yield os.fspath(Path(path))
    except OSError as error:
        raise UserError(f"--list {str(listed)!r} cannot be read: {error.strerror}") from error


def write_list(database: sqlite3.Connection, inputs: list[str], listed: Path | None) -> int:
    """Write the list: the inputs in the order given and sorted within each, then the lines as they are; each path once.

    SQLite sorts on disk, and knows which paths are there. So neither the number of photos nor the size of a folder
    needs memory.

    Args:
        database: Where to make the list.
        inputs: See `check_inputs`.
        listed: See `check_inputs`.

    Returns:
        The number of photos.
    """
    database.executescript(TABLES)
    found = track(_all_of(inputs, listed), None, "listing photos", unit="photos")
    database.executemany("INSERT INTO found VALUES (?, ?)", found)
    database.execute("INSERT OR IGNORE INTO photo (path) SELECT path FROM found ORDER BY place, path")
    database.execute("DELETE FROM found")
    photos: int = database.execute("SELECT count(*) FROM photo").fetchone()[0]
    return photos


def _all_of(inputs: list[str], listed: Path | None) -> Iterator[tuple[int, bytes]]:
    """Each path, with the number that it is sorted by before its name: one for each input, and one for each line."""
    for place, name in enumerate(inputs):
        yield from ((place, stored(path)) for path in photos_of(name))
    if listed is not None:
        yield from ((place, stored(path)) for place, path in enumerate(lines_of(listed), len(inputs)))


def stored(path: str) -> bytes:
    """A path as the list has it."""
    return os.fsencode(path).replace(b"/", b"\0")


def path_of(value: bytes) -> Path:
    """A path from the list."""
    return Path(os.fsdecode(value.replace(b"\0", b"/")))
