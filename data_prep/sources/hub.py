"""Data sets in the layout of the Hugging Face hub, with photos in their tables: streamed, or in a local folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data_prep.sources.content import Input, Location
from data_prep.sources.coordinates import is_null
from data_prep.sources.folders import MASK_MISSING, MISSING, list_files, stamp_files
from data_prep.sources.metadata import explain_unlabelled, select_fields, split_in
from data_prep.sources.tables import first_line, flatten, iterate_parquet, shorten
from pipeline.data.photo_files import MAX_FILE_BYTES
from pipeline.errors import UserError
from pipeline.parsing.typed_json import Malformed

# The first that a table has; else the only column of images.
PHOTO_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "photo", "picture", "image_bytes", "image_data")
MASK_COLUMNS = ("mask", "mask.png")
ROWS_AT_ONCE = 16  # they hold photos
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Table:
    """The rows of a split, or of one file of it."""

    address: str
    """The start of the names of the table's inputs."""
    split: str | None
    features: Mapping[str, Any]
    """Columns and their types, as `datasets` has them."""
    total: int | None
    read: Callable[[], Iterable[dict[str, Any]]]
    """A new pass over the rows, with images as they are stored."""

    def class_names(self) -> dict[str, list[str]]:
        """The classes' names, for each column that holds numbers of classes."""
        import datasets  # more than half a second, and the other sources do without

        return {name: kind.names for name, kind in self.features.items() if isinstance(kind, datasets.ClassLabel)}

    def photo_column(self) -> str | None:
        """The column that holds the photos, or None."""
        import datasets

        by_name = {name.strip().lower(): name for name in self.features}
        images = [
            name
            for name, kind in self.features.items()
            if isinstance(kind, datasets.Image) and name not in MASK_COLUMNS
        ]
        named = [by_name[name] for name in PHOTO_COLUMNS if name in by_name]
        return next(iter(named), images[0] if len(images) == 1 else None)


class HubSource:
    """Tables with a photo in each row, read as a stream."""

    def __init__(self, name: str, tables: list[Table], stamp: str, fetch: Callable[[str], Location | bytes | None]):
        """Check the columns; read nothing yet.

        Args:
            name: Name of the data set for the user.
            tables: The tables, in their order.
            stamp: Digest of the data set.
            fetch: Finds the file that a cell names instead of holding it; None if the file is not of this data set.
        """
        self._name, self._tables, self._stamp, self._fetch = name, tables, stamp, fetch
        for table in tables:
            if table.photo_column() is None:
                raise UserError(
                    f"{table.address} in {name} has no column of photos, such as {shorten(PHOTO_COLUMNS[:3])}; "
                    f"its columns are {shorten(table.features)}"
                )
        counts = [table.total for table in tables if table.total is not None]
        self.total: int | None = sum(counts) if len(counts) == len(tables) else None
        if self.total == 0:
            raise UserError(f"the tables in {name} have no rows")

    def stamp(self) -> str:
        """Digest of the files' names, sizes and times, or the commit of a data set on the hub."""
        return self._stamp

    def explain_unlabelled(self) -> str:
        """Why no photo has a label; see `metadata.explain_unlabelled`."""
        return explain_unlabelled(self._name, dict.fromkeys(name for one in self._tables for name in one.features))

    def __iter__(self) -> Iterator[Input]:
        for table in self._tables:
            class_names, photo_column = table.class_names(), table.photo_column()
            assert photo_column is not None
            for number, row in enumerate(table.read()):
                photo = row.pop(photo_column)
                masks = [row.pop(name, None) for name in MASK_COLUMNS]
                mask = next((cell for cell in masks if cell is not None), None)
                for column, names in class_names.items():
                    row[column] = _class_name(row[column], names)
                # Tables that were made from WebDataset tars keep what a .json member held in a column of that name.
                beside, name = row.pop("json", None), f"{table.address}#{number}"
                try:
                    fields = select_fields(flatten({**(beside if isinstance(beside, dict) else {}), **row}))
                except Malformed as error:
                    yield Input(name, None, problem=f"its columns cannot be read: {error}")
                    continue
                if table.split is not None:
                    fields["split"] = table.split
                yield self._input(name, photo, mask, fields)

    def _input(self, name: str, photo_cell: Any, mask_cell: Any, fields: dict[str, Any]) -> Input:
        photo, mask = self._content(photo_cell), self._content(mask_cell)
        if photo is None:
            return Input(name, None, fields, problem=MISSING)
        if mask is None and _is_filled(mask_cell):
            return Input(name, None, fields, problem=MASK_MISSING)
        return Input(name, photo, fields, mask)

    def _content(self, cell: Any) -> Location | bytes | None:
        """The content that a cell (of the image type, a path, or bytes) stands for; an empty file is refused later."""
        if isinstance(cell, dict):
            cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
        if isinstance(cell, str):
            return self._fetch(cell)
        return cell if isinstance(cell, bytes) else None


