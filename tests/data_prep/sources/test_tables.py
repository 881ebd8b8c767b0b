"""Rows of tables: whatever the delimiter, and never a cell in another column's place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.sources.tables import TornRow, read_rows, scan_rows
from pipeline.errors import UserError


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "metadata.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_delimiter_is_that_of_the_header(tmp_path, delimiter, encoding, newline):
    lines = [("file_name", '"label"', "note"), ("é.jpg", "1", '"a, b; c\td"'), ("b.jpg", "", "")]
    path = write(tmp_path, newline.join(delimiter.join(line) for line in lines), encoding)
    assert list(read_rows(path)) == [
        {"file_name": "é.jpg", "label": "1", "note": "a, b; c\td"},
        {"file_name": "b.jpg", "label": "", "note": ""},
    ]


def test_delimiters_inside_a_quoted_name_do_not_count(tmp_path):
    path = write(tmp_path, 'file_name,"a;b;c;d"\nx.jpg,1\n')
    assert list(read_rows(path)) == [{"file_name": "x.jpg", "a;b;c;d": "1"}]


def test_a_single_column_and_blank_lines_are_fine(tmp_path):
    assert list(read_rows(write(tmp_path, '\n\nfile_name\n\na.jpg\n""\n\n'))) == [
        {"file_name": "a.jpg"},
        {"file_name": ""},
    ]
    assert list(read_rows(write(tmp_path, "\n"))) == []


def test_rows_of_another_length_than_the_header_are_torn_and_know_their_line(tmp_path):
    text = 'a,b,c\n1,"two\nlines",3\n\n1,"2\n2"\n1,2,3,4\n1,2,\n'
    assert list(scan_rows(write(tmp_path, text))) == [
        {"a": "1", "b": "two\nlines", "c": "3"},
        TornRow(5, {"a": "1", "b": "2\n2", "c": None}, "2 cells, the header has 3"),
        TornRow(7, {"a": "1", "b": "2", "c": "3"}, "4 cells, the header has 3"),
        {"a": "1", "b": "2", "c": ""},
    ]


def test_a_torn_row_ends_the_reading_where_every_row_counts(tmp_path):
    rows = read_rows(write(tmp_path, "a,b\n1,2\n3\n"))
    assert next(rows) == {"a": "1", "b": "2"}
    with pytest.raises(UserError, match=r"line 3 of .*metadata\.csv has 1 cells, the header has 2"):
        next(rows)


@pytest.mark.parametrize("header", ["file_name,label,label", "file_name,label, Label"])
def test_a_doubled_column_is_refused(tmp_path, header):
    with pytest.raises(UserError, match=r"metadata\.csv has 2 columns 'label'; leave only one"):
        list(read_rows(write(tmp_path, f"{header}\na.jpg,1,0\n")))


def test_columns_without_a_name_may_be_several(tmp_path):
    (row,) = read_rows(write(tmp_path, "file_name,,\na.jpg,x,y\n"))
    assert row["file_name"] == "a.jpg"


def test_a_doubled_column_of_a_parquet_file_is_refused(tmp_path):
    columns = [pyarrow.array(["a.jpg"]), pyarrow.array([1]), pyarrow.array([0])]
    table = pyarrow.Table.from_arrays(columns, names=["file_name", "label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "metadata.parquet")
    with pytest.raises(UserError, match="2 columns 'label'"):
        list(read_rows(tmp_path / "metadata.parquet"))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_than_utf_8_is_told_with_the_way_out(tmp_path, encoding):
    with pytest.raises(UserError, match=r"is malformed: .*; save it as UTF-8"):
        list(read_rows(write(tmp_path, "file_name\né.jpg\n", encoding)))


@pytest.mark.parametrize("open_mark", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [990, 100_000])
def test_a_line_nested_without_end_is_malformed(tmp_path, open_mark, depth):
    close_mark = "]" if open_mark == "[" else "}"
    path = tmp_path / "metadata.jsonl"
    path.write_text(json.dumps({"file_name": "a.jpg"}) + "\n" + open_mark * depth + "1" + close_mark * depth + "\n")
    with pytest.raises(UserError, match=r"line 2 of .* is not"):
        list(read_rows(path))
