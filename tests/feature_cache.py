"""A feature cache of the noisy photos in `small_run`, made by the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data_prep.features.command import features
from pipeline.config import Config, DataConfig, to_yaml
from pipeline.files import sha256_of, write_json
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
        for views, classes in zip(tensors["view_mask"], tensors["mask_classes"], strict=True):
            seen, known = int(views.sum()), int(classes.sum())
            shapes = (seen, dim), (seen, grid**2, 2 * dim), (1, len(views), dim), (known, side, side)
            for column, shape in zip(columns.values(), shapes, strict=True):
                size = 2 * torch.Size(shape).numel()
                column.append(data[:size].view(torch.int16).reshape(shape))
                data = data[size:]
        assert not len(data)
        kinds = {"masks": torch.float16}
        whole = {name: torch.cat(column).view(kinds.get(name, torch.bfloat16)) for name, column in columns.items()}
        save_file({**tensors, **whole}, path)
        shard.update(bytes=path.stat().st_size, sha256=sha256_of(path))
    write_json(folder / "index.json", {**index, "format": "roadwork features 2"})
    return folder
