"""Batches from memory beside those from the files, over made-up rows with any number of views and any mask."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.data.batch import batches_of, collate
from pipeline.data.feature_dataset import open_split
from pipeline.data.feature_memory import FeatureMemory
from pipeline.data.features import open_cache
from pipeline.data.index import read_index
from pipeline.errors import UserError
from pipeline.model.config import InputSpec
from tests.feature_cache import make_up_cache
from tests.small_run import make_shards

COPIES, CPU = 3, torch.device("cpu")


def made_up(folder, seed, photos=7):
    make_shards(folder / "shards", {"train": [n % 2 for n in range(photos)], "val": [1]}, text_dim=3)
    return make_up_cache(folder / "cache", folder / "shards", seed, COPIES)


def opened(folder, split="train", views=12):
    index = read_index(folder / "shards")
    spec = InputSpec(32, views, mask_side=4)
    return open_split(folder / "shards", index, split, spec, open_cache(str(folder / "cache"), index))


def in_memory(data, workers=0, parts=1):
    """The split in memory that was taken elsewhere, filled by as many as would share it."""
    memory = FeatureMemory(data)
    memory.use(torch.full((memory.bytes,), 0xAB, dtype=torch.uint8))  # what is not filled is found in the batches
    for part in range(parts):
        rows = range(len(data) * part // parts, len(data) * (part + 1) // parts)
        assert list(memory.fill(rows, workers)) == list(rows)
    return memory


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("views", [12, 5, 1])
def test_batches_in_any_order_with_any_copies_are_those_of_the_files_bit_for_bit(tmp_path, seed, views):
    made_up(tmp_path, seed)
    draw, data = np.random.default_rng(seed), opened(tmp_path, views=views)
    memory = in_memory(data, parts=1 + seed)
    assert data.copies == 1 + COPIES
    for size in (1, 2, 5, 64):
        # Some numbers are those of copies that are not there: the photo itself comes in their place.
        numbers = draw.integers((2 + COPIES) * len(data), size=size).tolist()
        same(memory.__getitems__(numbers), collate([data[number] for number in numbers]))


def test_a_row_in_memory_is_the_one_that_was_computed(tmp_path):
    rows = made_up(tmp_path, seed=5)
    memory = in_memory(opened(tmp_path))
    for (split, photo, copy), row in rows.items():
        if split != "train":
            continue
        batch, mask = memory.__getitems__([copy * len(memory) + photo]), row.tokens.view_mask
        for name in ("cls", "cells"):
            assert torch.equal(batch[name][0, mask], getattr(row.tokens, name))
            assert not batch[name][0, ~mask].any()
        for name in ("regions", "boxes", "view_mask"):
            assert torch.equal(batch[name][0], getattr(row.tokens, name))
        torch.testing.assert_close(batch["mask_targets"][0], row.mask_targets, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("place", ["use", "allocate"])
@pytest.mark.parametrize(("photos", "parts"), [(1, 1), (1, 3), (2, 3)])
def test_one_photo_is_enough_and_more_processes_than_photos_share_it(tmp_path, place, photos, parts):
    made_up(tmp_path, 0, photos)
    data = opened(tmp_path)
    memory = in_memory(data, parts=parts)
    if place == "allocate":
        memory = FeatureMemory(data)
        memory.allocate(CPU)
        list(memory.fill(range(photos), 0))
    numbers = list(range(photos * (1 + COPIES)))
    same(memory.__getitems__(numbers), collate([data[number] for number in numbers]))
    loader = batches_of(memory, 2, 0)
    assert sum(len(batch["row"]) for batch in loader) == photos


def test_workers_fill_the_memory_with_the_same_bytes(tmp_path):
    made_up(tmp_path, 1, photos=40)  # more than one hand-over of a worker
    data = opened(tmp_path)
    alone, helped = in_memory(data), in_memory(data, workers=2)
    for name, tensor in alone.tensors.items():
        assert torch.equal(helped.tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_split_without_copies_shares_a_cache_with_one_that_has_them(tmp_path):
    made_up(tmp_path, 2)
    data = opened(tmp_path, "val")
    same(in_memory(data).__getitems__([0, 1]), collate([data[0], data[0]]))


def test_a_batch_owns_its_memory(tmp_path):
    made_up(tmp_path, 3)
    memory = in_memory(opened(tmp_path))
    before = memory.__getitems__([0, 1])
    for tensor in before.values():
        tensor.zero_()
    after = memory.__getitems__([0, 1])
    assert after["regions"].any()
    assert after["boxes"].any()


def test_damage_ends_filling_with_the_photos_name(tmp_path):
    made_up(tmp_path, 4)
    path = next((tmp_path / "cache").glob("train-00000*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    memory = FeatureMemory(opened(tmp_path))
    memory.allocate(CPU)
    with pytest.raises(UserError, match=r"train-00000\.safetensors, sample train_\d: its bytes have changed"):
        list(islice(memory.fill(range(7), 0), 7))
