"""The feature cache: the same tokens as without it, or one sentence that says why not."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from pipeline.data.batch import collate
from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_dataset import open_split
from pipeline.data.feature_key import feature_key, geometry_fingerprint
from pipeline.data.features import open_cache
from pipeline.data.folds import Folds, deal
from pipeline.data.index import read_index
from pipeline.errors import UserError
from pipeline.model.backbone import FrozenBackbone, weights_fingerprint
from pipeline.model.config import InputSpec
from pipeline.model.encoder import all_tokens
from tests.feature_cache import in_columns, make_cache
from tests.small_run import make_backbone, make_model, make_shards, small_config

PHOTOS, COPIES = 6, 2
# Half a unit in the last of bf16's 8 digits, and room for the fp32 sums that another batch size rounds differently.
ROUNDING = {"rtol": 2**-8, "atol": 1e-5}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """See `make_world`; nobody may change it."""
    return make_world(tmp_path_factory.mktemp("features"))


def make_world(folder):
    """Shards, a backbone and a cache with copies, in the present format and in the one before."""
    make_shards(folder / "shards", {"train": [0, 1] * (PHOTOS // 2), "val": [0, 1, 0]})
    make_backbone(folder / "backbone")
    make_cache(folder / "cache", folder / "shards", str(folder / "backbone"), copies=COPIES)
    in_columns(folder / "cache", folder / "columns")
    return folder


def split(world, name="train", cached=True, place=None, **changes):
    index = read_index(world / "shards")
    cache = open_cache(str(place or world / "cache"), index) if cached else None
    spec = small_config(str(world / "backbone"), **changes).input_spec("full")
    return open_split(world / "shards", index, name, spec, cache)


def key_of(world, **changes):
    model = small_config(str(world / "backbone"), **changes)
    return feature_key(FrozenBackbone(model.backbone), model.input_spec("full"), model.pool_grid)


@pytest.mark.parametrize("name", ["train", "val"])
def test_cached_tokens_are_those_of_the_backbone_in_bf16(world, name):
    cached, online = split(world, name), split(world, name, cached=False)
    backbone = FrozenBackbone(str(world / "backbone"))
    for row in range(len(online)):
        found, photo = cached[row], collate([online[row]])
        assert "views" not in found
        wanted = all_tokens(backbone, photo["views"], photo["boxes"], photo["view_mask"], pool_grid=2)
        for key, value in wanted._asdict().items():
            assert found[key].dtype == torch.bfloat16
            torch.testing.assert_close(found[key].float(), value[0], **ROUNDING)


def test_everything_but_the_photo_is_the_same_with_and_without_the_cache(world):
    cached, online = split(world)[2], split(world, cached=False)[2]
    for key in online.keys() - {"views"}:
        torch.testing.assert_close(cached[key], online[key], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("head", ["roadwork", "attention_mil"])
def test_a_model_answers_alike_with_and_without_the_cache(world, head):
    model = make_model(str(world / "backbone"), head=head)
    with torch.no_grad():
        cached, online = (
            model(collate([data[row] for row in range(PHOTOS)])).logits
            for data in (split(world, head=head), split(world, cached=False, head=head))
        )
    assert online.std(0).max() > 0.01  # the answers differ from photo to photo
    torch.testing.assert_close(cached, online, rtol=0.02, atol=0.02)


def test_a_baseline_reads_its_one_view_from_a_cache_of_twelve(world):
    assert key_of(world).difference(key_of(world, head="single_view")) is None
    one, twelve = split(world, head="single_view")[1], split(world)[1]
    for key in ("cls", "cells", "regions", "boxes", "view_mask"):
        assert len(one[key]) == 1
        assert torch.equal(one[key][0], twelve[key][0])
    assert key_of(world, head="single_view").difference(key_of(world)) == "number of views 1, and not 12"


def test_training_photos_have_copies_that_differ(world):
    data = split(world)
    assert (data.copies, split(world, "val").copies) == (1 + COPIES, 1)
    rows = [data[copy * len(data) + 3] for copy in range(1 + COPIES)]
    assert [row["row"].item() for row in rows] == [3, 3, 3]
    assert not any(torch.allclose(rows[0]["cls"][0], row["cls"][0], atol=0.05) for row in rows[1:])


def test_a_cached_copy_is_the_one_that_is_made_without_the_cache(world):
    cached, online = split(world), split(world, cached=False)
    backbone = FrozenBackbone(str(world / "backbone"))
    for copy in range(1, 1 + COPIES):
        found, photo = cached[copy * PHOTOS + 1], collate([online[copy * PHOTOS + 1]])
        wanted = all_tokens(backbone, photo["views"], photo["boxes"], photo["view_mask"], pool_grid=2)
        for key, value in wanted._asdict().items():
            torch.testing.assert_close(found[key].float(), value[0], **ROUNDING)
        for key in photo.keys() - {"views"}:
            torch.testing.assert_close(found[key], photo[key][0], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weights": "f" * 64}, r"made with the backbone .*backbone \(\w{12}\), and not .* \(ffffffffffff\)"),
        ({"view_side": 64}, "view side 32, and not 64"),
        ({"num_views": 13}, "number of views 12, and not 13"),
        ({"pool_grid": 4}, "pooled grid 2, and not 4"),
        ({"mask_side": 8}, "mask side 4, and not 8"),
        ({"geometry": "other"}, "view geometry .*, and not other"),
        ({"resize": "bicubic"}, "resize kernel .* lanczos, and not bicubic"),
        ({"decode_scale": "half"}, "decode scale full, and not half"),
        ({"dtype": "float16"}, "dtype bfloat16, and not float16"),
    ],
)
def test_a_stale_cache_is_named_in_one_sentence_with_what_differs(world, changes, named):
    cache = open_cache(str(world / "cache"), read_index(world / "shards"))
    cache.check(key_of(world))
    pattern = rf"feature cache .*cache is stale: .*{named}; remove .* make it anew"
    with pytest.raises(UserError, match=pattern) as caught:
        cache.check(dataclasses.replace(key_of(world), **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "pool_grid", "named"),
    [
        (InputSpec(64, mask_side=4), 2, "view side 32, and not 64"),
        (InputSpec(32, mask_side=8), 2, "mask side 4, and not 8"),
        (InputSpec(32, mask_side=4, decode_scale="half"), 2, "decode scale full, and not half"),
        (InputSpec(32, mask_side=4), 4, "pooled grid 2, and not 4"),
        (InputSpec(32, 5, mask_side=4), 2, None),  # fewer views are found among more
    ],
)
def test_the_key_follows_what_a_model_is_given(world, spec, pool_grid, named):
    wanted = feature_key(FrozenBackbone(str(world / "backbone")), spec, pool_grid)
    assert key_of(world).difference(wanted) == named


def test_the_fingerprint_of_weights_follows_any_weight_and_not_the_precision_it_is_held_in(world):
    backbone = FrozenBackbone(str(world / "backbone"))
    before = weights_fingerprint(backbone)
    backbone.model.bfloat16()
    assert weights_fingerprint(backbone) == before
    next(iter(backbone.model.parameters())).view(-1)[0] += 1
    assert weights_fingerprint(backbone) != before
    backbone = FrozenBackbone(str(world / "backbone"))
    backbone.config.rope_theta += 1
    assert weights_fingerprint(backbone) != before


def test_the_fingerprint_of_the_geometry_follows_boxes_and_useful_views(monkeypatch):
    before = geometry_fingerprint(512)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.feature_key.useful_views", lambda *size: torch.ones(12, dtype=torch.bool))
        assert geometry_fingerprint(512) != before
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.feature_key.canvas_boxes", lambda *size: [(0, 0, 1, 1)] * 12)
        assert geometry_fingerprint(512) != before
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.feature_key.PIXELS_VERSION", 2)
        assert geometry_fingerprint(512) != before
    assert geometry_fingerprint(512) == before


def test_a_cache_of_other_shards_is_named(world, tmp_path):
    index = dataclasses.replace(read_index(world / "shards"), source_sha256="cd" * 32)
    with pytest.raises(UserError, match=r"stale: it was made from other shards \(abababababab, and not cdcdcdcdcdcd\)"):
        open_cache(str(world / "cache"), index)
    make_shards(tmp_path / "more", {"train": [0, 1] * PHOTOS, "val": [0, 1, 0]})
    cache = open_cache(str(world / "cache"), read_index(tmp_path / "more"))
    with pytest.raises(UserError, match=r"it lacks 6 of 12 photos of the split 'train'"):
        open_split(
            tmp_path / "more", read_index(tmp_path / "more"), "train", small_config("none").input_spec("full"), cache
        )


def test_a_row_without_a_mask_asks_a_url_for_nothing_more_than_it_has(world, monkeypatch):
    asked, real = [], LocalFileSystem.cat_file
    monkeypatch.setattr(
        LocalFileSystem,
        "cat_file",
        lambda self, path, start=None, end=None, **more: (
            asked.append((start, end)) or real(self, path, start=start, end=end, **more)
        ),
    )
    row = split(world, place=f"file://{world / 'columns'}")[0]
    assert row["mask_targets"].isnan().all() or not row["mask_targets"].any()
    assert all(start is None or start < end for start, end in asked)
    assert len(asked) > 8


def test_a_cache_behind_a_url_gives_the_same_rows(world):
    remote, local = split(world, place=f"file://{world / 'cache'}"), split(world)
    assert torch.equal(remote[4]["cells"], local[4]["cells"])


def test_a_cache_of_the_format_before_gives_the_same_samples(world):
    for name in ("train", "val"):
        before, now = split(world, name, place=world / "columns"), split(world, name)
        for number in range(len(now) * now.copies):
            torch.testing.assert_close(before[number], now[number], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("url", [False, True])
def test_a_sample_is_one_read_once_its_file_is_known(world, monkeypatch, url):
    data = split(world, place=f"file://{world / 'cache'}" if url else world / "cache")
    first = data[0]
    asked = []
    for owner, name in ((LocalFileSystem, "cat_file"), (os, "preadv"), (os, "pread")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, real=real, **more: (asked.append(1), real(*given, **more))[1])
    again, copy = data[0], data[len(data)]
    assert len(asked) == 2
    assert torch.equal(again["cells"], first["cells"])
    assert not torch.equal(again["cells"], copy["cells"])


def test_a_record_is_read_from_tars_that_were_made_anew_since(world, tmp_path):
    make_shards(tmp_path / "shards", {"train": [0, 1] * (PHOTOS // 2), "val": [0, 1, 0]}, text_dim=3)
    index, spec = read_index(tmp_path / "shards"), small_config("none").input_spec("full")
    cache = open_cache(str(world / "cache"), index)
    data, online = (open_split(tmp_path / "shards", index, "train", spec, one) for one in (cache, None))
    assert torch.equal(data[0]["text"], online[0]["text"])
    assert len(data[0]["text"]) == 3
    assert data.load(0)[0] == online.load(0)[0]


def test_records_of_the_cache_are_those_of_the_tars(world):
    for name in ("train", "val"):
        cached, before = split(world, name), split(world, name, place=world / "columns")
        for number in range(len(cached) * cached.copies):
            assert cached.load(number)[0] == before.load(number)[0] == cached.record(number % len(cached))


def test_a_fold_opens_no_tar_either(world, monkeypatch):
    index, spec = read_index(world / "shards"), small_config("none").input_spec("full")
    keys = [sample.key for name in ("train", "val") for sample in index.splits[name].samples]
    dealt = deal(index, Folds(index.source_sha256, 3, {key: number % 3 for number, key in enumerate(keys)}), 0)
    data, online = (open_split(world / "shards", dealt, "train", spec, one) for one in (cache_of(world, dealt), None))
    assert len(set(data.split.homes)) == 2
    records = [online.record(row) for row in range(len(online))]
    monkeypatch.setattr(ShardDataset, "record", lambda *_: pytest.fail("a tar is opened"))
    assert [data.load(row)[0] for row in range(len(data))] == records


def cache_of(world, index):
    return open_cache(str(world / "cache"), index)


def test_without_a_cache_a_split_is_read_from_the_photos(world):
    assert type(split(world, cached=False)) is ShardDataset
