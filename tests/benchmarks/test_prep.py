"""The benchmark of data preparation, on a few tiny photos: every arm does the work that its row claims."""

import hashlib
import json
import tarfile

import pyarrow.parquet as pq
import pytest

from benchmarks import prep_peers as peers
from benchmarks.prep import PEERS, PhotoSet, Plan, draw, measure
from data_prep.shards.command import shard
from data_prep.sources.tables import read_rows
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import read_index
from pipeline.model.config import InputSpec

TINY = PhotoSet("320x240", 8, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(TINY, tmp_path_factory.mktemp("prep") / "photos", seed=1)


@pytest.fixture(scope="module")
def digests(folder):
    return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "images").iterdir()}


def test_a_small_run_compares_all_arms():
    rows = measure(Plan((TINY,), rounds=2), seed=0)
    assert [row.against for row in rows] == [against for _, against, _, _ in PEERS]
    assert all(0 < row.interval[0] <= row.ratio <= row.interval[1] for row in rows)
    assert all(
        "320x240 procedural scenes" in row.what and "8 photos made of 6 scenes, 2 rounds" in row.note for row in rows
    )
    assert {row.against: row.goal for row in rows if row.goal} == dict.fromkeys(
        ("datasets, imagefolder", "datasets, paths"), ">= 2"
    )  # fmt: skip


def test_the_photos_are_distinct_files_and_have_no_masks(folder, digests):
    assert len(set(digests.values())) == TINY.images
    assert not (folder / "masks").exists()
    assert all("mask" not in row for row in read_rows(folder / "metadata.csv"))


@pytest.mark.parametrize("route", ["imagefolder", "paths", "bytes"])
def test_the_parquet_file_holds_the_original_bytes_and_their_hashes(folder, digests, tmp_path, route):
    digest = peers.write_parquet(folder, tmp_path, route)
    assert digest == hashlib.sha256((tmp_path / "photos.parquet").read_bytes()).hexdigest()
    rows = pq.read_table(tmp_path / "photos.parquet").to_pylist()
    assert {row["key"]: row["sha256"] for row in rows} == digests
    assert {row["key"]: hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in rows} == digests


def test_the_tar_holds_the_original_bytes_and_their_hashes(folder, digests, tmp_path):
    digest = peers.write_tar(folder, tmp_path)
    assert digest == hashlib.sha256((tmp_path / "photos.tar").read_bytes()).hexdigest()
    with tarfile.open(tmp_path / "photos.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    assert {key: hashlib.sha256(files[f"{key}.jpg"]).hexdigest() for key in digests} == digests
    assert {key: json.loads(files[f"{key}.json"])["sha256"] for key in digests} == digests


def test_all_arms_read_the_same_metadata_from_the_table(folder, tmp_path):
    shard(folder, tmp_path / "shards", check="header", workers=1)
    index = read_index(tmp_path / "shards")
    splits = [ShardDataset(tmp_path / "shards", index, name, InputSpec(32)) for name in index.splits]
    ours = {record.source: record for split in splits for record in map(split.record, range(len(split)))}
    theirs = {f"images/{row['key']}.jpg": row for row in peers.read_photos(str(folder))}
    assert ours.keys() == theirs.keys()
    for name, record in ours.items():
        row, metadata = theirs[name], record.metadata
        assert (row["label"], row["width"], row["height"]) == (record.label, record.width, record.height)
        if metadata.gps is not None:  # a script of twenty lines lets 91 degrees pass
            assert row["gps"] == list(metadata.gps)
        assert {word.lower() for word in row["weather"] or ()} == set(metadata.weather or ())
        assert (row["city"], row["description"]) == (metadata.city, metadata.description)
