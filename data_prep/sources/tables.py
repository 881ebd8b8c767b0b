"""Rows of a metadata file, CSV, JSON lines or Parquet, one at a time, as flat dictionaries."""

from __future__ import annotations

import codecs
import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from pipeline.errors import UserError
from pipeline.parsing.typed_json import Malformed, load_json
from pipeline.progress import say

CSV_FIELD_LIMIT = 2**24  # characters; the module's own limit is shorter than some polygon lists
LONGEST_LINE = 2**26  # bytes of a line of JSON
DELIMITERS = (",", ";", "\t", "|")
DEEPEST = 32  # levels of nested objects in a row
ROWS_AT_ONCE = 1024
SNIFFED_BYTES = 4096
# Excel writes one as the first line of a CSV file: sep=;
SEPARATOR_LINE = re.compile(r"""\s*"?sep=(.)"?\s*""", re.IGNORECASE)
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # in this order, since the longer ones begin like the shorter ones
WINDOWS = "cp1252"

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
        raise UserError(f"the metadata file {path} cannot be read: {error.strerror or first_line(error)}") from error
    except UserError:
        raise
    # pyarrow's own, and Python's for bytes that are no text, and for times that it cannot hold.
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"the metadata file {path} is malformed: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def flatten(row: Row, prefix: str = "", depth: int = 0) -> Row:
    """Join the names of nested dictionaries with dots; every other value stays as it is.

    Raises:
        Malformed: The dictionaries are nested too deeply.
    """
    if depth > DEEPEST:
        raise Malformed(f"it is nested more than {DEEPEST} levels deep")
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}.", depth + 1))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def shorten(names: Iterable[Any], most: int = 20) -> str:
    """Names of columns for the user, each at most 40 characters long, and not more than `most` of them."""
    texts = [text if len(text := str(name)) <= 40 and text.isprintable() else f"{text[:40]!r}..." for name in names]
    return ", ".join(texts[:most] + ([f"and {len(texts) - most} more"] if len(texts) > most else []))


def _read_csv(path: Path) -> Iterator[Row | TornRow]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with path.open(encoding=encoding_of(path), newline="") as stream:
        header: list[str] = []
        for line, cells in _read_cells(stream, *_sniff_delimiter(stream), path):
            if not header:
                header = cells
                _check_names(header, path)
                continue
            row = {**dict.fromkeys(header), **dict(zip(header, cells, strict=False))}
            if len(cells) == len(header):
                yield row
            else:
                yield TornRow(line, row, f"{len(cells)} cells, the header has {len(header)}")


def encoding_of(path: Path) -> str:
    """The encoding of a text file: by its mark, or UTF-8 if it is that, UTF-16 without a mark, or Windows' own.

    Raises:
        UserError: It is none of these.
    """
    status = path.stat()
    return _find_encoding(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)  # tables are read several times, and the user is told once
def _find_encoding(path: Path, changed_ns: int, size: int) -> str:
    with path.open("rb") as stream:
        head = stream.read(SNIFFED_BYTES)
        for mark, name in BYTE_ORDER_MARKS.items():
            if head.startswith(mark):
                return name
        for start, name in ((1, "utf-16-le"), (0, "utf-16-be")):
            if len(head) > 3 and head[start::2].count(0) > len(head) // 4:
                return name
        if (fault := _first_fault(path, "utf-8")) is None:
            return "utf-8"
        line, byte = fault
        if (worse := _first_fault(path, WINDOWS)) is not None:
            raise UserError(
                f"line {worse[0]} of {path} holds the byte 0x{worse[1]:02x}, which is neither UTF-8 nor Windows-1252; "
                "save it as UTF-8"
            )
    say(f"{path} is not UTF-8 (byte 0x{byte:02x} in line {line}) and is read as Windows-1252; if names look wrong, "
        "save it as UTF-8")  # fmt: skip
    return WINDOWS


def _first_fault(path: Path, encoding: str) -> tuple[int, int] | None:
    """Line and byte at which a file is not of an encoding, if it is not."""
    with path.open("rb") as stream:
        decoder = codecs.getincrementaldecoder(encoding)()
        line = 1
        while True:
            data = stream.read(1 << 20)
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                return line + error.object[: error.start].count(b"\n"), error.object[error.start]
            if not data:
                return None
            line += data.count(b"\n")


def _sniff_delimiter(stream: TextIO) -> tuple[str, int]:
    """The delimiter, and the number of lines to skip: the one in Excel's first line, or the header's most frequent.

    Afterwards the stream is at its beginning again.
    """
    header = next((line for line in stream if line.strip()), "")
    stream.seek(0)
    if told := SEPARATOR_LINE.fullmatch(header):
        return told[1], 1
    return max(DELIMITERS, key=re.sub(r'"[^"]*"', "", header).count), 0


def _read_cells(stream: TextIO, delimiter: str, skip: int, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with the lines where they begin; cells in quotes may hold line breaks."""
    reader = csv.reader(stream, delimiter=delimiter)
    line = 1
    try:
        for cells in reader:
            if cells and skip:
                skip -= 1
            elif cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"line {line} of {path} is malformed: {error}") from error


def _check_names(names: Iterable[str], path: Path) -> None:
    """Refuse several columns with the same name, of which only one would be read; nameless columns are ignored."""
    counts = Counter(name.strip().lower() for name in names)
    doubled = next((name for name, count in counts.items() if name and count > 1), None)
    if doubled is not None:
        raise UserError(f"the metadata file {path} has {counts[doubled]} columns {doubled!r}; leave only one of them")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding=encoding_of(path), errors="strict") as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE):
            number += 1
            if not line.strip():
                continue
            try:
                row = load_json(line, lenient=True)
                flat = flatten(row) if isinstance(row, dict) else None
            except Malformed as error:
                raise UserError(f"line {number} of {path} is not a row of JSON: {error}") from error
            if flat is None:
                raise UserError(f"line {number} of {path} is not a JSON object, but {line.strip()[:40]!r}")
            _check_names(flat, path)
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
READERS: dict[str, Reader] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
