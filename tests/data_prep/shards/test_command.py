"""The command `shard`, from a folder of photos to tars and an index."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import webdataset

from data_prep.shards.command import shard
from pipeline.data.index import SAFE_KEY, SPLITS, read_index
from pipeline.errors import UserError
from tests.data_prep.examples import (
    CITIES,
    city_rows,
    content,
    encode,
    jpeg,
    jpeg_at,
    pixels,
    read,
    write_folder,
    write_table,
)
from tests.data_prep.sources.test_hub import natix, write_parquet

PLAIN: dict[str, Any] = {"workers": 1, "shard_mb": 0.03, "clusters": 3}


def uneven_rows() -> list[dict[str, Any]]:
    sizes = {"Lyon": 3, "Lima": 4, "Quito": 2}
    return [row for row in city_rows(6) if int(row["file_name"][-5]) < sizes.get(row["city_name"], 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight cities of two to six photos each, one of which has a mask."""
    path = tmp_path_factory.mktemp("photos")
    rows = uneven_rows()
    (path / "masks").mkdir()
    (path / "masks" / "m.png").write_bytes(encode(np.full((64, 96), 2, dtype=np.uint8), "PNG"))
    rows[5] |= {"mask": "masks/m.png", "weather": "['Sunny', 'Hail']"}
    return write_folder(path, rows)


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "shards"
    assert shard(folder, out, **PLAIN) == out / "summary.json"
    return out


def test_the_index_describes_what_lies_in_the_tars(folder, shards):
    index = read_index(shards)
    rows = {row["file_name"]: row for row in uneven_rows()}
    seen = []
    for name, samples in read(shards, index).items():
        for (record, members), sample in zip(samples, index.splits[name].samples, strict=True):
            assert (record.key, record.split, record.label) == (sample.key, name, sample.label)
            assert (record.group, record.gps_cluster) == (sample.group, sample.cluster)
            assert (record.sample_weight, record.width, record.height) == (sample.weight, 96, 64)
            assert SAFE_KEY.fullmatch(record.key)
            assert members["jpg"] == (folder / record.source).read_bytes()
            assert record.sha256 == hashlib.sha256(members["jpg"]).hexdigest()
            assert record.label == rows[record.source]["label"]
            assert list(record.metadata.gps or ()) == json.loads(rows[record.source]["gps"])
            assert ("mask.png" in members) == (record.source == "Oslo-5.jpg")
            seen.append(record.source)
    assert sorted(seen) == sorted(rows)
    assert len({s.key for split in index.splits.values() for s in split.samples}) == len(rows)
    for split in index.splits.values():
        for tar in split.shards:
            data = (shards / tar.name).read_bytes()
            assert (tar.bytes, tar.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert index.unknown_words == {"weather": {"Hail": 1}}


def test_stock_webdataset_reads_the_tars(shards):
    index = read_index(shards)
    split = index.splits["train"]
    assert len(split.shards) > 1
    urls = [str(shards / tar.name) for tar in split.shards]
    found = list(webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None, empty_check=False))
    assert [sample["__key__"] for sample in found] == [sample.key for sample in split.samples]
    assert all(json.loads(sample["json"])["key"] == sample["__key__"] for sample in found)
    decoded = next(iter(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")))
    assert decoded["jpg"].shape == (64, 96, 3)


def test_test_cities_are_absent_from_training(shards):
    cities = {
        name: {record.metadata.city for record, _ in samples}
        for name, samples in read(shards, read_index(shards)).items()
    }
    assert cities.keys() == set(SPLITS)
    assert cities["train"] | cities["val"] | cities["test"] == set(CITIES)
    assert not cities["train"] & (cities["test"] | cities["val"])
    assert not cities["test"] & cities["val"]


def test_training_samples_are_mixed_and_the_others_keep_their_order(shards):
    keys = {name: [s.key for s in split.samples] for name, split in read_index(shards).splits.items()}
    assert keys["train"] != sorted(keys["train"])
    assert keys["test"] == sorted(keys["test"])


def test_the_summary_counts_everything(shards):
    summary = json.loads((shards / "summary.json").read_text())
    index = read_index(shards)
    assert (summary["inputs"], summary["written"], summary["rejected"]) == (39, 39, {})
    assert summary["split_rule"] == "cities"
    assert summary["masks"] == 1
    assert summary["fields"]["gps"]["null_rate"] == 0
    assert summary["fields"]["weather"]["null_rate"] == pytest.approx(38 / 39, abs=1e-4)
    for name, split in index.splits.items():
        counted = summary["splits"][name]
        assert counted["samples"] == len(split.samples) == counted["roadwork"] + counted["none"]
    assert sum(cluster.samples for cluster in index.clusters) == 39
    assert (shards / "rejects.jsonl").read_text() == ""


def test_weights_of_training_have_mean_one_and_all_others_are_one(shards):
    index = read_index(shards)
    assert np.isclose(index.splits["train"].weights.mean(), 1, atol=1e-5)
    assert (index.splits["val"].weights == 1).all()
    assert (index.splits["test"].weights == 1).all()


def test_the_index_says_what_share_of_training_each_cluster_and_class_is_to_have(shards):
    index = read_index(shards)
    rows = pd.DataFrame([vars(sample) for sample in index.splits["train"].samples])
    masses = rows.groupby(["cluster", "label"])["weight"].sum() / rows["weight"].sum()
    found = {(int(cluster), name): share for cluster, of in index.asked_shares.items() for name, share in of.items()}
    assert found == pytest.approx(
        {(cluster, ("none", "roadwork")[label]): share for (cluster, label), share in masses.items()}, abs=1e-5
    )
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)


def test_shards_made_before_the_balance_could_be_chosen_are_those_of_full_balance(folder, shards, tmp_path):
    older = shutil.copytree(shards, tmp_path / "older")
    values = json.loads((older / "index.json").read_text())
    del values["arguments"]["balance"], values["asked_shares"]
    (older / "index.json").write_text(json.dumps(values))
    assert read_index(older).asked_shares is None
    assert shard(folder, older, **{**PLAIN, "balance": 1.0}) == older / "summary.json"
    with pytest.raises(UserError, match=r"made with --balance 1\.0, not 0\.5"):
        shard(folder, older, **{**PLAIN, "balance": 0.5})


def test_bytes_do_not_depend_on_the_number_of_workers(folder, shards, tmp_path):
    shard(folder, tmp_path / "two", **{**PLAIN, "workers": 2})
    assert content(tmp_path / "two") == content(shards)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"clusters": 5}, {"temper": 1.0}, {"balance": 1.0}, {"test_share": 0.3}, {"distance_m": 400.0}],
)
def test_every_content_argument_changes_the_content(folder, shards, tmp_path, change):
    shard(folder, tmp_path / "other", **{**PLAIN, **change})
    assert read_index(tmp_path / "other").splits != read_index(shards).splits


