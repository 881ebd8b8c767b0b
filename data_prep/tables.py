"""Rows of a metadata file, CSV, JSON lines or Parquet, one at a time, as flat dictionaries."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from pipeline.errors import UserError

CSV_FIELD_LIMIT = 2**24  # characters; the module's own limit is shorter than some polygon lists
ROWS_AT_ONCE = 1024

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table; `{"video_info": {"vid_id": 7}}` becomes `{"video_info.vid_id": 7}`.

    Raises:
        UserError: The file is absent, of another kind, or malformed; the sentence says where.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path} is no metadata file: its name must end in one of {', '.join(READERS)}, or .json for COCO"
        )
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"the metadata file {path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"the metadata file {path} is malformed: {error}") from error


def flatten(row: Row, prefix: str = "") -> Row:
    """Join the names of nested dictionaries with dots; every other value stays as it is."""
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream):
            yield {name: value for name, value in row.items() if name is not None}


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"line {number} of {path} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"line {number} of {path} is not a JSON object, but {line.strip()[:40]!r}")
            yield flatten(row)


def iterate_parquet(path: Path, rows_at_once: int = ROWS_AT_ONCE) -> Iterator[Row]:
    """The rows of a Parquet file, nested as they are; memory holds one row group.

    Raises:
        pyarrow.ArrowException, OSError: The file is damaged.
    """
    with pyarrow.parquet.ParquetFile(path) as table:
        # One by one: when pyarrow is asked for all of them, it keeps all that it has read.
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(rows_at_once, row_groups=[group]):
                yield from batch.to_pylist()


def _read_parquet(path: Path) -> Iterator[Row]:
    return map(flatten, iterate_parquet(path))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
