"""Sources: every input is yielded once, in a fixed order, whatever the layout."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.sources import Location, open_source
from pipeline.errors import UserError
from tests.data_prep.photos import jpeg, write_table


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


def test_accented_names_match_in_either_unicode_form(tmp_path):
    (tmp_path / unicodedata.normalize("NFD", "Malmö 東京.jpg")).write_bytes(b"x")
    write_table(tmp_path / "metadata.csv", [{"file_name": unicodedata.normalize("NFC", "Malmö 東京.jpg")}])
    assert [item.problem for item in open_source(tmp_path)] == [""]


def write_natix(path: Path, labels: list[int | None], label_type: object = None) -> None:
    """A Parquet file with columns and types of the NATIX set; a label of None comes without a photo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    string, number = datasets.Value("string"), datasets.Value("int64")
    tags = ("daytime", "scene_environment", "travel_alteration", "weather")
    features = {
        "image": datasets.Image(),
        "id": number,
        "gps": string,
        "city_name": string,
        "video_info": {"frame_id": string, "seq_id": string, "vid_id": string},
        "scene_level_tags": dict.fromkeys(tags, string),
        "label": label_type or number,
    }
    rows = [
        {
            "image": None if label is None else {"bytes": jpeg(seed), "path": f"{seed}.jpg"},
            "id": seed,
            "gps": "[39.77160604, -86.18823935]",
            "city_name": "indianapolis",
            "video_info": {"frame_id": "1", "seq_id": "2", "vid_id": f"v{seed}"},
            "scene_level_tags": dict(zip(tags, ("Light", "Urban", "[]", "['Sunny']"), strict=True)),
            "label": label,
        }
        for seed, label in enumerate(labels)
    ]
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(path)


def test_the_natix_layout_gives_original_bytes_nested_fields_and_the_hubs_split(tmp_path):
    write_natix(tmp_path / "data" / "train-00000-of-00001.parquet", [1, 0, None])
    write_natix(tmp_path / "data" / "test-00000-of-00001.parquet", [1])
    source = open_source(tmp_path)
    items = list(source)
    assert source.total == 4
    assert [item.fields["split"] for item in items] == ["test", "train", "train", "train"]
    assert [item.photo for item in items] == [jpeg(0), jpeg(0), jpeg(1), None]
    assert items[1].name == "data/train-00000-of-00001.parquet#0"
    assert items[1].fields == {
        "label": 1,
        "gps": "[39.77160604, -86.18823935]",
        "weather": "['Sunny']",
        "daytime": "Light",
        "scene": "Urban",
        "city": "indianapolis",
        "video": "v0",
        "sequence": "2",
        "split": "train",
    }
    assert items[3].problem == "the photo is missing"


def test_class_numbers_mean_what_their_names_say(tmp_path):
    write_natix(tmp_path / "x.parquet", [0, 1, -1], datasets.ClassLabel(names=["Roadwork", "None"]))
    assert [item.fields["label"] for item in open_source(tmp_path)] == ["Roadwork", "None", None]


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
        ({"metadata.csv": b"file_name\n\xff\xfe\n"}, "malformed"),
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
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path, tmp_path / "nothing.csv")
    (tmp_path / "table.xlsx").write_bytes(b"")
    with pytest.raises(UserError, match=r"must end in one of \.csv, \.jsonl, \.parquet"):
        open_source(tmp_path, tmp_path / "table.xlsx")


def test_parquet_without_photos_is_the_users_mistake(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no column 'image'"):
        list(open_source(tmp_path))
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.string())}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="have no rows"):
        open_source(tmp_path)
