"""Data sets in the hub's layout: every row once, original bytes, bounded memory, and no trust in paths."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import fsspec
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.sources.content import Location
from data_prep.sources.opening import open_source
from pipeline.errors import UserError
from tests.data_prep.examples import jpeg

TAGS = ("daytime", "scene_environment", "travel_alteration", "weather")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def natix(labels: list[int | None], label_type: Any = None) -> datasets.Dataset:
    """Rows with columns and types of the NATIX set; a label of None comes without a photo."""
    string, number = datasets.Value("string"), datasets.Value("int64")
    features = {
        "image": datasets.Image(),
        "id": number,
        "gps": string,
        "city_name": string,
        "video_info": {"frame_id": string, "seq_id": string, "vid_id": string},
        "scene_level_tags": dict.fromkeys(TAGS, string),
        "label": label_type or number,
    }
    rows = [
        {
            "image": None if label is None else {"bytes": jpeg(seed), "path": f"{seed}.jpg"},
            "id": seed,
            "gps": "[39.77160604, -86.18823935]",
            "city_name": "indianapolis",
            "video_info": {"frame_id": "1", "seq_id": "2", "vid_id": f"v{seed}"},
            "scene_level_tags": dict(zip(TAGS, ("Light", "Urban", "[]", "['Sunny']"), strict=True)),
            "label": label,
        }
        for seed, label in enumerate(labels)
    ]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def write_parquet(path: Path, rows: datasets.Dataset) -> Path:
    """A Parquet file as the hub has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path)
    return path


def write_paths(path: Path, cells: list[Any]) -> None:
    """A Parquet file whose cells name photos instead of holding them."""
    cell = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    images = [{"bytes": None, "path": str(value)} for value in cells]
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(images, cell)}), path)


def test_the_natix_layout_gives_original_bytes_nested_fields_and_the_hubs_split(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", natix([1, 0, None]))
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", natix([1]))
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
        "travel_alteration": "[]",
        "video": "v0",
        "sequence": "2",
        "split": "train",
    }
    assert items[3].problem == "the photo is missing"


def test_saved_splits_are_read_like_parquet_files(tmp_path):
    datasets.DatasetDict(train=natix([1, 0, None]), test=natix([1])).save_to_disk(tmp_path / "saved")
    write_parquet(tmp_path / "parquet" / "train-0.parquet", natix([1, 0, None]))
    write_parquet(tmp_path / "parquet" / "val-0.parquet", natix([1]))
    source, reference = open_source(tmp_path / "saved"), list(open_source(tmp_path / "parquet"))
    items = list(source)
    assert source.total == 4
    assert [item.name for item in items] == ["train#0", "train#1", "train#2", "test#0"]
    assert [item.photo for item in items] == [item.photo for item in reference]
    assert [item.fields for item in items[:3]] == [item.fields for item in reference[:3]]
    assert items[3].fields == {**reference[3].fields, "split": "test"}
    assert list(source) == items


def test_a_saved_set_without_a_split_says_nothing_about_splits(tmp_path):
    natix([1, 0]).save_to_disk(tmp_path)
    items = list(open_source(tmp_path))
    assert [item.name for item in items] == ["rows#0", "rows#1"]
    assert all("split" not in item.fields for item in items)


