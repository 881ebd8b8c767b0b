"""Rows of a metadata file, CSV, JSON lines or Parquet, one at a time, as flat dictionaries."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from pipeline.errors import UserError

CSV_FIELD_LIMIT = 2**24  # characters; the module's own limit is shorter than some polygon lists
DELIMITERS = (",", ";", "\t")
ROWS_AT_ONCE = 1024

Row = dict[str, Any]


@dataclass(frozen=True)
class TornRow:
    """A row of a CSV file with more or fewer cells than the header: any of them may be of another column."""

    line: int
    """Line of the file in which the row begins, from 1."""
    cells: Row
    """The cells by column, filled in from the left; None where they are missing."""
    problem: str


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table; `{"video_info": {"vid_id": 7}}` becomes `{"video_info.vid_id": 7}`.

    Raises:
        UserError: The file is absent, of another kind, or malformed; the sentence says where.
    """
    for row in scan_rows(path):
        if isinstance(row, TornRow):
            raise UserError(f"line {row.line} of {path} has {row.problem}; correct it")
        yield row


def scan_rows(path: Path) -> Iterator[Row | TornRow]:
    """The rows of a table as `read_rows` gives them, and also the rows that cannot be used.

    Raises:
        UserError: The file is absent, of another kind, or malformed beyond single rows.
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
    except UnicodeDecodeError as error:
        raise UserError(f"the metadata file {path} is malformed: {error}; save it as UTF-8") from error
    except (csv.Error, pyarrow.ArrowException) as error:
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


def _read_csv(path: Path) -> Iterator[Row | TornRow]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header: list[str] = []
        for line, cells in _read_cells(stream, _sniff_delimiter(stream)):
            if not header:
                header = cells
                _check_names(header, path)
                continue
            row = {**dict.fromkeys(header), **dict(zip(header, cells, strict=False))}
            if len(cells) == len(header):
                yield row
            else:
                yield TornRow(line, row, f"{len(cells)} cells, the header has {len(header)}")


def _sniff_delimiter(stream: TextIO) -> str:
    """The most frequent delimiter in the header; afterwards the stream is at its beginning again."""
    header = next((line for line in stream if line.strip()), "")
    stream.seek(0)
    return max(DELIMITERS, key=re.sub(r'"[^"]*"', "", header).count)


def _read_cells(stream: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with the lines where they begin; cells in quotes may hold line breaks."""
    reader = csv.reader(stream, delimiter=delimiter)
    line = 1
    for cells in reader:
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _check_names(names: Iterable[str], path: Path) -> None:
    """Refuse several columns with the same name, of which only one would be read; nameless columns are ignored."""
    counts = Counter(name.strip().lower() for name in names)
    doubled = next((name for name, count in counts.items() if name and count > 1), None)
    if doubled is not None:
        raise UserError(f"the metadata file {path} has {counts[doubled]} columns {doubled!r}; leave only one of them")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                flat = flatten(row) if isinstance(row, dict) else None
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {number} of {path} is not JSON: {error}") from error
            if flat is None:
                raise UserError(f"line {number} of {path} is not a JSON object, but {line.strip()[:40]!r}")
            yield flat


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
    _check_names(pyarrow.parquet.read_schema(path).names, path)
    yield from map(flatten, iterate_parquet(path))


Reader = Callable[[Path], Iterator[Row | TornRow]]
READERS: dict[str, Reader] = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
