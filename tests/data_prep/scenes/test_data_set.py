"""`data_prep scenes`: the two layouts, the same bytes for any number of workers, whole runs or none."""

import csv
import io
import json

import numpy as np
import pyarrow.parquet
import pytest
from datasets import load_dataset
from PIL import Image

from data_prep.scenes import STUDY, SceneConfig, render
from data_prep.scenes import data_set as module
from data_prep.scenes.data_set import scenes
from pipeline.errors import UserError

ARGUMENTS = {"images": 14, "size": "320x240", "seed": 921}
# Column names and types as the card of natix-network-org/roadwork states them.
NATIX_TYPES = {
    "id": "int64",
    "width": "int64",
    "height": "int64",
    "license": "int64",
    "flickr_url": "float64",
    "coco_url": "float64",
    "date_captured": "int64",
    "gps": "string",
    "city_name": "string",
    "scene_description": "string",
    "video_info.frame_id": "string",
    "video_info.seq_id": "int64",
    "video_info.vid_id": "string",
    "scene_level_tags.daytime": "string",
    "scene_level_tags.scene_environment": "string",
    "scene_level_tags.travel_alteration": "string",
    "scene_level_tags.weather": "string",
    "label": "int64",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "folder"
    assert scenes(out, workers=1, **ARGUMENTS) == out / "summary.json"
    return out


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "parquet"
    scenes(out, workers=1, format="natix-parquet", **ARGUMENTS)
    return out


def contents(folder):
    """Every file but the summary, which holds the time taken."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "summary.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_folder_holds_a_photo_and_a_mask_for_every_row(folder):
    rows = list(csv.DictReader((folder / "metadata.csv").open()))
    assert next(iter(rows[0])) == "file_name"
    assert set(rows[0]) == {"file_name", "mask", *NATIX_TYPES}
    assert {row["file_name"] for row in rows} | {row["mask"] for row in rows} | {"metadata.csv"} == set(
        contents(folder)
    )
    config = SceneConfig((320, 240), seed=921)
    for index, row in enumerate(rows):
        scene = render(config, index)
        assert int(row["label"]) == scene.label
        np.testing.assert_array_equal(np.asarray(Image.open(folder / row["mask"])), scene.mask)
        photo = np.asarray(Image.open(folder / row["file_name"])).astype(int)
        assert np.abs(photo - scene.image).mean() < 8  # what JPEG costs


def test_the_bytes_do_not_depend_on_the_number_of_workers(folder, tmp_path):
    scenes(tmp_path / "two", workers=2, **ARGUMENTS)
    assert contents(tmp_path / "two") == contents(folder)


def test_datasets_loads_the_parquet_files_with_the_hubs_columns(parquet, tmp_path):
    files = {split: str(parquet / f"data/{split}-*.parquet") for split in ("train", "test")}
    loaded = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert loaded["train"].num_rows + loaded["test"].num_rows == ARGUMENTS["images"]
    features = dict(loaded["train"].features)
    assert type(features.pop("image")).__name__ == "Image"
    assert {name: feature.dtype for name, feature in features.items()} == NATIX_TYPES
    assert loaded["train"][0]["image"].size == (320, 240)


def test_both_layouts_hold_the_same_photos(folder, parquet):
    by_id = {}
    for path in (parquet / "data").iterdir():
        for row in pyarrow.parquet.read_table(path).to_pylist():
            by_id[row["id"]] = row
    assert sorted(by_id) == list(range(ARGUMENTS["images"]))
    for row in csv.DictReader((folder / "metadata.csv").open()):
        other = by_id[int(row["id"])]
        assert other["image"]["bytes"] == (folder / row["file_name"]).read_bytes()
        assert str(other["label"]) == row["label"]
        assert (other["gps"] or "") == row["gps"]


def test_parquet_files_are_cut_and_numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_FILE", 5)
    monkeypatch.setattr(module, "ROWS_PER_GROUP", 2)
    scenes(tmp_path / "out", workers=1, format="natix-parquet", **ARGUMENTS)
    paths = sorted((tmp_path / "out/data").iterdir())
    rows = {path.name: pyarrow.parquet.ParquetFile(path).metadata for path in paths}
    train = {name: meta.num_rows for name, meta in rows.items() if name.startswith("train")}
    total = sum(meta.num_rows for meta in rows.values())
    assert total == ARGUMENTS["images"]
    count = len(train)
    assert count > 1
    assert list(train) == [f"train-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
    assert list(train.values())[:-1] == [5] * (count - 1)
    assert rows[next(iter(train))].num_row_groups == 3


def test_the_summary_states_arguments_and_counts(folder):
    summary = json.loads((folder / "summary.json").read_text())
    labels = [int(row["label"]) for row in csv.DictReader((folder / "metadata.csv").open())]
    assert summary["roadwork"] == sum(labels)
    assert summary["arguments"]["seed"] == 921
    assert "workers" not in summary["arguments"]


def test_a_finished_run_is_kept_and_another_one_refused(folder):
    before = (folder / "summary.json").stat().st_mtime_ns
    assert scenes(folder, **ARGUMENTS) == folder / "summary.json"
    assert (folder / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="not empty"):
        scenes(folder, **{**ARGUMENTS, "seed": 922})


def test_a_run_that_fails_leaves_no_folder_and_its_remains_do_not_matter(tmp_path, monkeypatch, folder):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_scene", fail_at_5)
        with pytest.raises(RuntimeError, match="out of luck"):
            scenes(out, workers=1, **ARGUMENTS)
    assert not out.exists()
    scenes(out, workers=1, **ARGUMENTS)
    assert contents(out) == contents(folder)
    assert list(tmp_path.iterdir()) == [out]


def fail_at_5(config, index, **noise):
    if index == 5:
        raise RuntimeError("out of luck")
    return encode_scene(config, index, **noise)


encode_scene = module.encode_scene


def test_fewer_cities_can_be_asked_for(tmp_path):
    out = tmp_path / "out"
    scenes(out, images=20, size="320x240", cities=2, workers=1)
    rows = csv.DictReader((out / "metadata.csv").open())
    assert {row["city_name"] for row in rows} <= {"boston", "charlotte", "", "nan", "None"}


def test_noise_turns_labels_round_and_keeps_the_true_ones(tmp_path):
    place = {"images": 60, "size": "320x240", "seed": 923, "label_noise": 0.5, "workers": 1}
    scenes(tmp_path / "folder", **place)
    rows = list(csv.DictReader((tmp_path / "folder/metadata.csv").open()))
    wrong = [row["label"] != row["clean_label"] for row in rows]
    assert 0.3 < np.mean(wrong) < 0.7  # 3.1 standard deviations
    for row in rows[:40]:
        mask = np.asarray(Image.open(tmp_path / "folder" / row["mask"]))
        assert mask.any() == (row["clean_label"] == "1")
    scenes(tmp_path / "parquet", **{**place, "images": 5}, format="natix-parquet")
    names = {name for path in (tmp_path / "parquet/data").iterdir() for name in pyarrow.parquet.read_schema(path).names}
    assert "clean_label" not in names


def test_the_studys_scenes_are_a_preset_of_which_the_shift_can_be_changed(tmp_path):
    scenes(tmp_path / "study", images=3, preset="study", city_shift=1.0, workers=1)
    stated = json.loads((tmp_path / "study/summary.json").read_text())["arguments"]
    assert (stated["preset"], stated["city_shift"]) == ("study", 1.0)
    scene = render(SceneConfig(**{**STUDY, "city_shift": 1.0}), 0)
    photo = np.asarray(Image.open(tmp_path / "study/images/000000.jpg")).astype(int)
    assert np.abs(photo - scene.image).mean() < 8


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"images": 0}, "images is 0"),
        ({"size": "1024"}, "size is '1024', but must be WIDTHxHEIGHT"),
        ({"size": "1024xtall"}, "WIDTHxHEIGHT"),
        ({"size": "100x100"}, "size is '100x100'"),
        ({"cities": 25}, "cities is 25"),
        ({"workers": -1}, "workers is -1"),
        ({"difficulty": 2.0}, "difficulty is 2.0"),
        ({"label_noise": 0.6}, "label_noise is 0.6"),
        ({"leak": -0.1}, "leak is -0.1"),
        ({"city_shift": 3.0}, "city_shift is 3.0"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_written(values, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        scenes(tmp_path / "out", **values)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        scenes(tmp_path / "out", **ARGUMENTS)


def test_jpegs_are_plain_rgb_of_the_size_asked_for(folder):
    photo = Image.open(io.BytesIO((folder / "images/000000.jpg").read_bytes()))
    assert (photo.format, photo.mode, photo.size) == ("JPEG", "RGB", (320, 240))
