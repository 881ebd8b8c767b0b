"""Rows of tables: whatever the delimiter, and never a cell in another column's place."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.sources.metadata import parse_gps, select_fields
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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_the_encodings_of_spreadsheets_are_read(tmp_path, capsys, encoding, suffix):
    path = tmp_path / f"metadata{suffix}"
    rows = [{"file_name": f"é{number}.jpg", "label": "1"} for number in range(50)]
    mark = "\t" if suffix == ".tsv" else ";"
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    if suffix != ".jsonl":
        text = "\r\n".join([f"file_name{mark}label", *(f"{row['file_name']}{mark}1" for row in rows), ""])
    path.write_bytes(text.encode(encoding))
    assert list(read_rows(path)) == rows
    told = capsys.readouterr().err
    assert told.count("is not UTF-8 (byte 0xe9 in line ") == (encoding == "cp1252")


def test_a_byte_that_no_known_encoding_has_is_told_with_its_line(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_bytes(b"file_name\na.jpg\n" * 300_000 + b"\x81.jpg\n")
    with pytest.raises(UserError, match=r"line 600001 of .* byte 0x81, which is neither .*; save it as UTF-8"):
        list(read_rows(path))


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=|"])
def test_excels_line_that_names_the_separator_is_followed(tmp_path, first):
    mark = first.strip('"')[-1]
    path = write(tmp_path, f"{first}\nfile_name{mark}note, long\na.jpg{mark}x, y\nb.jpg\n")
    assert list(scan_rows(path)) == [
        {"file_name": "a.jpg", "note, long": "x, y"},
        TornRow(4, {"file_name": "b.jpg", "note, long": None}, "1 cells, the header has 2"),
    ]


def test_numbers_that_are_none_read_as_empty_or_as_their_text(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"a": NaN, "b": Infinity, "c": ' + "9" * 5000 + "}\n")
    (row,) = read_rows(path)
    assert row == {"a": None, "b": "Infinity", "c": "9" * 40}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"label": 1, "label": 0}', "line 2 of .* is not a row of JSON: it has the key 'label' twice"),
        ('{"label": 1, "Label ": 0}', "2 columns 'label'"),
        ('{"label": 1', "line 2 of .* is not a row of JSON"),
        ("null", "line 2 of .* is not a JSON object"),
        ('{"a": "\x00"}', "line 2 of .* is not a row of JSON"),
    ],
)
def test_a_row_of_json_that_is_none_is_told_with_its_line(tmp_path, line, sentence):
    path = tmp_path / "metadata.jsonl"
    path.write_text(f'{{"file_name": "a.jpg"}}\n{line}\n')
    with pytest.raises(UserError, match=sentence):
        list(read_rows(path))


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_random_damage_is_rows_or_one_sentence(tmp_path, suffix, seed):
    pick = random.Random(f"{seed} {suffix}")
    path = tmp_path / f"metadata{suffix}"
    rows = [{"file_name": f"{n}.jpg", "label": n % 2, "gps": "39.7, -86.1", "note": 'Cönes, "x"'} for n in range(9)]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    sound = path.read_bytes()
    for _ in range(10):
        data = bytearray(sound)
        for _ in range(pick.randint(1, 4)):
            data[pick.randrange(len(data))] = pick.randrange(256)
        path.write_bytes(data[: pick.choice([None, pick.randrange(len(data))])])
        sentence = ""
        try:
            for row in scan_rows(path):
                parse_gps(select_fields(row.cells if isinstance(row, TornRow) else row))
        except UserError as error:
            sentence = str(error)
        assert "\n" not in sentence


@pytest.mark.parametrize("open_mark", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [990, 100_000])
def test_a_line_nested_without_end_is_malformed(tmp_path, open_mark, depth):
    close_mark = "]" if open_mark == "[" else "}"
    path = tmp_path / "metadata.jsonl"
    path.write_text(json.dumps({"file_name": "a.jpg"}) + "\n" + open_mark * depth + "1" + close_mark * depth + "\n")
    with pytest.raises(UserError, match=r"line 2 of .* is not"):
        list(read_rows(path))
