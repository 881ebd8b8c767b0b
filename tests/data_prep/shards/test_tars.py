"""Shards as tars for others, and tars as a source of shards: what goes in comes out again."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from data_prep.shards.command import shard
from pipeline.data.index import read_index
from pipeline.errors import UserError
from tests.data_prep.examples import city_rows, encode, jpeg, pixels, read, write_folder

DOCS = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def write_source(folder: Path, per_city: int = 3) -> Path:
    """Photos in several formats, of which some have masks, videos, and metadata."""
    rows = city_rows(per_city)
    for number, row in enumerate(rows):
        row |= {"mask": f"mask-{number}.png" if number % 3 == 1 else "", "label": ("0", "1", "")[number % 3]}
        row |= {"weather": "['Sunny', 'Wet']" if number % 2 else "", "daytime": "Dark" if number % 4 else ""}
        row |= {"description": 'A cone, "é"' if number % 5 else "", "seq_id" if number % 2 else "vid_id": number // 4}
        if number % 4 == 3:
            row["gps"] = ""
    write_folder(folder, rows)
    for number, row in enumerate(rows):
        if row["mask"]:
            (folder / row["mask"]).write_bytes(encode(np.full((64, 96), number % 7, np.uint8), "PNG"))
        if number % 5 == 2:
            (folder / row["file_name"]).write_bytes(encode(pixels(number), "PNG"))
        if number % 5 == 3:
            (folder / row["file_name"]).write_bytes(encode(pixels(number), "WEBP"))
    return folder


def samples_of(shards: Path) -> list[Any]:
    """What a round trip must keep of each sample, by the photo's hash."""
    found = [
        (r.sha256, r.label, r.split, r.video, r.metadata, {end: data for end, data in members.items() if end != "json"})
        for samples in read(shards, read_index(shards)).values()
        for r, members in samples
    ]
    return sorted(found, key=lambda sample: str(sample[0]))


def test_shards_as_a_source_give_the_same_photos_labels_metadata_masks_and_splits(tmp_path):
    write_source(tmp_path / "in")
    shard(tmp_path / "in", tmp_path / "first", workers=1, shard_mb=0.02)
    assert len(list((tmp_path / "first").glob("*.tar"))) > 4
    shard(tmp_path / "first", tmp_path / "second", workers=1, splits="keep")
    first = samples_of(tmp_path / "first")
    assert samples_of(tmp_path / "second") == first
    assert len(first) == 24
    assert {len(sample[5]) for sample in first} == {1, 2}
    assert read_index(tmp_path / "second").arguments["source_kind"] == "photographs"


def test_the_kind_of_the_photos_goes_with_the_shards(tmp_path):
    source = write_folder(tmp_path / "in", city_rows(1))
    (source / "summary.json").write_text(json.dumps({"kind": "procedural scenes"}))
    shard(source, tmp_path / "first", workers=1)
    shard(tmp_path / "first", tmp_path / "second", workers=1)
    assert read_index(tmp_path / "second").arguments["source_kind"] == "procedural scenes"


def test_a_photo_that_is_not_what_its_record_says_is_a_reject(tmp_path):
    shard(write_folder(tmp_path / "in", city_rows(1)), tmp_path / "first", workers=1)
    tar = next((tmp_path / "first").glob("train-*.tar"))
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        photo = next(member for member in opened if member.name.endswith(".jpg"))
    data[photo.offset_data + 40] ^= 1  # in the quantization table: it still decodes
    tar.write_bytes(data)
    shard(tmp_path / "first", tmp_path / "second", workers=1)
    (reject,) = (tmp_path / "second" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["path"] == f"{tar.name}#{photo.name.removesuffix('.jpg')}"
    assert json.loads(reject)["reason"] == "the photo is damaged: it has other bytes than its record says"
    assert len(samples_of(tmp_path / "second")) == 7


def test_tars_of_others_become_shards_with_the_split_of_their_names(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / "in").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "in" / f"{split}-000.tar", "w") as tar:
            for number in range(4):
                members = {"jpg": jpeg(number + 10 * len(split)), "cls": b"%d\n" % (number % 2)}
                for extension, data in members.items():
                    header = tarfile.TarInfo(f"./photos/{number:04d}.{extension}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
    shard(tmp_path / "in", tmp_path / "out", workers=1, splits="keep")
    found = read(tmp_path / "out", read_index(tmp_path / "out"))
    labels = {name: sorted(record.label for record, _ in samples) for name, samples in found.items()}
    assert labels == {"train": [0, 0, 1, 1], "val": [0, 0, 1, 1], "test": [0, 0, 1, 1]}
    assert found["val"][0][0].source.startswith("val-000.tar#./photos/0")


def test_a_tar_that_is_cut_off_ends_the_command_before_any_work(tmp_path):
    shard(write_folder(tmp_path / "in", city_rows(1)), tmp_path / "first", workers=1)
    tar = next((tmp_path / "first").glob("val-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-11_000])
    with pytest.raises(UserError, match=rf"the tar .*{tar.name} is (damaged or )?cut off"):
        shard(tmp_path / "first", tmp_path / "second", workers=1)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_reads_our_tars_with_the_features_that_the_docs_give(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_source(tmp_path / "in")
    shard(tmp_path / "in", tmp_path / "shards", workers=1)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    scope: dict[str, Any] = {}
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: load(*args, **{**kwargs, "streaming": streaming})
    )
    exec(code.replace("data/shards", str(tmp_path / "shards")), scope)
    ours = {
        record.key: (record, members)
        for record, members in read(tmp_path / "shards", read_index(tmp_path / "shards"))["train"]
    }
    rows = list(scope["photos"].cast_column("mask.png", datasets.Image(decode=False)))
    assert len(rows) == len(ours)
    assert len({row["mask.png"] is None for row in rows}) == 2
    for row in rows:
        record, members = ours[row["json"]["key"]]
        expected = json.loads(members["json"])
        assert row["json"] == expected
        assert (row["mask.png"] or {}).get("bytes") == members.get("mask.png")
        (photo,) = (row[end] for end in ("jpg", "png", "webp") if row[end] is not None)
        assert photo.size == (record.width, record.height)


def test_without_features_datasets_reads_tars_whose_samples_are_alike_and_refuses_others(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shard(write_folder(tmp_path / "alike", city_rows(2)), tmp_path / "a", workers=1)
    shard(write_source(tmp_path / "mixed"), tmp_path / "b", workers=1)
    plain = datasets.load_dataset("webdataset", data_files=str(tmp_path / "a" / "train-*.tar"), split="train")
    assert {row["json"]["label"] for row in plain} == {0, 1}
    with pytest.raises(ValueError, match="share the same prefix or the same types"):
        datasets.load_dataset("webdataset", data_files=str(tmp_path / "b" / "train-*.tar"), split="train")