def open_parquet(folder: Path, files: list[Path]) -> HubSource:
    """Parquet files of a hub data set that was downloaded; splits go by the files' names."""
    import datasets

    tables = []
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                features = datasets.Features.from_arrow_schema(parquet.schema_arrow)
                total = parquet.metadata.num_rows
        # The last three are for damaged notes of `datasets` inside it.
        except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not a complete Parquet file: {first_line(error)}") from error
        address = file.relative_to(folder).as_posix()
        split = split_in(address)
        tables.append(Table(address, split, features, total, partial(_read_parquet, file)))
    return HubSource(str(folder), tables, stamp_files(folder, files), partial(_fetch_below, folder))


def open_saved(folder: Path) -> HubSource:
    """A folder that `save_to_disk` of `datasets` wrote, mapped into memory and never loaded whole."""
    import datasets

    try:
        saved = datasets.load_from_disk(folder)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is not a complete folder of save_to_disk: {first_line(error)}") from error
    splits = saved if isinstance(saved, dict) else {saved.split: saved}
    tables = []
    for split, rows in splits.items():
        name = None if split is None else str(split)
        tables.append(Table(name or "rows", name, rows.features, len(rows), _without_decoding(rows).__iter__))
    stamp = stamp_files(folder, [folder / name for name in list_files(folder)])
    return HubSource(str(folder), tables, stamp, partial(_fetch_below, folder))


def open_hub(name: str, revision: str | None) -> HubSource:
    """A data set on the hub, streamed: nothing is downloaded but what is read.

    Args:
        name: The data set's id, `owner/name`.
        revision: Branch, tag or commit; None for the main branch.

    Raises:
        UserError: The data set cannot be reached, does not exist, or may not be read.
    """
    import datasets
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT_S).sha
        splits = datasets.load_dataset(name, revision=commit, streaming=True)
    except Exception as error:  # several libraries raise errors of their own, and all mean the same to the user
        raise _unreachable(name, error) from error
    tables = []
    for split, rows in splits.items():
        known = (rows.info.splits or {}).get(split)
        total = known.num_examples if known is not None else None
        read = partial(_read_hub, name, _without_decoding(rows))
        tables.append(Table(str(split), str(split), rows.features or {}, total or None, read))
    return HubSource(name, tables, f"{name}@{commit}", partial(_fetch_from_hub, name))


def _without_decoding(rows: Any) -> Any:
    """The same rows, with photos and masks as the bytes that are stored."""
    import datasets

    for column, kind in (rows.features or {}).items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    # Not by `datasets`, which takes several times the memory.
    try:
        yield from iterate_parquet(file, ROWS_AT_ONCE)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is damaged: {first_line(error)}") from error


def _read_hub(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except Exception as error:  # as in `open_hub`
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} is no folder here, and as a data set on the hub it cannot be read: {first_line(error)}; "
        "for a gated or private one, ask for access and log in with `hf auth login`; without a network, run "
        f"`hf download {name} --repo-type dataset --local-dir FOLDER` where there is one and give --source FOLDER"
    )


def _class_name(value: Any, names: list[str]) -> str | None:
    """The name of a class number; None for -1, the hub's mark for a hidden label."""
    if value is None or value < 0:
        return None
    return names[value] if value < len(names) else str(value)


def _is_filled(cell: Any) -> bool:
    return any(cell.values()) if isinstance(cell, dict) else not is_null(cell)


def _fetch_below(folder: Path, path: str) -> Location | None:
    """A file below the data set's folder, judged by its path alone: links there are the user's own."""
    root = os.path.abspath(folder)
    file = os.path.normpath(os.path.join(root, path))
    return Location(file) if file.startswith(root + os.sep) and os.path.isfile(file) else None


def _fetch_from_hub(name: str, path: str) -> bytes | None:
    """The bytes of a file in the data set's repository, which may be in a zip file there."""
    import fsspec

    same_repository = rf"(zip://[^:]+::)?hf://datasets/{re.escape(name)}[@/][^:]+"
    if not re.fullmatch(same_repository, path) or ".." in path.split("/"):
        return None
    try:
        with fsspec.open(path, "rb") as stream:
            return stream.read(MAX_FILE_BYTES + 1)  # one more is rejected as too many
    except FileNotFoundError:
        return None
