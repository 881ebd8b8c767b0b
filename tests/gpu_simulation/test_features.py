"""Features on a GPU: extraction queues its passes without a wait of the host, and memory gathers its batches there."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from data_prep.features.extraction import Extractor, Item, ViewDataset, pack
from data_prep.features.options import ModelChoice, Options
from data_prep.scenes.data_set import scenes
from data_prep.shards.command import shard
from pipeline.data.batch import collate
from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_dataset import open_split
from pipeline.data.feature_memory import TOKENS, FeatureMemory
from pipeline.data.features import open_cache
from pipeline.data.index import read_index
from pipeline.model.backbone import FrozenBackbone, pool_cells, pool_regions
from pipeline.model.config import LossConfig
from pipeline.model.encoder import all_tokens
from pipeline.model.roadwork import RoadworkModel
from tests.feature_cache import make_cache
from tests.gpu_simulation.device import CUDA
from tests.gpu_simulation.examples import assert_waits, photos, small_config
from tests.gpu_simulation.test_training import check, take_step
from tests.small_run import make_backbone
from tests.small_run import small_config as narrow_config

SIDE, GRID = 144, 2  # of a view that small, a copy has fewer useful ones than its photo
OPTIONS = Options("cuda", 0, 24, compile=False, attention="auto", shard_mb=1.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes, some of them without masks, and a cache of them with two copies of each."""
    folder = tmp_path_factory.mktemp("world")
    scenes(folder / "scenes", 6, "320x240", seed=3, workers=1)
    table = pd.read_csv(folder / "scenes" / "metadata.csv")
    table.loc[::3, "mask"] = None
    table.to_csv(folder / "scenes" / "metadata.csv", index=False)
    shard(folder / "scenes", folder / "shards", workers=1, val_share=0.0, test_share=0.0, splits="random")
    backbone = make_backbone(folder / "backbone")
    make_cache(folder / "cache", folder / "shards", backbone, copies=2, model=ModelChoice(view_side=SIDE))
    return folder


def config_of(world):
    return narrow_config(str(world / "backbone"), view_side=SIDE)


def rows_of(world):
    """Rows as the decoding workers make them, in pinned memory."""
    index, spec = read_index(world / "shards"), config_of(world).input_spec("full")
    data = ViewDataset({"train": ShardDataset(world / "shards", index, "train", spec)},
                       [Item("train", row, 3) for row in range(6)])  # fmt: skip
    return [
        {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in row.items()}
        for number in range(len(data)) for row in data[number]
    ]  # fmt: skip


def test_passes_of_extraction_do_not_wait(gpu, world):
    rows = rows_of(world)
    assert len({len(row["views"]) for row in rows}) > 1
    passes = list(pack(rows, OPTIONS.batch_views))
    extractor = Extractor(FrozenBackbone(str(world / "backbone"), CUDA), GRID, OPTIONS, workers=0)
    with gpu.watch() as waits:
        found = list(extractor.batches(rows))
    assert waits == []
    assert len(passes) > 2
    assert [row.photo for row in found] == [row["photo"] for row in rows]
    assert extractor.views == sum(len(row["views"]) for row in rows)
    for row in found:
        for tokens in (row.tokens.cls, row.tokens.cells, row.tokens.regions):
            assert (tokens.device.type, tokens.dtype) == ("cpu", torch.bfloat16)
            assert gpu.is_pinned(tokens)
            assert tokens.isfinite().all()


def test_extracted_tokens_are_those_of_one_photo_after_another(gpu, world, monkeypatch):
    monkeypatch.setattr("pipeline.model.backbone.compute_dtype", lambda device: torch.float32)
    rows = rows_of(world)[:7]
    backbone = FrozenBackbone(str(world / "backbone"))
    extractor = Extractor(FrozenBackbone(str(world / "backbone"), CUDA), GRID, OPTIONS, workers=0)
    for row, found in zip(rows, extractor.batches(rows), strict=True):
        cls, patches = backbone(row["views"])
        expected = cls, pool_cells(patches, GRID), pool_regions(patches[:1], row["boxes"][None])[0]
        ours = found.tokens.cls, found.tokens.cells, found.tokens.regions
        for part, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(part.float(), theirs, rtol=0.01, atol=0.01)


def test_all_tokens_of_photos_do_not_wait(gpu):
    config = small_config()
    batch = photos(config)
    backbone = FrozenBackbone(config.backbone, CUDA)
    with gpu.watch() as waits:
        tokens = all_tokens(backbone, batch["views"], batch["boxes"], batch["view_mask"], config.pool_grid)
    assert waits == []
    assert {part.device for part in tokens} == {CUDA}
    assert not tokens.cls[0, 5:].any()
    assert tokens.cls[0, :5].any()


@pytest.mark.parametrize("place", ["host", "device"])
def test_features_in_memory(gpu, world, place):
    """Batches are those from the files, gathered without a wait, and a step on them waits for its experts alone."""
    config, index = config_of(world), read_index(world / "shards")
    cache = open_cache(str(world / "cache"), index)
    data = open_split(str(world / "shards"), index, "train", config.input_spec("full"), cache)
    memory = FeatureMemory(data)
    if place == "device":
        memory.allocate(CUDA)
    else:
        memory.use(torch.empty(memory.bytes, dtype=torch.uint8))
    assert list(memory.fill(range(len(memory)), 0)) == list(range(len(memory)))
    numbers = [0, 3, len(memory) + 1, 2 * len(memory) + 2]
    with gpu.watch() as waits:
        batch = memory.__getitems__(numbers)
    assert waits == []
    wanted = collate([data[number] for number in numbers])
    assert batch.keys() == wanted.keys()
    for name, value in batch.items():
        on_device = place == "device" and name in TOKENS
        assert (value.device == CUDA) == on_device, name
        torch.testing.assert_close(value.cpu(), wanted[name], rtol=0, atol=0, equal_nan=True)
    torch.manual_seed(0)
    model = RoadworkModel.build(config, LossConfig(), device=CUDA).to(torch.bfloat16).train()
    with gpu.watch() as waits:
        output = take_step(model, batch)
    assert_waits(waits, {}, layers=config.layers)
    check(model, output)
