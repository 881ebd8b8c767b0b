"""Photos in a folder, with or without a table."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.sources.content import Input, Location
from data_prep.sources.metadata import explain_unlabelled, is_null, select_fields
from data_prep.sources.tables import Row, TornRow, scan_rows
from pipeline.errors import UserError

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
FILE_COLUMNS = ("file_name", "filename", "file")
MISSING, MASK_MISSING = "the photo is missing", "the mask is missing"


class PhotoFolder:
    """The files below a folder, found by the names that tables give them."""

    def __init__(self, path: Path):
        self.path = path
        self.files = list_files(path)
        self.photos = [name for name in self.files if PurePosixPath(name).suffix.lower() in PHOTO_SUFFIXES]
        # Tables and file systems spell accented letters in either of Unicode's two ways; the exact name is tried first.
        normal = {unicodedata.normalize("NFC", name): name for name in self.files}
        self._by_name = normal | {name: name for name in self.files}
        self._roots = dict.fromkeys((os.path.abspath(path), os.path.realpath(path)))

    def find(self, name: Any) -> str | None:
        """The file that a cell names, or None; never a file outside the folder."""
        if is_null(name):
            return None
        text = str(name)
        # Blanks around a name are taken for a mistake in the table, unless a file really has that name.
        found = (self._by_name.get(path) for spelled in (text, text.strip()) for path in self._paths(spelled))
        return next((file for file in found if file is not None), None)

    def _paths(self, spelled: str) -> Iterator[str]:
        """Ways to write the name of a file as a path below the folder."""
        # PurePosixPath drops "./" and doubled slashes; ".." stays and matches no listed file.
        path = PurePosixPath(spelled)
        relative = next((path.relative_to(root) for root in self._roots if path.is_relative_to(root)), path)
        yield str(relative)
        yield unicodedata.normalize("NFC", str(relative))

    def locate(self, file: str) -> Location:
        """Where the bytes of a listed file are."""
        return Location(str(self.path / file))


class FolderSource:
    """A bare folder of photos, searched through its sub-folders; no labels, GPS from EXIF."""

    def __init__(self, path: Path):
        self.folder = PhotoFolder(path)
        self.total: int | None = len(self.folder.photos)
        if not self.total:
            raise UserError(
                f"no photos in {path}: it has no file that ends in {', '.join(sorted(PHOTO_SUFFIXES))}, "
                "no metadata file and no Parquet files"
            )

    def stamp(self) -> str:
        """Digest of the photos' names, sizes and times."""
        return stamp_files(self.folder.path, [self.folder.path / name for name in self.folder.photos])

    def explain_unlabelled(self) -> str:
        """Nothing: a bare folder has no labels."""
        return ""

    def __iter__(self) -> Iterator[Input]:
        for name in self.folder.photos:
            yield Input(name, self.folder.locate(name))


class TableSource:
    """A folder of photos and a table with a row for each, whose `file_name` is relative to the folder.

    Photos that no row names are inputs too, and rejected: the table decides what belongs to the set.
    """

    def __init__(self, path: Path, table: Path):
        self.folder, self.table = PhotoFolder(path), table
        rows, claimed = 0, set()
        for name, fields, _ in self._rows():
            rows += 1
            claimed |= {self.folder.find(name), self.folder.find(fields.get("mask"))}
        if not rows:
            raise UserError(f"the metadata file {table} has no rows")
        self.unclaimed = [name for name in self.folder.photos if name not in claimed]
        self.total: int | None = rows + len(self.unclaimed)

    def stamp(self) -> str:
        """Digest of the names, sizes and times of all files, the table's among them."""
        files = (self.folder.path / name for name in self.folder.files)
        return stamp_files(self.folder.path, [*files, self.table])

    def explain_unlabelled(self) -> str:
        """Why no photo has a label; see `metadata.explain_unlabelled`."""
        columns = dict.fromkeys(name for row in scan_rows(self.table) for name in _cells_of(row))
        return explain_unlabelled(str(self.table), columns)

    def __iter__(self) -> Iterator[Input]:
        seen: set[str] = set()
        for name, fields, problem in self._rows():
            file, mask = self.folder.find(name), self.folder.find(fields.get("mask"))
            if problem:
                yield Input(file or str(name), None, fields, problem=problem)
            elif file is None:
                yield Input(str(name), None, fields, problem=MISSING)
            elif file in seen:
                yield Input(file, None, fields, problem="an earlier row names the same photo")
            elif mask is None and not is_null(fields.get("mask")):
                yield Input(file, None, fields, problem=MASK_MISSING)
            else:
                seen.add(file)
                located = self.folder.locate(mask) if mask else None
                yield Input(file, self.folder.locate(file), fields, mask=located)
        for file in self.unclaimed:
            yield Input(file, None, problem=f"no row in {self.table.name}")

    def _rows(self) -> Iterator[tuple[Any, dict[str, Any], str]]:
        """For each row the photo's name, the fields, and why the row cannot be used; the reason is empty if it can."""
        for row in scan_rows(self.table):
            cells = _cells_of(row)
            column = next((name for name in cells if name.strip().lower() in FILE_COLUMNS), None)
            if column is None:
                raise UserError(
                    f"{self.table} has no column {FILE_COLUMNS[0]!r} that names the photos; "
                    f"its columns are {', '.join(cells)}"
                )
            name, problem = cells[column], ""
            if isinstance(row, TornRow):
                problem = row.problem
                name = f"{self.table.name} line {row.line}" if is_null(name) else name
            yield name, select_fields(cells), problem


def _cells_of(row: Row | TornRow) -> Row:
    return row.cells if isinstance(row, TornRow) else row


def list_files(folder: Path) -> list[str]:
    """Every file below a folder, relative and sorted; hidden ones and hidden folders are left out.

    Links to folders are followed, but no folder is listed twice, so that loops end. Real folders come before links:
    a link never takes the names away from the files that it leads to.

    Raises:
        UserError: A folder cannot be listed.
    """
    names: list[str] = []
    visited: set[tuple[int, int]] = set()
    tops = deque([folder])
    while tops:
        for parent, folders, files in os.walk(tops.popleft(), onerror=_refuse):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in visited:
                folders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            tops.extend(path for name in folders if (path := Path(parent, name)).is_symlink())
            below = Path(parent).relative_to(folder)
            names += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def stamp_files(folder: Path, paths: Iterable[Path]) -> str:
    """A digest of files' names relative to a folder, their sizes and times."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat() if path.exists() else path.lstat()  # a dangling link is an input too, and a reject
        name = os.path.relpath(path, folder)
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _refuse(error: OSError) -> None:
    raise UserError(f"the folder {error.filename} cannot be listed: {error.strerror}") from error
