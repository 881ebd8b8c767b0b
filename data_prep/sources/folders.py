"""Where photos come from. A source yields its inputs one at a time, in a fixed order, and every one of them.

To add a source, write a class with `total`, `stamp` and `__iter__` as `Source` describes them, and let
`open_source` choose it.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
import pyarrow.parquet

from data_prep.metadata import is_null, select_fields
from data_prep.sources.content import Input, Location, Source
from data_prep.tables import READERS, flatten, read_rows
from pipeline.errors import UserError

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
FILE_COLUMNS = ("file_name", "filename", "file")
MISSING = "the photo is missing"
HUB_SPLIT = re.compile(r"(train|validation|val|test)\b")


def open_source(folder: Path, metadata: Path | None = None) -> Source:
    """Find out what kind of source a folder is.

    Args:
        folder: Holds photos, or a hub data set's Parquet files.
        metadata: Table with a row per photo; if None, found by name: `metadata.csv`, `.jsonl`, `.parquet`.

    Raises:
        UserError: The folder is missing or holds nothing that can be read.
    """
    if not folder.is_dir():
        raise UserError(f"the source {folder} is not a folder; --source names the folder that holds the photos")
    if metadata is not None and not metadata.is_file():
        raise UserError(f"the metadata file {metadata} does not exist")
    if metadata is None:
        found = [folder / f"metadata{suffix}" for suffix in READERS if (folder / f"metadata{suffix}").is_file()]
        if len(found) > 1:
            raise UserError(f"{folder} has {' and '.join(p.name for p in found)}; choose one with --metadata")
        metadata = found[0] if found else None
    if metadata is not None:
        return TableSource(folder, metadata)
    tables = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    if tables:
        return ParquetSource(folder, tables)
    return FolderSource(folder)


class FolderSource:
    """A bare folder of photos, searched through its sub-folders; no labels, GPS from EXIF."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = _list_files(folder)
        self.photos = [name for name in self.files if _is_photo(name)]
        self.total = len(self.photos)
        if not self.photos:
            raise UserError(
                f"no photos in {folder}: it has no file that ends in {', '.join(sorted(PHOTO_SUFFIXES))}, "
                "no metadata file and no Parquet files"
            )

    def stamp(self) -> str:
        """Digest of the photos' names, sizes and times."""
        return _stamp(self.folder, [self.folder / name for name in self.photos])

    def __iter__(self) -> Iterator[Input]:
        for name in self.photos:
            yield Input(name, Location(str(self.folder / name)))


class TableSource:
    """A folder of photos and a table with a row for each, whose `file_name` is relative to the folder.

    Photos that no row names are inputs too, and rejected: the table decides what belongs to the set.
    """

    def __init__(self, folder: Path, table: Path):
        self.folder, self.table = folder, table
        self.files = _list_files(folder)
        # Tables and file systems spell accented letters in either of Unicode's two ways.
        self.by_normal_name = {unicodedata.normalize("NFC", name): name for name in self.files}
        rows, claimed = 0, set()
        for name, fields in self._rows():
            rows += 1
            claimed |= {self._find(name), self._find(fields.get("mask"))}
        if not rows:
            raise UserError(f"the metadata file {table} has no rows")
        self.unclaimed = [name for name in self.files if name not in claimed and _is_photo(name)]
        self.total = rows + len(self.unclaimed)

    def stamp(self) -> str:
        """Digest of the names, sizes and times of all files, the table's among them."""
        return _stamp(self.folder, [*(self.folder / name for name in self.files), self.table])

    def __iter__(self) -> Iterator[Input]:
        seen: set[str] = set()
        for name, fields in self._rows():
            file, mask = self._find(name), self._find(fields.get("mask"))
            if file is None:
                yield Input(str(name), None, fields, problem=MISSING)
            elif file in seen:
                yield Input(file, None, fields, problem="an earlier row names the same photo")
            elif mask is None and not is_null(fields.get("mask")):
                yield Input(file, None, fields, problem="the mask is missing")
            else:
                seen.add(file)
                yield Input(file, self._locate(file), fields, mask=self._locate(mask) if mask else None)
        for file in self.unclaimed:
            yield Input(file, None, problem=f"no row in {self.table.name}")

    def _rows(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        for row in read_rows(self.table):
            column = next((name for name in row if name.strip().lower() in FILE_COLUMNS), None)
            if column is None:
                raise UserError(
                    f"{self.table} has no column {FILE_COLUMNS[0]!r} that names the photos; "
                    f"its columns are {', '.join(row)}"
                )
            yield row[column], select_fields(row)

    def _find(self, name: Any) -> str | None:
        """The file of the folder that a cell names; none outside the folder, whatever the cell says."""
        if is_null(name):
            return None
        # PurePosixPath drops "./" and doubled slashes; ".." stays and matches no listed file.
        return self.by_normal_name.get(unicodedata.normalize("NFC", str(PurePosixPath(str(name).strip()))))

    def _locate(self, file: str) -> Location:
        return Location(str(self.folder / file))


class ParquetSource:
    """Parquet files as a data set on the Hugging Face hub has them, photos inside, read as a stream."""

    def __init__(self, folder: Path, tables: list[Path]):
        self.folder, self.tables = folder, tables
        self.total = 0
        for table in tables:
            try:
                self.total += pyarrow.parquet.read_metadata(table).num_rows
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise UserError(f"{table} is not a complete Parquet file: {error}") from error
        if not self.total:
            raise UserError(f"the Parquet files in {folder} have no rows")

    def stamp(self) -> str:
        """Digest of the files' names, sizes and times."""
        return _stamp(self.folder, self.tables)

    def __iter__(self) -> Iterator[Input]:
        for table in self.tables:
            hub_split = HUB_SPLIT.match(table.name)
            address = table.relative_to(self.folder).as_posix()
            for number, row in enumerate(self._stream(table)):
                name = f"{address}#{number}"
                fields = select_fields(flatten({n: v for n, v in row.items() if n not in ("image", "mask")}))
                if hub_split is not None:
                    fields["split"] = hub_split.group(1)
                photo, mask = _image_bytes(row.get("image")), _image_bytes(row.get("mask"))
                yield Input(name, photo, fields, mask, problem=MISSING if photo is None else "")

    def _stream(self, table: Path) -> Iterator[dict[str, Any]]:
        import datasets  # more than half a second, and only this source needs it

        rows = datasets.load_dataset("parquet", data_files=str(table), split="train", streaming=True)
        features = rows.features or {}
        if "image" not in features:
            raise UserError(f"{table} has no column 'image'; its columns are {', '.join(features)}")
        for column in features.keys() & {"image", "mask"}:
            rows = rows.cast_column(column, datasets.Image(decode=False))  # the original bytes, not pixels
        names = getattr(features.get("label"), "names", None)
        for row in rows:
            if names is not None and row["label"] is not None:
                # A class number means what its name says; -1 is the hub's own mark for a hidden label.
                row["label"] = names[row["label"]] if row["label"] >= 0 else None
            yield row


def _image_bytes(value: Any) -> bytes | None:
    """The file in a cell of the hub's image type; an empty one is a file too, for the decoder to refuse."""
    return value.get("bytes") if isinstance(value, dict) else None


def _is_photo(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in PHOTO_SUFFIXES


def _list_files(folder: Path) -> list[str]:
    """Every file below a folder, relative and sorted; hidden ones and hidden folders are left out."""
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(parent).relative_to(folder)
        names += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _stamp(folder: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat() if path.exists() else path.lstat()  # a dangling link is an input too, and a reject
        name = os.path.relpath(path, folder)
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
