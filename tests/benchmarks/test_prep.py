"""The benchmark of data preparation, on a few tiny photos: every arm does the work that its row claims."""

import hashlib
import json
import tarfile

import pytest

from benchmarks import prep_peers as peers
from benchmarks.prep import READING, SHARDING, PhotoSet, Plan, draw, measure, open_shards
from data_prep.shards.command import shard
from data_prep.sources.tables import read_rows

TINY = PhotoSet("320x240", 8, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(TINY, tmp_path_factory.mktemp("prep") / "photos", seed=1)


@pytest.fixture(scope="module")
def digests(folder):
    return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "images").iterdir()}


def test_a_small_run_compares_all_arms():
    rows = measure(Plan((TINY,), rounds=2), seed=0)
    assert [row.against for row in rows] == [case.against for case in (*SHARDING, *READING)]
    assert all(0 < row.interval[0] <= row.ratio <= row.interval[1] for row in rows)
    assert all(
        "320x240 procedural scenes" in row.what and "8 photos made of 6 scenes, 2 rounds" in row.note for row in rows
    )
    assert [row.against for row in rows if row.goal] == ["datasets, imagefolder", "datasets, paths", "datasets, bytes"]


def test_the_photos_are_distinct_files_and_have_no_masks(folder, digests):
    assert len(set(digests.values())) == TINY.images
    assert not (folder / "masks").exists()
    assert all("mask" not in row for row in read_rows(folder / "metadata.csv"))


@pytest.mark.parametrize("route", ["imagefolder", "paths", "bytes"])
def test_the_parquet_file_holds_the_original_bytes_and_their_hashes(folder, digests, tmp_path, route):
    digest = peers.write_parquet(folder, tmp_path, route)
    assert digest == hashlib.sha256((tmp_path / "photos.parquet").read_bytes()).hexdigest()
    rows = list(peers.open_parquet(tmp_path / "photos.parquet", tmp_path / "rows"))
    assert {row["key"]: row["sha256"] for row in rows} == digests
    assert {row["key"]: hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in rows} == digests


def test_the_tar_holds_the_original_bytes_and_their_hashes(folder, digests, tmp_path):
    digest = peers.write_tar(folder, tmp_path, peers.check_header)
    assert digest == hashlib.sha256((tmp_path / "photos.tar").read_bytes()).hexdigest()
    with tarfile.open(tmp_path / "photos.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    assert {key: hashlib.sha256(files[f"{key}.jpg"]).hexdigest() for key in digests} == digests
    assert {key: json.loads(files[f"{key}.json"])["sha256"] for key in digests} == digests


def test_all_arms_read_the_same_metadata_from_the_table(folder, tmp_path):
    shard(folder, tmp_path / "shards", check="header", workers=1)
    ours = {split.record(row).source: split.record(row) for split, row in open_shards(tmp_path / "shards")}
    theirs = {f"images/{row['key']}.jpg": row for row in peers.read_photos(str(folder), peers.check_header)}
    assert ours.keys() == theirs.keys()
    for name, record in ours.items():
        row, metadata = theirs[name], record.metadata
        assert (row["label"], row["width"], row["height"]) == (record.label, record.width, record.height)
        if metadata.gps is not None:  # a script of twenty lines lets 91 degrees pass
            assert row["gps"] == list(metadata.gps)
        assert {word.lower() for word in row["weather"] or ()} == set(metadata.weather or ())
        assert (row["city"], row["description"]) == (metadata.city, metadata.description)


@pytest.mark.parametrize("check", [peers.decode_fully, peers.decode_small])
def test_a_decoding_script_sees_a_cut_off_photo_and_a_header_check_does_not(folder, check):
    data = next((folder / "images").iterdir()).read_bytes()
    assert check(data) == peers.check_header(data[: len(data) // 2]) == (320, 240)
    with pytest.raises(OSError, match="truncated"):
        check(data[: len(data) // 2])


@pytest.mark.parametrize("verify", [True, False])
def test_readers_that_check_find_a_changed_photo(folder, tmp_path, verify):
    peers.write_tar(folder, tmp_path, peers.check_header)
    data = bytearray((tmp_path / "photos.tar").read_bytes())
    data[2000] ^= 1  # inside the first photo
    (tmp_path / "changed.tar").write_bytes(data)
    total = peers.read_tar(tmp_path / "photos.tar", verify)
    assert total == sum(path.stat().st_size for path in (folder / "images").iterdir())
    if verify:
        with pytest.raises(AssertionError):
            peers.read_tar(tmp_path / "changed.tar", verify)
    else:
        assert peers.read_tar(tmp_path / "changed.tar", verify) == total
