"""Splits that are dealt anew: the same photos and tokens as in the shards' own splits, each in its fold's role."""

import json
import re

import numpy as np
import pytest
import torch

from pipeline.config import DataConfig
from pipeline.data.feature_dataset import open_split
from pipeline.data.features import open_cache
from pipeline.data.folds import Folds, deal, read_dealt, read_folds, role_of, write_folds
from pipeline.data.index import SPLITS, read_index
from pipeline.data.weights import sample_weights
from pipeline.errors import UserError
from tests.data.tampering import TAMPERED, tamper
from tests.feature_cache import make_cache
from tests.small_run import make_backbone, make_shards, small_config

LABELS = {"train": [0, 1, None, 1, 0, 1], "val": [1, 0, 1], "test": [0, 1]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, and a cache of them with copies of the training photos; nobody may change them."""
    folder = tmp_path_factory.mktemp("folds")
    make_shards(folder / "shards", LABELS)
    make_cache(folder / "cache", folder / "shards", make_backbone(folder / "backbone"), copies=2)
    return folder


def some_folds(index, seed=0, parts=3, splits=("train", "val")):
    """Parts at random, each with photos."""
    keys = [s.key for name in splits for s in index.splits[name].samples if s.label is not None]
    part = np.random.default_rng(seed).permutation(np.arange(len(keys)) % parts)
    return Folds(index.source_sha256, parts, dict(zip(keys, part.tolist(), strict=True)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("splits", [("train", "val"), SPLITS])
def test_every_photo_has_one_role_in_a_fold_and_is_held_out_once(world, seed, splits):
    index = read_index(world / "shards")
    folds = some_folds(index, seed, 4, splits)
    held_out = []
    for fold in range(4):
        dealt = deal(index, folds, fold).splits
        keys = {name: [s.key for s in dealt[name].samples] for name in SPLITS}
        assert sorted(key for mine in keys.values() for key in mine) == sorted(folds.part_of)
        assert {folds.part_of[key] for key in keys["test"]} == {fold}
        assert {folds.part_of[key] for key in keys["val"]} == {(fold + 1) % 4}
        assert {folds.part_of[key] for key in keys["train"]} == {(fold + 2) % 4, (fold + 3) % 4}
        held_out += keys["test"]
    assert sorted(held_out) == sorted(folds.part_of)


@pytest.mark.parametrize("cached", [False, True], ids=["photos", "cache"])
@pytest.mark.parametrize("seed", range(3))
def test_dealt_splits_give_what_the_shards_own_splits_give(world, cached, seed):
    index = read_index(world / "shards")
    cache = open_cache(str(world / "cache"), index) if cached else None
    spec = small_config(str(world / "backbone")).input_spec("full")
    own = {}
    for name in SPLITS:
        data = open_split(world / "shards", index, name, spec, cache)
        own |= {sample.key: (data.load(row), data.photo(row)) for row, sample in enumerate(data.split.samples)}
    seen = 0
    for fold in range(3):
        dealt = deal(index, some_folds(index, seed, splits=SPLITS), fold)
        for name in SPLITS:
            data = open_split(world / "shards", dealt, name, spec, cache)
            for row, sample in enumerate(data.split.samples):
                (record, tensors), photo = own[sample.key]
                found_record, found = data.load(row)
                assert (found_record, data.photo(row)) == (record, photo)
                assert found.pop("row") == row
                tensors = {key: value for key, value in tensors.items() if key != "row"}
                torch.testing.assert_close(found, tensors, rtol=0, atol=0, equal_nan=True)
                seen += 1
    assert seen == 3 * 10


def test_a_photo_without_copies_is_taken_whole_in_the_place_of_one(world):
    """Only training photos have copies in a cache, and a fold trains on others too."""
    index = read_index(world / "shards")
    cache, spec = open_cache(str(world / "cache"), index), small_config(str(world / "backbone")).input_spec("full")
    keys = [s.key for name in ("train", "val") for s in index.splits[name].samples]
    folds = Folds(index.source_sha256, 3, {key: (0, 1, 2, 2)[min(n, 3)] for n, key in enumerate(keys)})
    data = open_split(world / "shards", deal(index, folds, 0), "train", spec, cache)
    assert data.copies == 3
    for row, sample in enumerate(data.split.samples):
        whole, copy = data.load(row)[1], data.load(2 * len(data) + row)[1]
        differs = not torch.equal(whole["cls"], copy["cls"])
        assert differs == sample.key.startswith("train")
        copy = data.load(len(data) + row)[1]
        assert bool(copy["null_metadata"]) == sample.key.startswith("train")  # a streetvision copy


def read_all(folder):
    index = read_index(folder)
    dealt = deal(index, some_folds(index), 0)
    for name in SPLITS:
        data = open_split(folder, dealt, name, small_config("none").input_spec("full"))
        for row in range(len(data)):
            data.load(row)


@pytest.mark.parametrize("kind", TAMPERED)
def test_damage_is_found_in_dealt_splits_too(tmp_path, kind):
    make_shards(tmp_path / "shards", {"train": [0, 1] * 3, "val": [0, 1, 0]})
    read_all(tmp_path / "shards")
    change, words = TAMPERED[kind]
    tamper(tmp_path / "shards" / "train-00000.tar", change)
    with pytest.raises(UserError, match=rf"train-00000\.tar.*{words}"):
        read_all(tmp_path / "shards")


def test_folds_are_written_and_read_back(world, tmp_path):
    index = read_index(world / "shards")
    folds = some_folds(index)
    write_folds(tmp_path / "folds.json", folds)
    assert read_folds(tmp_path / "folds.json", index) == folds
    assert read_dealt(world / "shards", str(tmp_path / "folds.json"), 1) == deal(index, folds, 1)
    assert read_dealt(world / "shards", "", 0) == index


def changed(values, **changes):
    return {**values, **changes}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda values: changed(values, format="folds 9"), "does not describe folds: its format is 'folds 9'"),
        (lambda values: [], "does not describe folds: its format is None"),
        (lambda values: changed(values, part_of=[0, 1]), "does not describe folds"),
        (lambda values: changed(values, parts=3.5), "does not describe folds: parts: expected int, got float"),
        (lambda values: changed(values, source_sha256="cd" * 32), "holds folds of other shards"),
        (lambda values: changed(values, parts=4), r"photos in the parts \[0, 1, 2\], but must have them in each"),
        (lambda values: changed(values, parts=2), "in each of 3 or more parts"),
        (
            lambda values: changed(values, part_of={**values["part_of"], "train_0": -1}),
            r"part_of\[...\]: expected int >= 0",
        ),
        (
            lambda values: changed(values, part_of={**values["part_of"], "train_99": 0}),
            "name 1 photos that are not in the shards, such as 'train_99'",
        ),
    ],
)
def test_other_folds_are_refused_in_one_sentence(world, tmp_path, spoil, sentence):
    path, index = tmp_path / "folds.json", read_index(world / "shards")
    write_folds(path, some_folds(index))
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=sentence):
        read_dealt(world / "shards", str(path), 0)


def test_a_missing_or_broken_file_and_a_fold_that_is_not_there_are_refused(world, tmp_path):
    path, index = tmp_path / "folds.json", read_index(world / "shards")
    with pytest.raises(UserError, match="there is no such file"):
        read_dealt(world / "shards", str(path), 0)
    path.write_text("{")
    with pytest.raises(UserError, match=f"{re.escape(str(path))} does not describe folds: it is not JSON"):
        read_dealt(world / "shards", str(path), 0)
    with pytest.raises(UserError, match=r"data\.fold is 3, but must be one of the 3 folds, 0 to 2"):
        deal(index, some_folds(index), 3)


def test_a_fold_needs_folds_and_folds_do_not_stream():
    with pytest.raises(UserError, match=r"data\.fold is 1, but must be 0 without data\.folds"):
        DataConfig(fold=1)
    with pytest.raises(UserError, match=r"data\.streaming is True, but must be false with data\.folds"):
        DataConfig(folds="folds.json", streaming=True)


def test_the_roles_of_five_folds():
    table = [[role_of(part, 5, fold) for part in range(5)] for fold in range(5)]
    assert table[0] == ["test", "val", "train", "train", "train"]
    assert table[4] == ["val", "train", "train", "train", "test"]


def test_a_fold_samples_by_weights_of_its_own_training_photos(world):
    """Those in the index are for the shards' own training split; other photos have none there."""
    index = read_index(world / "shards")
    index.arguments.update(temper=0.3, balance=0.7)
    dealt = deal(index, some_folds(index), 0).splits["train"]
    assert {sample.label for sample in dealt.samples} == {0, 1}
    np.testing.assert_allclose(dealt.weights, sample_weights(dealt.clusters, dealt.labels, 0.3, balance=0.7))
