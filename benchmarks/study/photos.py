"""The photos of a study: tokens and targets of a feature cache, in arrays that all processes share in memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from benchmarks.study.config import StudyConfig
from data_prep.features.command import features
from data_prep.features.options import ModelChoice
from data_prep.scenes.data_set import scenes
from data_prep.shards.command import shard
from pipeline.config import Config, DataConfig, to_yaml
from pipeline.data.batch import Batch
from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_dataset import open_split
from pipeline.data.feature_key import feature_key
from pipeline.data.features import open_cache
from pipeline.data.index import INDEX_NAME, Index, read_index
from pipeline.data.inputs import leaking_inputs
from pipeline.data.storage import is_url
from pipeline.errors import UserError, require
from pipeline.files import replace_folder, write_json, write_text
from pipeline.model.backbone import FrozenBackbone
from pipeline.names import NUM_VIEWS
from pipeline.progress import track

FORMAT = 1  # of the arrays; raise it when they change
ABOUT = "photos.json"
PROVENANCE = Path(__file__).parents[2] / "pipeline" / "assets" / "scenes-tiny" / "provenance.json"
METADATA = ("gps", "weather", "daytime", "scene")
TENSORS = (
    "cls", "cells", "regions", "boxes", "view_mask", "mask_targets", "gps", "weather", "daytime", "scene", "labels",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Photos:
    """All N labelled photos of the shards, whatever their split in the shards."""

    tensors: dict[str, torch.Tensor]
    """Arguments of the model's forward pass, by name, each [N, ...]; tokens in bf16."""
    groups: np.ndarray
    """Near-duplicates have the same number, int64 [N]."""
    cities: list[str | None]
    data: str
    """What kind of photos these are."""
    leaks: dict[str, str]
    """Metadata fields that give the label away in these shards, and how."""
    fingerprint: str
    """A hash of photos, tokens and targets."""

    @property
    def labels(self) -> np.ndarray:
        """1 roadwork, 0 none, int64 [N]."""
        return self.tensors["labels"].numpy()

    @property
    def points(self) -> np.ndarray:
        """Latitude and longitude in degrees, float64 [N, 2], NaN where unknown."""
        return self.tensors["gps"].numpy()

    @property
    def dim(self) -> int:
        """Width of the backbone's tokens."""
        return int(self.tensors["cls"].shape[-1])

    def batch(self, rows: np.ndarray, num_views: int = NUM_VIEWS) -> Batch:
        """Some photos as the model takes them, int64 [B] rows, with the first views of each."""
        some = torch.from_numpy(rows)
        batch = {name: tensor[some] for name, tensor in self.tensors.items()}
        for name in ("cls", "cells", "regions", "boxes", "view_mask"):
            batch[name] = batch[name][:, :num_views]
        batch["mask_targets"] = batch["mask_targets"].float()
        return batch


def find_photos(config: StudyConfig, shards: str | None, cache: str | None, work: Path) -> Path:
    """Find the study's arrays, and make whatever is missing for them.

    Args:
        config: The recipe.
        shards: Folder of shards, or its URL; without it, procedural scenes are drawn and sharded.
        cache: Feature cache of these shards; without it, one in the work folder.
        work: Folder of the study.

    Returns:
        The folder that `load_photos` reads.

    Raises:
        UserError: The scenes' arguments are wrong, or shards or cache cannot be used.
    """
    if shards is None:
        shards = draw(config, work)
    index, place = read_index(shards), cache or str(work / "features")
    if not is_url(place) and not (Path(place) / INDEX_NAME).is_file():
        recipe = work / "features.yaml"
        write_text(recipe, to_yaml(Config(data=DataConfig(shards=shards), model=config.model)))
        features(shards, Path(place), recipe=str(recipe), model=ModelChoice(), device="auto")
    return gather(config, shards, index, place, work / "tokens")


def draw(config: StudyConfig, work: Path) -> str:
    """Draw and shard the recipe's scenes, unless that is done already; returns the folder of shards."""
    check_pretraining(config)
    scenes(work / "scenes", **config.scenes)
    shard(work / "scenes", work / "shards")
    return str(work / "shards")


def check_pretraining(config: StudyConfig) -> None:
    """Refuse a study on scenes that the embedded backbone was pretrained on.

    Raises:
        UserError: The recipe's seed is that of the pretraining. (Its cities are never a data set's.)
    """
    pretrained = json.loads(PROVENANCE.read_text())["arguments"]["seed"]
    seed = config.scenes.get("seed", 0)
    require(seed != pretrained, "scenes.seed", seed, "another one: scenes-tiny was pretrained on scenes of this seed")


def gather(config: StudyConfig, shards: str, index: Index, place: str, folder: Path) -> Path:
    """Write the arrays, unless they are there already."""
    spec = config.model.input_spec("full")
    key = feature_key(FrozenBackbone(config.model.backbone), spec, config.model.pool_grid)
    cache = open_cache(place, index)
    assert cache is not None
    cache.check(key)
    content = json.dumps([FORMAT, index.source_sha256, index.arguments, asdict(key)], sort_keys=True)
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    written = folder / ABOUT
    if written.is_file() and json.loads(written.read_text())["fingerprint"] == fingerprint:
        return folder
    names = [name for name, split in index.splits.items() if split.samples]
    splits = [open_split(shards, index, name, spec, cache) for name in names]
    data = str(index.arguments.get("source_kind", PurePosixPath(shards).name))
    leaks = leaking_inputs(index, replace(config.model, metadata=METADATA))
    about = {"fingerprint": fingerprint, "data": data, "leaks": leaks}
    replace_folder(folder, lambda fresh: _write(fresh, splits, about))
    load_photos.cache_clear()
    return folder


def _write(folder: Path, splits: list[ShardDataset], about: dict[str, Any]) -> None:
    chosen = [(split, row) for split in splits for row in np.flatnonzero(split.split.labels >= 0).tolist()]
    if not chosen:
        raise UserError("none of the photos in the shards has a label, so there is nothing to study; label some first")
    arrays: dict[str, np.memmap[Any, Any]] = {}
    cities: list[str | None] = []
    for number, (split, row) in enumerate(track(chosen, len(chosen), "reading tokens")):
        record, found = split.load(row)
        for name in TENSORS:
            value = _plain(found[name])
            if number == 0:
                shape = (len(chosen), *value.shape)
                arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", value.dtype, shape)
            arrays[name][number] = value
        cities.append(record.metadata.city)
    for array in arrays.values():
        array.flush()
    groups = [split.split.samples[row].group for split, row in chosen]
    write_json(folder / ABOUT, {**about, "groups": groups, "cities": cities})


def _plain(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a NumPy array: bf16, which NumPy lacks, as its bits, and masks in half precision."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy()
    return tensor.half().numpy() if tensor.ndim == 3 and tensor.dtype == torch.float32 else tensor.numpy()


@lru_cache(maxsize=1)
def load_photos(folder: Path) -> Photos:
    """The arrays that `find_photos` made, mapped into memory: processes share the pages."""
    about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
    tensors = {}
    for name in TENSORS:
        tensor = torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
        tensors[name] = tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
    groups = np.array(about["groups"], dtype=np.int64)
    return Photos(tensors, groups, about["cities"], about["data"], about["leaks"], about["fingerprint"])