def test_the_stamp_of_a_saved_set_changes_with_its_files(tmp_path):
    natix([1, 0]).save_to_disk(tmp_path)
    before = open_source(tmp_path).stamp()
    assert open_source(tmp_path).stamp() == before
    (tmp_path / "state.json").touch()
    assert open_source(tmp_path).stamp() != before


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set, served from local files as streams; `hub.asked` holds what was asked of it."""
    files = {
        "train": str(write_parquet(tmp_path / "train.parquet", natix([1, 0, None]))),
        "test": str(write_parquet(tmp_path / "test.parquet", natix([1]))),
    }
    served = SimpleNamespace(commit=COMMIT, asked=[], sizes={}, rows=None)
    stream = datasets.load_dataset

    def dataset_info(self, name, *, revision, timeout):
        served.asked.append((name, revision))
        return SimpleNamespace(sha=served.commit)

    def load_dataset(name, *, revision, streaming):
        assert streaming
        served.asked.append((name, revision))
        splits = served.rows or stream("parquet", data_files=files, streaming=True)
        for split, rows in served.sizes.items():
            splits[split].info.splits = datasets.SplitDict()
            splits[split].info.splits.add(datasets.SplitInfo(split, num_examples=rows))
        return splits

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return served


def test_an_id_streams_every_split_of_one_commit(hub):
    source = open_source("owner/name", revision="v2")
    items = list(source)
    assert hub.asked == [("owner/name", "v2"), ("owner/name", COMMIT)]
    assert [item.name for item in items] == ["train#0", "train#1", "train#2", "test#0"]
    assert [item.photo for item in items] == [jpeg(0), jpeg(1), None, jpeg(0)]
    assert [item.fields["split"] for item in items] == ["train", "train", "train", "test"]
    assert items[0].fields["weather"] == "['Sunny']"


def test_the_size_of_a_stream_is_known_where_the_hub_knows_it(hub):
    assert open_source("owner/name").total is None
    hub.sizes = {"train": 3}
    assert open_source("owner/name").total is None
    hub.sizes = {"train": 3, "test": 1}
    assert open_source("owner/name").total == 4


def test_the_stamp_of_an_id_is_its_commit(hub):
    before = open_source("owner/name").stamp()
    assert open_source("owner/name").stamp() == before
    hub.commit = COMMIT[::-1]
    assert open_source("owner/name").stamp() != before
    assert open_source("owner/other").stamp() != open_source("owner/name").stamp()


def test_without_a_network_the_user_hears_the_way_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sentence = "owner/name is no folder here.*offline mode.*hf download owner/name --repo-type dataset"
    with pytest.raises(UserError, match=sentence) as caught:
        open_source("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("message", ["Dataset 'owner/name' is a gated dataset.\nAsk for access", "404 Not Found\n\n"])
def test_an_id_that_may_not_be_read_is_one_sentence(hub, monkeypatch, message):
    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError(message)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"(gated dataset|404 Not Found);.*hf auth login") as caught:
        open_source("owner/name")
    assert "\n" not in str(caught.value)


def test_a_connection_that_breaks_off_is_the_same_sentence(hub):
    def rows():
        yield {"image": {"bytes": jpeg(0), "path": None}}
        raise ConnectionError("reset by peer")

    features = datasets.Features({"image": datasets.Image(decode=False)})
    hub.rows = {"train": datasets.IterableDataset.from_generator(rows, features=features)}
    items = iter(open_source("owner/name"))
    assert next(items).photo == jpeg(0)
    with pytest.raises(UserError, match="cannot be read: reset by peer"):
        next(items)


def test_photos_beside_a_table_are_found_below_its_folder_only(tmp_path):
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    (tmp_path / "set-2").mkdir()
    (tmp_path / "set-2" / "b.jpg").write_bytes(jpeg(2))
    # The cache of the hub's own tool is a folder of links.
    (folder / "linked.jpg").symlink_to(tmp_path / "secret.jpg")
    inside = ["images/a.jpg", folder / "images" / "a.jpg", "linked.jpg"]
    outside = [
        "../secret.jpg", "images/../../secret.jpg", tmp_path / "secret.jpg", tmp_path / "set-2" / "b.jpg",
        "/etc/hostname", "file:///etc/hostname", "gone.jpg", "images", "nul\0", "x" * 300,
    ]  # fmt: skip
    write_paths(folder / "train.parquet", inside + outside)
    items = list(open_source(folder))
    assert all(isinstance(item.photo, Location) for item in items[:3])
    assert [item.photo.read() for item in items[:3]] == [jpeg(0), jpeg(0), jpeg(1)]
    assert [item.photo for item in items[3:]] == [None] * len(outside)
    assert {item.problem for item in items[3:]} == {"the photo is missing"}


def test_paths_of_a_stream_are_read_from_the_same_repository_only(hub, monkeypatch):
    opened = []

    def fake_open(path, mode):
        opened.append(path)
        if "gone" in path:
            raise FileNotFoundError(path)
        return io.BytesIO(jpeg(0))

    monkeypatch.setattr(fsspec, "open", fake_open)
    inside = [
        f"hf://datasets/owner/name@{COMMIT}/a.jpg",
        f"zip://x/a.jpg::hf://datasets/owner/name@{COMMIT}/a.zip",
        "hf://datasets/owner/name/gone.jpg",
    ]
    outside = [
        "hf://datasets/owner/name2/a.jpg", "hf://datasets/owner/name/../other/a.jpg", "http://169.254.169.254/",
        "a.jpg", "/etc/hostname", "file:///etc/hostname::hf://datasets/owner/name/a",
        "zip://a::file://b::hf://datasets/owner/name/a",
    ]  # fmt: skip
    rows = [{"image": {"bytes": None, "path": path}} for path in inside + outside]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    hub.rows = {"train": datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)}
    items = list(open_source("owner/name"))
    assert opened == inside
    assert [item.photo for item in items] == [jpeg(0), jpeg(0), None, *[None] * len(outside)]


def test_memory_holds_a_row_group_and_not_a_table(tmp_path):
    random, features = np.random.default_rng(0), datasets.Features({"image": datasets.Image(decode=False)})
    rows = [{"image": {"bytes": random.bytes(200_000), "path": None}} for _ in range(160)]  # 32 MB
    table = pyarrow.Table.from_pylist(rows, features.arrow_schema)
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "parquet" / "train.parquet", row_group_size=8)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    del rows, table
    for folder in ("parquet", "saved"):
        before = most = pyarrow.total_allocated_bytes()
        for item in open_source(tmp_path / folder):
            assert len(item.photo) == 200_000
            most = max(most, pyarrow.total_allocated_bytes())
        assert most - before < 10e6, folder


def test_class_numbers_mean_what_their_names_say(tmp_path):
    kind = datasets.ClassLabel(names=["Roadwork", "None"])
    write_parquet(tmp_path / "x.parquet", natix([0, 1, -1], kind))
    assert [item.fields["label"] for item in open_source(tmp_path)] == ["Roadwork", "None", None]
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    beyond = table.set_column(table.schema.get_field_index("label"), "label", pyarrow.array([0, 1, 7]))
    pyarrow.parquet.write_table(beyond, tmp_path / "x.parquet")
    assert [item.fields["label"] for item in open_source(tmp_path)] == ["Roadwork", "None", "7"]


def test_a_mask_comes_with_its_photo_and_a_missing_one_is_a_reject(tmp_path):
    cell = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    photos = [{"bytes": jpeg(seed), "path": None} for seed in range(3)]
    masks = [{"bytes": b"mask", "path": "m.png"}, None, {"bytes": None, "path": "gone.png"}]
    table = pyarrow.table({"image": pyarrow.array(photos, cell), "mask": pyarrow.array(masks, cell)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    items = list(open_source(tmp_path))
    assert [item.mask for item in items] == [b"mask", None, None]
    assert [item.problem for item in items] == ["", "", "the mask is missing"]


def test_a_data_set_knows_why_it_gives_no_label(tmp_path):
    write_parquet(tmp_path / "x.parquet", natix([None]))
    assert open_source(tmp_path).explain_unlabelled() == f"the column 'label' of {tmp_path} is empty"
    write_paths(tmp_path / "x.parquet", ["a.jpg"])
    sentence = f"{tmp_path} has no column 'label'; its columns are image"
    assert open_source(tmp_path).explain_unlabelled() == sentence


def test_tables_without_photos_are_the_users_mistake(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"no column of photos, .*; its columns are label"):
        open_source(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.string())}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="have no rows"):
        open_source(tmp_path)


def test_damaged_files_are_the_users_mistake(tmp_path):
    file = write_parquet(tmp_path / "set" / "x.parquet", natix([1] * 20))
    data = bytearray(file.read_bytes())
    data[4:2000] = bytes(1996)  # pages, not the directory at the end
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.parquet is damaged"):
        list(open_source(tmp_path / "set"))
    natix([1]).save_to_disk(tmp_path / "saved")
    for arrow in (tmp_path / "saved").glob("*.arrow"):
        arrow.unlink()
    with pytest.raises(UserError, match="not a complete folder of save_to_disk"):
        open_source(tmp_path / "saved")


def test_the_hubs_converted_layout_is_read_with_its_splits(tmp_path):
    write_parquet(tmp_path / "default" / "train" / "0000.parquet", natix([1, 0]))
    write_parquet(tmp_path / "default" / "partial-validation" / "0000.parquet", natix([1]))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "0000.parquet").write_bytes(b"unfinished")
    items = list(open_source(tmp_path))
    assert [(item.name, item.fields["split"]) for item in items] == [
        ("default/partial-validation/0000.parquet#0", "validation"),
        ("default/train/0000.parquet#0", "train"),
        ("default/train/0000.parquet#1", "train"),
    ]


def test_several_configurations_are_a_choice(tmp_path):
    for name in ("small", "large"):
        write_parquet(tmp_path / name / "train" / "0000.parquet", natix([1]))
    with pytest.raises(UserError, match="several configurations of a data set: large, small; choose one"):
        open_source(tmp_path)
    assert len(list(open_source(tmp_path / "small"))) == 1


@pytest.mark.parametrize("column", ["img", "jpg", "Image", "picture", "camera"])
@pytest.mark.parametrize("saved", [False, True])
def test_the_column_of_photos_is_known_by_its_name_or_is_the_only_one_of_images(tmp_path, column, saved):
    rows = natix([1, 0]).rename_column("image", column)
    if saved:
        rows.save_to_disk(tmp_path)
    else:
        write_parquet(tmp_path / "train.parquet", rows)
    assert [item.photo for item in open_source(tmp_path)] == [jpeg(0), jpeg(1)]


def test_bare_bytes_are_photos_too(tmp_path):
    table = pyarrow.table({"jpg": pyarrow.array([jpeg(0)], pyarrow.binary()), "label": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
    (item,) = open_source(tmp_path)
    assert (item.photo, item.fields) == (jpeg(0), {"label": 1})


def test_what_a_json_member_of_a_tar_became_is_read(tmp_path):
    row = {"__key__": "a", "jpg": {"bytes": jpeg(0), "path": None}, "json": {"label": 1, "gps": [1.5, 2.5]}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "0.parquet")
    (item,) = open_source(tmp_path)
    assert item.fields == {"label": 1, "gps": [1.5, 2.5]}


def test_a_table_without_photos_is_one_hint_that_names_its_columns(tmp_path):
    table = pyarrow.table({f"column {number}": [1] for number in range(50)})
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
    sentence = r"no column of photos, such as image, img, jpg; its columns are column 0, .*, column 19, and 30 more$"
    with pytest.raises(UserError, match=sentence):
        open_source(tmp_path)
