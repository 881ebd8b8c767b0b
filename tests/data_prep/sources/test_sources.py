"""Sources: every input is yielded once, in a fixed order, whatever the layout."""

from __future__ import annotations

import json
import os
import re
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.sources.content import Location, content_from_json, content_to_json
from data_prep.sources.opening import open_source
from pipeline.errors import UserError
from tests.data_prep.examples import jpeg, write_table


def test_a_bare_folder_is_searched_in_order_and_hidden_files_are_not(tmp_path):
    for name in ("b/2.JPG", "a.png", "b/1.jpeg", "c.webp", "notes.txt", ".hidden/3.jpg", ".4.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = open_source(tmp_path)
    assert [item.name for item in source] == ["a.png", "b/1.jpeg", "b/2.JPG", "c.webp"]
    assert source.total == 4


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_is_found_and_read_in_each_format(tmp_path, suffix):
    rows = [
        {"file_name": "a.jpg", "label": "1", "video_info": {"vid_id": "v1"}, "gps": "[1.5, 2.5]"},
        {"file_name": "sub/b.jpg", "label": "", "video_info": {"vid_id": "v2"}, "gps": ""},
    ]
    (tmp_path / "sub").mkdir()
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(jpeg(0))
    table = tmp_path / f"metadata{suffix}"
    if suffix == ".csv":
        flat = [{**row, "video_info.vid_id": row["video_info"]["vid_id"]} for row in rows]
        write_table(table, [{k: v for k, v in row.items() if k != "video_info"} for row in flat])
    elif suffix == ".jsonl":
        table.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    first, second = open_source(tmp_path)
    assert first.name == "a.jpg"
    assert first.fields == {"label": "1", "gps": "[1.5, 2.5]", "video": "v1"}
    assert second.name == "sub/b.jpg"
    assert isinstance(second.photo, Location)
    assert second.photo.read() == jpeg(0)


def test_every_row_and_every_photo_without_a_row_is_accounted_for(tmp_path):
    for name in ("a.jpg", "b.jpg", "extra.jpg", "mask.png"):
        (tmp_path / name).write_bytes(b"x")
    rows = [
        {"file_name": "a.jpg", "mask": "mask.png"},
        {"file_name": "./a.jpg", "mask": ""},
        {"file_name": "gone.jpg", "mask": ""},
        {"file_name": "", "mask": ""},
        {"file_name": "../outside.jpg", "mask": ""},
        {"file_name": "/etc/hostname", "mask": ""},
        {"file_name": "x" * 300 + ".jpg", "mask": ""},
        {"file_name": "b.jpg", "mask": "no-mask.png"},
    ]
    write_table(tmp_path / "metadata.csv", rows)
    source = open_source(tmp_path)
    items = list(source)
    assert source.total == len(items) == 9
    assert [item.problem for item in items] == [
        "",
        "an earlier row names the same photo",
        *["the photo is missing"] * 5,
        "the mask is missing",
        "no row in metadata.csv",
    ]
    assert [item.name for item in items if item.photo] == ["a.jpg"]


def test_a_row_that_does_not_fit_the_header_is_a_reject_by_the_photos_name_or_the_line(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    lines = [
        "description,file_name,label",
        "Cones, a lane,a.jpg,1",  # the comma shifts what follows
        "fine,b.jpg,1",
        "short,c.jpg",
        "",
        "tiny",
        "long,d.jpg,0,0",
        "late,c.jpg,0",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    source = open_source(tmp_path)
    items = list(source)
    assert source.total == len(items) == 7
    assert [(item.name, item.problem) for item in items] == [
        (" a lane", "4 cells, the header has 3"),
        ("b.jpg", ""),
        ("c.jpg", "2 cells, the header has 3"),
        ("metadata.csv line 6", "1 cells, the header has 3"),
        ("d.jpg", "4 cells, the header has 3"),
        ("c.jpg", ""),
        ("a.jpg", "no row in metadata.csv"),
    ]
    assert [item.photo is not None for item in items] == [not item.problem for item in items]


def test_absolute_paths_inside_the_source_are_found(tmp_path):
    folder, alias = tmp_path / "folder", tmp_path / "alias"
    (folder / "sub").mkdir(parents=True)
    alias.symlink_to(folder)
    names = ["a.jpg", "sub/b.jpg", "c.jpg"]
    for name in names:
        (folder / name).write_bytes(b"x")
    (tmp_path / "folder-2").mkdir()
    (tmp_path / "folder-2" / "d.jpg").write_bytes(b"x")
    cells = [folder / "a.jpg", alias / "sub" / "b.jpg", f"{folder}/./c.jpg"]
    outside = [tmp_path / "folder-2" / "d.jpg", folder / "sub" / ".." / "a.jpg", tmp_path, folder]
    write_table(tmp_path / "table.csv", [{"file_name": cell} for cell in cells + outside])
    items = list(open_source(alias, tmp_path / "table.csv"))
    assert [item.name for item in items if item.photo] == names
    assert [item.problem for item in items[3:]] == ["the photo is missing"] * len(outside)


def test_blanks_around_a_name_are_dropped_unless_a_file_is_called_so(tmp_path):
    for name in (" a.jpg", "a.jpg", "b.jpg", "c.jpg "):
        (tmp_path / name).write_bytes(name.encode())
    write_table(tmp_path / "metadata.csv", [{"file_name": name} for name in (" a.jpg", "a.jpg ", " b.jpg", "c.jpg ")])
    items = list(open_source(tmp_path))
    assert [item.name for item in items] == [" a.jpg", "a.jpg", "b.jpg", "c.jpg "]
    assert all(item.photo.read() == item.name.encode() for item in items)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [{"file_name": "a.jpg", "Labels": "1"}],
            "metadata.csv has no column 'label'; its columns are file_name, Labels",
        ),
        ([{"file_name": "a.jpg", "Label": ""}], "the column 'label' of .*metadata.csv is empty"),
    ],
)
def test_a_table_knows_why_it_gives_no_label(tmp_path, rows, sentence):
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert open_source(tmp_path).explain_unlabelled() == ""
    write_table(tmp_path / "metadata.csv", rows)
    assert re.search(sentence, open_source(tmp_path).explain_unlabelled())


