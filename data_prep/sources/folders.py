"""Photos in a folder, with or without a table."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.content import Input, Location
from data_prep.sources.coordinates import is_null
from data_prep.sources.metadata import explain_unlabelled, select_fields, spellings
from data_prep.sources.names import FileNames
from data_prep.sources.tables import Row, TornRow, scan_rows, shorten
from pipeline.data.photo_files import READ_SUFFIXES, is_photo_name
from pipeline.errors import UserError

# The first that a table has.
FILE_COLUMNS = (
    "file_name", "filename", "file", "file_path", "filepath", "image_path", "image_name", "image_file", "img_path",
    "path", "image", "img", "photo",
)  # fmt: skip
MISSING, MASK_MISSING = "the photo is missing", "the mask is missing"


class PhotoFolder:
    """The files below a folder, found by the names that tables give them."""

    def __init__(self, path: Path):
        self.path = path
        self.files = list_files(path)
        self.photos = [name for name in self.files if is_photo_name(name)]
        self.names = FileNames(path, self.files)

    def find(self, name: Any) -> str | None:
        """The file that a cell names, or None; see `names.FileNames`."""
        return self.names.find(name)

    def claim(self, names: Iterable[Any], masks: Iterable[Any], table: str) -> list[str]:
        """Find the files of all rows, and tell the user what is missing.

        Args:
            names: Cells that name photos.
            masks: Cells that name masks.
            table: Name of the table, for the user.

        Returns:
            The photos that no row names.
        """
        claimed: set[str | None] = {self.find(name) for name in masks}
        for name in names:
            file = self.find(name)
            claimed.add(file)
            if file is None:
                self.names.miss(name)
        claimed |= self.names.settle(self.photos, claimed, table)
        return [name for name in self.photos if name not in claimed]

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
                f"no photos in {path}: it has no file that ends in {', '.join(READ_SUFFIXES)}, "
                "no metadata file, no Parquet files and no tars"
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
        rows = [(name, fields.get("mask")) for name, fields, _ in self._rows()]
        if not rows:
            raise UserError(f"the metadata file {table} has no rows")
        names, masks = zip(*rows, strict=True)
        self.unclaimed = self.folder.claim(names, masks, table.name)
        self.total: int | None = len(rows) + len(self.unclaimed)

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
        for number, row in enumerate(scan_rows(self.table), start=1):
            cells = _cells_of(row)
            by_name = {spelled: name for name in cells for spelled in spellings(name)}
            column = next((by_name[name] for name in FILE_COLUMNS if name in by_name), None)
            if column is None:
                where = str(self.table) if number == 1 else f"row {number} of {self.table}"
                raise UserError(
                    f"{where} has no column {FILE_COLUMNS[0]!r} that names the photos; its columns are {shorten(cells)}"
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
