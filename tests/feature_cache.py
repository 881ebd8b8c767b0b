"""A feature cache of the noisy photos in `small_run`, made by the command."""

from __future__ import annotations

from pathlib import Path

from data_prep.features.command import features
from pipeline.config import Config, DataConfig, to_yaml
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
