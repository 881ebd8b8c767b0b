"""A feature cache that is damaged, or made to mislead: one sentence that names file and sample, and no memory taken."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.data.features import read_features
from pipeline.errors import UserError
from tests.data.test_features import make_world, split


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """See `make_world`; nobody may change it."""
    return make_world(tmp_path_factory.mktemp("features"))


@pytest.fixture(params=["cache", "columns"])
def spoilt(request, world, tmp_path):
    """A copy of the cache to be damaged, in the present format and in the one before."""
    return shutil.copytree(world / request.param, tmp_path / "cache")


def test_a_photo_that_changed_under_its_key_is_named(world, spoilt):
    values = json.loads((spoilt / "index.json").read_text())
    values["shards"][0]["photos"][0]["sha256"] = "0" * 64
    (spoilt / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="it holds another photo as train_0"):
        split(world, place=spoilt)[0]


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_shard_that_is_not_whole_is_named_before_anything_is_read(world, spoilt, damage):
    path = spoilt / "train-00001.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00001\.safetensors: it is missing or not \d+ bytes long; remove"):
        split(world, place=spoilt)
    assert len(split(world, "val", place=spoilt)) == 3  # whose files are whole


def test_a_byte_that_changed_is_found_when_its_photo_is_read(world, spoilt):
    path = spoilt / "train-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    found = split(world, place=spoilt)
    said = []
    for number in range(len(found) * found.copies):
        try:
            found[number]
        except UserError as error:
            said.append(str(error))
    assert len(said) == 1
    assert said[0].startswith(f"{path}, sample train_")
    assert "its bytes have changed" in said[0]


@pytest.mark.parametrize("at", [0, 9])
def test_a_broken_header_is_named(world, spoilt, at):
    path = spoilt / "train-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[at : at + 2] = b"\xff\xff"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00000\.safetensors, sample train_0: its header cannot be read"):
        split(world, place=spoilt)[0]


def with_header(place, change, name="train-00000.safetensors"):
    """Change the header of a file as its author could, and have the index give the file its new length."""
    path = place / name
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    values = json.loads((place / "index.json").read_text())
    next(shard for shard in values["shards"] if shard["name"] == name)["bytes"] = path.stat().st_size
    (place / "index.json").write_text(json.dumps(values))


def large(header):
    """The largest tensor in a header of either format."""
    return header["rows" if "rows" in header else "cells"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda header: large(header).pop("dtype"), "header cannot be read"),
        (lambda header: large(header).update(dtype=["BF16"]), "header cannot be read"),
        (lambda header: large(header).update(shape=[-1]), "header cannot be read"),
        (lambda header: large(header).update(shape=[1.5]), "header cannot be read"),
        (lambda header: large(header).update(shape=[True]), "header cannot be read"),
        (lambda header: large(header).update(shape=[]), "(header cannot be read|tensors are not those)"),
        (lambda header: large(header).update(shape="12"), "header cannot be read"),
        (lambda header: large(header).update(data_offsets=[0]), "header cannot be read"),
        (lambda header: large(header).update(data_offsets=[-8, 8]), "header cannot be read"),
        (lambda header: header.pop("view_mask"), "tensors are not those"),
        (
            lambda header: header.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
            "tensors are not those",
        ),
        (lambda header: large(header).update(data_offsets=[0, 10**12]), "tensors do not follow each other"),
        (lambda header: header["boxes"].update(data_offsets=[10**12, 2 * 10**12]), "tensors do not follow each other"),
        (lambda header: header["boxes"]["data_offsets"].reverse(), "tensors do not follow each other"),
        (lambda header: b"[" * 100_000, "header cannot be read"),
        (lambda header: b"[]", "header cannot be read"),
        (lambda header: b"\xff", "header cannot be read"),
        (lambda header: b'{"rows": 1, "rows": 2}', "header cannot be read"),
    ],
)
def test_a_header_that_leads_elsewhere_is_refused_before_memory_is_taken(world, spoilt, monkeypatch, change, named):
    with_header(spoilt, change)
    monkeypatch.setattr("pipeline.data.feature_reader.FeatureReader._bytes", lambda *_: pytest.fail("memory is taken"))
    with pytest.raises(UserError, match=rf"train-00000\.safetensors, sample train_0: its {named}.*; remove") as caught:
        split(world, place=spoilt)[0]
    assert "\n" not in str(caught.value)


def test_bytes_that_no_tensor_has_are_refused(world, spoilt):
    path = spoilt / "train-00000.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    with_header(spoilt, lambda header: None)
    with pytest.raises(UserError, match="its tensors do not fill it"):
        split(world, place=spoilt)[0]


def test_a_flag_that_is_neither_true_nor_false_is_refused(world, spoilt):
    path = spoilt / "train-00000.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    (begin, _) = json.loads(data[8 : 8 + length])["view_mask"]["data_offsets"]
    data[8 + length + begin] = 2
    path.write_bytes(data)
    with pytest.raises(UserError, match="its masks do not fit its tokens"):
        split(world, place=spoilt)[0]


def test_tensors_of_another_type_are_named(world, spoilt):
    name = "train-00000.safetensors"
    data = (spoilt / name).read_bytes()
    (spoilt / name).write_bytes(data.replace(b'"BF16"', b'"F16" ').replace(b'"U8"', b'"I8"'))
    with pytest.raises(UserError, match="its tensors are not those that the index describes"):
        split(world, place=spoilt)[0]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "no finished feature cache in .*: there is no index.json"),
        ("{", "does not describe a feature cache: it is not JSON: "),
        ("[]", "no feature cache of this program's format"),
        ('{"format": "roadwork features 3"}', "does not describe a feature cache"),
        ('{"format": "roadwork features 4"}', "no feature cache of this program's format"),
    ],
)
def test_a_folder_without_a_usable_index_is_named(tmp_path, text, named):
    if text is not None:
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=named):
        read_features(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda index: index.update(dim=0), "dim: expected int >= 1"),
        (lambda index: index.update(dim=10**12), "dim: expected int <= 65536"),
        (lambda index: index["key"].update(num_views="12"), r"key\.num_views: expected int, got str"),
        (lambda index: index["key"].update(mask_side=1e300), r"key\.mask_side: expected int, got float"),
        (lambda index: index["key"].update(pool_grid=10**30), "the number 1000000.*, which is too large"),
        (lambda index: index["key"].update(weights=1), r"key\.weights: expected str, got int"),
        (lambda index: index.update(source_sha256=None), "source_sha256: expected str, got null"),
        (lambda index: index.update(shards={}), "shards: expected array, got object"),
        (lambda index: index["shards"][0].update(bytes="12"), r"bytes: expected int, got str"),
        (lambda index: index["shards"][0].update(name=1), r"name: expected str, got int"),
        (lambda index: index["shards"][0]["photos"][0].update(key=[]), "key: expected str, got array"),
        (lambda index: index["shards"][0]["photos"][0].update(checksums=[0.5]), "expected int, got float"),
        (lambda index: index["shards"][0]["photos"][0].update(checksums=[]), "no rows or unequal ones"),
        (lambda index: index["shards"][-1]["photos"][0]["checksums"].append(1), "no rows or unequal ones"),
        (lambda index: index["shards"][0]["photos"].clear(), "no rows or unequal ones"),
    ],
)
def test_an_index_with_values_that_cannot_be_is_refused(spoilt, change, named):
    values = json.loads((spoilt / "index.json").read_text())
    change(values)
    (spoilt / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"index\.json .*{named}.*; extract (it )?again") as caught:
        read_features(spoilt)
    assert "\n" not in str(caught.value)


def test_sizes_that_the_files_do_not_have_are_refused(world, spoilt):
    values = json.loads((spoilt / "index.json").read_text())
    values["dim"] = values["key"]["mask_side"] = values["key"]["pool_grid"] = 1 << 16
    (spoilt / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"its (masks do not fit its tokens|tensors are not those that the index)"):
        split(world, place=spoilt)[0]


def test_an_index_cannot_name_a_file_elsewhere(spoilt):
    text = (spoilt / "index.json").read_text()
    (spoilt / "index.json").write_text(text.replace("train-00000.safetensors", "../x.safetensors"))
    with pytest.raises(UserError, match="no plain file name"):
        read_features(spoilt)


def test_a_record_that_disagrees_with_the_index_is_named(world, tmp_path):
    place = shutil.copytree(world / "cache", tmp_path / "cache")
    path = place / "train-00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"key": "train_0"', b'"key": "train_1"'))
    data = split(world, place=place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.features.StoredRow.checksum", lambda row: data.reader.photo(0).checksums[0])
        with pytest.raises(UserError, match=r"sample train_0: its record and the index differ in key; remove"):
            data[0]
    with pytest.raises(UserError, match="its bytes have changed"):
        data[0]


def test_a_record_of_less_than_no_bytes_is_refused(world, tmp_path):
    place = shutil.copytree(world / "cache", tmp_path / "cache")
    path = place / "train-00000.safetensors"
    tensors = load_file(path)
    tensors["record_sizes"][:2] += torch.tensor([-(1 << 20), 1 << 20], dtype=torch.int32)
    save_file(tensors, path)
    with pytest.raises(UserError, match="its masks do not fit its tokens"):
        split(world, place=place)[0]


def test_a_file_whose_masks_ask_for_more_than_it_holds_is_named(world, spoilt):
    path = spoilt / "train-00000.safetensors"
    tensors = load_file(path)
    tensors["view_mask"][-1, -1] ^= True
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"train-00000\.safetensors, .*: its masks do not fit its tokens"):
        split(world, place=spoilt)[0]