def test_a_finished_folder_is_kept_at_once(folder, shards, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert shard(folder, shards, **PLAIN) == shards / "summary.json"
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before
    err = capsys.readouterr().err
    assert "finished already" in err
    assert "checking" not in err


def test_groups_never_straddle_splits(tmp_path):
    rows = city_rows(8, 4)
    rng = np.random.default_rng(0)
    for row in rows:
        row["vid_id"] = str(rng.integers(0, 12)) if rng.random() < 0.6 else ""
        if rng.random() < 0.4:
            row["gps"], row["city_name"] = "", ""
    source = write_folder(tmp_path / "in", rows)
    copy = encode(pixels(0), quality=40)  # of the first photo
    (source / rows[20]["file_name"]).write_bytes(copy)
    shard(source, tmp_path / "out", workers=1)
    home: dict[int, str] = {}
    by_video: dict[str, set[str]] = {}
    where = {}
    for name, samples in read(tmp_path / "out", read_index(tmp_path / "out")).items():
        for record, _ in samples:
            assert home.setdefault(record.group, name) == name
            where[record.source] = name
    for row in rows:
        if row["vid_id"]:
            by_video.setdefault(row["vid_id"], set()).add(where[row["file_name"]])
    assert all(len(splits) == 1 for splits in by_video.values())
    assert where[rows[0]["file_name"]] == where[rows[20]["file_name"]]


def test_the_sources_splits_are_kept_on_request(tmp_path):
    rows = city_rows(2, 3)
    for number, row in enumerate(rows):
        row["split"] = ("train", "validation", "test")[number % 3]
    source = write_folder(tmp_path / "in", rows)
    shard(source, tmp_path / "out", splits="keep", workers=1)
    where = {r.source: name for name, samples in read(tmp_path / "out", read_index(tmp_path / "out")).items()
             for r, _ in samples}  # fmt: skip
    assert where == {row["file_name"]: row["split"].replace("validation", "val") for row in rows}


def test_a_streamed_source_gives_the_same_photos_and_leaves_no_copy(tmp_path):
    write_parquet(tmp_path / "in" / "data" / "train-00000-of-00001.parquet", natix([0, 1, 0, 1, 1]))
    shard(tmp_path / "in", tmp_path / "out", workers=1)
    index = read_index(tmp_path / "out")
    photos = {r.source: m["jpg"] for samples in read(tmp_path / "out", index).values() for r, m in samples}
    assert photos == {f"data/train-00000-of-00001.parquet#{seed}": jpeg(seed) for seed in range(5)}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.json", "map.png", "summary.json", "rejects.jsonl"} | {
        tar.name for split in index.splits.values() for tar in split.shards
    }


@pytest.mark.parametrize(
    ("row", "expected"),
    [(None, (50.5, 8.25)), ({"label": "1"}, (50.5, 8.25)), ({"gps": ""}, None), ({"gps": "[1.0, 2.0]"}, (1, 2))],
)
def test_exif_says_the_place_unless_a_table_has_a_column_for_it(tmp_path, row, expected):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg_at(0, 50.5, 8.25))
    if row is not None:
        write_table(tmp_path / "in" / "metadata.csv", [{"file_name": "a.jpg", **row}])
    shard(tmp_path / "in", tmp_path / "out", workers=1)
    [(record, _)] = read(tmp_path / "out", read_index(tmp_path / "out"))["train"]
    assert record.metadata.gps == expected


def test_a_bare_folder_of_real_photos_takes_gps_from_exif(street_photos, tmp_path):
    summary = json.loads(shard(street_photos, tmp_path / "out", workers=1).read_text())
    assert (summary["inputs"], summary["written"], summary["fields"]["gps"]["null_rate"]) == (32, 32, 0)
    records = [r for samples in read(tmp_path / "out", read_index(tmp_path / "out")).values() for r, _ in samples]
    for record in records:
        place = (55.698, 13.195) if record.source.startswith("lund") else (52.519, 13.400)
        assert record.metadata.gps == pytest.approx(place, abs=0.005)
        assert record.label is None
