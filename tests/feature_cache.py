"""A feature cache of the noisy photos in `small_run`, made by the command."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from data_prep.features.command import features
from data_prep.features.extraction import Row
from data_prep.features.writer import Plan, plan_shards, write_shard
from data_prep.work.receipts import Receipts
from pipeline.config import Config, DataConfig, to_yaml
from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_key import FeatureKey
from pipeline.data.features import FORMAT, FeatureShard, PhotoTokens
from pipeline.data.index import read_index
from pipeline.data.record import Record
from pipeline.files import sha256_of, write_json
from pipeline.model.config import InputSpec
from pipeline.parsing.typed_json import to_type
from tests.small_run import small_config

ROW_BYTES = 12 * ((2 + 2 * 4) * 32 * 2 + 4 * 4 + 1) + 6 * (4 * 4 * 2 + 1) + 1
"""Of the backbone and the sizes that `small_run` has."""


def make_cache(folder: Path, shards: Path, backbone: str, rows_per_file: int = 4, **options: object) -> Path:
    """A finished cache in `folder`; see the command `features` for the options."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(to_yaml(Config(data=DataConfig(shards=str(shards)), model=small_config(backbone))))
    size = (rows_per_file + 0.5) * ROW_BYTES / 1e6
    features(out=folder, **{"recipe": str(recipe), "shard_mb": size, "workers": 0, **options})
    return folder


def in_columns(cache: Path, folder: Path) -> Path:
    """A copy of a cache in the format before the present one: each tensor of a file with all of its rows.

    Rows are cut out of the files by arithmetic of its own, with the sizes that `small_run` has.
    """
    shutil.copytree(cache, folder)
    index = json.loads((folder / "index.json").read_text())
    dim, grid, side = index["dim"], index["key"]["pool_grid"], index["key"]["mask_side"]
    for shard in index["shards"]:
        path = folder / shard["name"]
        tensors = load_file(path)
        data, columns = tensors.pop("rows"), {name: [] for name in ("cls", "cells", "regions", "masks")}
        kept = tensors["view_mask"], tensors["mask_classes"], tensors.pop("record_sizes")
        for views, classes, record in zip(*kept, strict=True):
            seen, known = int(views.sum()), int(classes.sum())
            shapes = (seen, dim), (seen, grid**2, 2 * dim), (1, len(views), dim), (known, side, side)
            for column, shape in zip(columns.values(), shapes, strict=True):
                size = 2 * torch.Size(shape).numel()
                column.append(data[:size].clone().view(torch.int16).reshape(shape))
                data = data[size:]
            data = data[record:]
        assert not len(data)
        kinds = {"masks": torch.float16}
        whole = {name: torch.cat(column).view(kinds.get(name, torch.bfloat16)) for name, column in columns.items()}
        save_file({**tensors, **whole}, path)
        checksums = iter(_checksums({**whole, **tensors}))
        for photo in shard["photos"]:
            photo["checksums"] = [next(checksums) for _ in photo["checksums"]]
        shard.update(bytes=path.stat().st_size, sha256=sha256_of(path))
    del index["tars"]
    write_json(folder / "index.json", {**index, "format": "roadwork features 2"})
    return folder


def _checksums(columns: dict[str, torch.Tensor]) -> list[int]:
    """CRC-32 of each row of a file in the format before."""
    counts = {"cls": columns["view_mask"], "cells": columns["view_mask"], "masks": columns["mask_classes"]}
    values = [0] * len(columns["has_mask"])
    for name in ("cls", "cells", "regions", "masks", "boxes", "view_mask", "mask_classes", "has_mask"):
        parts = counts[name].sum(1).tolist() if name in counts else 1
        for row, part in enumerate(columns[name].split(parts)):
            values[row] = zlib.crc32(part.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), values[row])
    return values


def make_up_cache(folder: Path, shards: Path, seed: int, copies: int = 0) -> dict[tuple[str, int, int], Row]:
    """A cache of random rows: any views but the first may add nothing, and any classes be in the mask, or none at all.

    Returns:
        The rows by split, row and copy, with 12 views, grids of 2 x 2 and masks of 4 x 4.
    """
    index, draw = read_index(shards), np.random.default_rng(seed)
    rows, written = {}, []
    planned = tuple(plan_shards(index, copies, row_bytes=1000, shard_mb=0.01))
    folder.mkdir()
    for shard in planned:
        data = ShardDataset(shards, index, shard.split, InputSpec(32, mask_side=4))
        places = [(item.row, copy) for item in shard.items for copy in range(item.copies)]
        of_file = [_random_row(draw, row, data.record(row)) for row, _ in places]
        write_shard(folder, index, shard, of_file)
        written.append(to_type(Receipts(folder).read(shard.name), FeatureShard))
        rows |= {(shard.split, *place): row for place, row in zip(places, of_file, strict=True)}
    key = FeatureKey("made up", "ab" * 32, 32, 12, 2, 4, "boxes", "lanczos", "full", "bfloat16")
    tars = tuple(tar.sha256 for split in index.splits.values() for tar in split.shards)
    plan = Plan(FORMAT, key, 8, index.source_sha256, copies, "float32", "1.0", planned, tars)
    write_json(folder / "index.json", plan.index(tuple(written)).to_json())
    return rows


def _random_row(draw: np.random.Generator, photo: int, record: Record) -> Row:
    views = draw.random(12) < draw.choice([0, 0.5, 1])
    views[0] = True
    shapes = {"cls": (views.sum(), 8), "cells": (views.sum(), 4, 16), "regions": (12, 8)}
    tokens = {name: torch.from_numpy(draw.normal(size=shape)).bfloat16() for name, shape in shapes.items()}
    boxes = torch.from_numpy(draw.random((12, 4))).float()
    masks = torch.from_numpy(draw.random((6, 4, 4)) * (draw.random((6, 1, 1)) < 0.5)).half().float()
    if draw.random() < 0.3:
        masks[:] = torch.nan
    found = PhotoTokens(**tokens, boxes=boxes, view_mask=torch.from_numpy(views))
    return Row(photo, record.sha256, json.dumps(record.to_json()).encode(), found, masks)
