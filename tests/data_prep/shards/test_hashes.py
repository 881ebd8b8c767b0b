"""The index has the hash of each record, and the record those of photo and mask: nothing changes without a word."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.shards.command import shard
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import read_index
from pipeline.errors import UserError
from pipeline.model.config import InputSpec
from tests.data.tampering import edit_split, plain, read_members, tamper, without
from tests.data_prep.examples import city_rows, encode, write_folder

SPEC = InputSpec(32, mask_side=8)


@pytest.fixture
def shards(tmp_path) -> Path:
    """Shards whose photos all have a mask and a daytime."""
    rows = [{**row, "mask": "mask.png", "daytime": "light"} for row in city_rows(3)]
    folder = write_folder(tmp_path / "in", rows)
    (folder / "mask.png").write_bytes(encode(np.full((64, 96), 2, dtype=np.uint8), "PNG"))
    shard(folder, tmp_path / "shards", workers=1)
    return tmp_path / "shards"


def train(shards: Path) -> ShardDataset:
    return ShardDataset(shards, read_index(shards), "train", SPEC)


def change(shards: Path, extension: str, old: bytes, new: bytes) -> None:
    """Replace bytes in a member of the first training sample, in the tar and not in any hash of the member."""
    assert len(old) == len(new)
    path = shards / "train-00000.tar"
    name = next(member.name for member, _ in read_members(path) if member.name.endswith(extension))

    def edit(members):
        return [plain(m.name, data.replace(old, new, 1)) if m.name == name else (m, data) for m, data in members]

    before = path.read_bytes()
    tamper(path, edit)
    assert path.read_bytes() != before


# Another daytime of the same length; the last byte of a PNG's checksum, which decoders may ignore.
CHANGES = {"metadata": (".json", b'"light"', b'"dark" '), "mask": (".mask.png", b"\xaeB`\x82", b"\xaeB`\x83")}
SAID = {"metadata": "its record is not the one of the index", "mask": "the mask is not the one of its record"}


def test_records_and_masks_have_their_hashes(shards):
    data = train(shards)
    for row, sample in enumerate(data.split.samples):
        assert len(data.record(row).mask_sha256) == len(sample.record_sha256) == 64
        assert (data.mask(row) == 2).all()


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_metadata_or_mask_is_named_by_every_reader(shards, what):
    change(shards, *CHANGES[what])
    data = train(shards)
    readers = [data.__getitem__, data.mask, *([data.record, data.photo] if what == "metadata" else [])]
    for read in readers:
        with pytest.raises(UserError, match=rf"train-00000\.tar, sample .*: {SAID[what]}"):
            read(0)
    data[1]


def test_a_mask_that_tar_and_index_lost_is_missed(shards):
    path = shards / "train-00000.tar"
    name = next(member.name for member, _ in read_members(path) if member.name.endswith(".mask.png"))
    tamper(path, without(name))
    with tarfile.open(path) as tar:
        offsets = {member.name: member.offset_data for member in tar}

    def follow(split: dict) -> None:
        split["samples"][0]["members"].pop("mask.png")
        for sample in split["samples"]:
            for extension, place in sample["members"].items():
                place[0] = offsets[f"{sample['key']}.{extension}"]

    edit_split(shards, "train", follow)
    with pytest.raises(UserError, match="the mask of its record is missing"):
        train(shards)[0]


def test_shards_of_before_the_hashes_are_read_as_they_were(shards):
    """Their index knows no hash of the record, and the record none of the mask."""
    path = shards / "train-00000.tar"

    def older(member, data):
        if not member.name.endswith(".json"):
            return member, data
        values = {key: value for key, value in json.loads(data).items() if key != "mask_sha256"}
        return member, json.dumps(values).encode().ljust(len(data))

    before = [train(shards)[row] for row in range(2)]
    tamper(path, lambda members: [older(*member) for member in members])
    edit_split(shards, "train", lambda split: [sample.pop("record_sha256") for sample in split["samples"]])
    assert train(shards).record(0).mask_sha256 is None
    for row, expected in enumerate(before):
        found = train(shards)[row]
        assert found.keys() == expected.keys()
        assert all(torch.equal(value.nan_to_num(), expected[name].nan_to_num()) for name, value in found.items())