def test_accented_names_match_in_either_unicode_form(tmp_path):
    (tmp_path / unicodedata.normalize("NFD", "Malmö 東京.jpg")).write_bytes(b"x")
    write_table(tmp_path / "metadata.csv", [{"file_name": unicodedata.normalize("NFC", "Malmö 東京.jpg")}])
    assert [item.problem for item in open_source(tmp_path)] == [""]


def test_the_very_name_goes_before_the_other_unicode_form(tmp_path):
    forms = [unicodedata.normalize(form, "Malmö.jpg") for form in ("NFC", "NFD")]
    for form in forms:
        (tmp_path / form).write_bytes(form.encode())
    write_table(tmp_path / "metadata.csv", [{"file_name": form} for form in forms])
    assert [item.photo.read() for item in open_source(tmp_path)] == [form.encode() for form in forms]


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for path in (outside / "1.jpg", outside / "deep" / "2.jpg", folder / "real" / "3.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(0))
    (folder / "a").symlink_to(outside)
    (folder / "b").symlink_to(outside)  # another way to the same photos
    (folder / "alias").symlink_to(folder / "real")
    (outside / "deep" / "up").symlink_to(folder)
    (folder / "real" / "self").symlink_to(folder / "real")
    items = list(open_source(folder))
    assert [item.name for item in items] == ["a/1.jpg", "a/deep/2.jpg", "real/3.jpg"]
    assert all(item.photo.read() == jpeg(0) for item in items)


def test_a_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(UserError, match="closed cannot be listed: Permission denied"):
        open_source(tmp_path)


def test_names_that_are_no_text_survive_to_the_list_of_rejects(tmp_path):
    names = [os.fsdecode(b"caf\xe9.jpg"), "é" * 120 + ".jpg", "東京.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(jpeg(0))
    odd = ["\ud800.jpg", "x" * 300 + ".jpg", "nul\0.jpg"]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name}) + "\n" for name in odd))
    items = list(open_source(tmp_path))
    assert [item.name for item in items] == [*odd, *sorted(names)]
    assert [item.problem for item in items] == ["the photo is missing"] * 3 + ["no row in metadata.jsonl"] * 3
    for item in items:
        assert json.loads(json.dumps(item.name).encode()) == item.name
    assert open_source(tmp_path).stamp()


def test_a_location_survives_json():
    location = Location("a/b.jpg", offset=3, size=4)
    assert content_from_json(json.loads(json.dumps(content_to_json(location)))) == location


def test_the_stamp_changes_with_the_files_and_only_then(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    before = open_source(tmp_path).stamp()
    assert open_source(tmp_path).stamp() == before
    (tmp_path / "a.jpg").write_bytes(b"xy")
    assert open_source(tmp_path).stamp() != before


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "no photos in"),
        ({"notes.txt": b""}, "no photos in"),
        ({"metadata.csv": b"", "a.jpg": b"x"}, "has no rows"),
        ({"metadata.csv": b"name,label\na.jpg,1\n"}, "no column 'file_name'.*its columns are name, label"),
        ({"metadata.csv": b"file_name\n\xff\x81\n"}, "line 2 of .* byte 0x81, which is neither UTF-8 nor Windows-1252"),
        ({"metadata.jsonl": b'{"file_name": "a.jpg"}\n{oops\n'}, "line 2 of .* is not JSON"),
        ({"metadata.jsonl": b"[1]\n"}, "line 1 of .* is not a JSON object"),
        ({"metadata.parquet": b"PAR1 nothing"}, "malformed"),
        ({"metadata.csv": b"", "metadata.jsonl": b""}, "choose one with --metadata"),
        ({"train-0.parquet": b"PAR1 nothing"}, "not a complete Parquet file"),
    ],
)
def test_folders_that_cannot_be_read_are_the_users_mistake(tmp_path, files, sentence):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        open_source(tmp_path)


def test_missing_paths_are_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a folder.*or a data set on the hub as owner/name"):
        open_source("nowhere")
    with pytest.raises(UserError, match="goes with a folder of photos"):
        open_source("owner/name", tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="--revision main is for a data set on the hub"):
        open_source(tmp_path, revision="main")
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path, tmp_path / "nothing.csv")
    (tmp_path / "table.xlsx").write_bytes(b"")
    with pytest.raises(UserError, match=r"must end in one of \.csv, \.tsv, \.jsonl, \.parquet"):
        open_source(tmp_path, tmp_path / "table.xlsx")
