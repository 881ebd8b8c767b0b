"""Damaged files of every format that we read: what is accepted means what it says, the rest is one sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_prep.sources.coco import CocoSource
from data_prep.sources.metadata import BadLabel, parse, select_fields
from data_prep.sources.tables import read_rows
from pipeline.checkpoints import files
from pipeline.config import ACCELERATE_CONFIGS, CONFIGURATIONS, RECIPES, read_config
from pipeline.data.feature_dataset import open_split
from pipeline.data.features import FeatureCache, read_features
from pipeline.data.folds import Folds, read_folds
from pipeline.data.index import read_index
from pipeline.data.integrity import Damage, read_record
from pipeline.distributed.settings import deepspeed_problems, read_deepspeed
from pipeline.errors import UserError
from pipeline.launch.plan import accelerate_problems, read_accelerate
from pipeline.model.config import InputSpec
from pipeline.parsing.typed_json import Malformed, load_json
from pipeline.parsing.yaml_file import parse_yaml
from tests.checkpoints.examples import write
from tests.feature_cache import make_cache
from tests.fuzz.mutation import mutate
from tests.fuzz.values import damaged_json
from tests.fuzz.workers import failures
from tests.small_run import make_backbone, make_shards, noisy_photo
from tests.warm import python

CASES = int(os.environ.get("ROADWORK_FUZZ_CASES", "2000"))
SEED = int(os.environ.get("ROADWORK_FUZZ_SEED", "20"))
ROOT = Path(__file__).parents[2]
DOORS = 24  # samples through a process of its own
Format = Callable[[random.Random, Path], object]
"""Damages one file, reads it, and compares what was read with what stands in it; takes an empty folder."""


def assert_says(read: Any, written: Any, where: str = "it") -> None:
    """What was read is what is written: keys may be ignored or have defaults, but no value is another one."""
    if dataclasses.is_dataclass(read) and not isinstance(read, type):
        read = {field.name: getattr(read, field.name) for field in dataclasses.fields(read)}
    if isinstance(read, dict):
        assert isinstance(written, dict), where
        for key, value in read.items():
            if key in written:
                assert_says(value, written[key], f"{where}.{key}")
    elif isinstance(read, (list, tuple)):
        assert isinstance(written, list), where
        assert len(read) == len(written), where
        for number, value in enumerate(read):
            assert_says(value, written[number], f"{where}[{number}]")
    else:
        assert isinstance(read, bool) == isinstance(written, bool), where
        assert read == written, f"{where}: {read!r} for {written!r}"


class World:
    """One valid file of each format."""

    def __init__(self, place: Path):
        self.shards, self.cache = place / "shards", place / "cache"
        make_shards(self.shards, {"train": [0, 1, 0, None], "val": [1, 0], "test": [1]}, text_dim=3)
        make_cache(self.cache, self.shards, make_backbone(place / "backbone"))
        self.index = read_index(self.shards)
        self.stored = self.tokens(self.cache)
        (self.checkpoint,) = write(place / "checkpoints", 7)
        keys = [sample.key for split in self.index.splits.values() for sample in split.samples]
        parts = {key: number % 3 for number, key in enumerate(keys)}
        self.folds = {"format": "roadwork folds 1", **vars(Folds(self.index.source_sha256, 3, parts))}
        self.photo = place / "photo.jpg"
        self.photo.write_bytes(noisy_photo(0))
        self.coco = {
            "images": [{"id": 1, "file_name": "photo.jpg", "width": 96, "height": 64, "label": 1}],
            "categories": [{"id": 3, "name": "cone"}],
            "annotations": [{"id": 5, "image_id": 1, "category_id": 3, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]],
                             "bbox": [1, 1, 8, 8], "area": 64, "iscrowd": 0}],
        }  # fmt: skip
        self.row = {"file_name": "a.jpg", "label": 1, "lat": 39.77, "lon": -86.18, "weather": ["rainy"],
                    "daytime": "dark", "scene": "urban", "video": "v1", "description": "a, \"b\""}  # fmt: skip

    def index_file(self, rng: random.Random, room: Path) -> None:
        data = damaged_json(load_json((self.shards / "index.json").read_bytes()), rng)
        (room / "index.json").write_bytes(data)
        assert_says(read_index(room), load_json(data))

    def record(self, rng: random.Random, room: Path) -> None:
        sample = self.index.splits["train"].samples[0]
        with (self.shards / "train-00000.tar").open("rb") as tar:
            tar.seek(sample.members["json"][0])
            data = damaged_json(load_json(tar.read(sample.members["json"][1])), rng)
        sealed = dataclasses.replace(sample, record_sha256=hashlib.sha256(data).hexdigest())
        assert_says(read_record(sealed, "train", data), load_json(data))

    def feature_index(self, rng: random.Random, room: Path) -> None:
        data = damaged_json(load_json((self.cache / "index.json").read_bytes()), rng)
        (room / "index.json").write_bytes(data)
        read = read_features(room)
        assert_says({**vars(read), "shards": None}, {**load_json(data), "shards": None})

    def feature_header(self, rng: random.Random, room: Path) -> None:
        """The header of a file of the cache, of the same length, since a file of another one is refused before."""
        cache = room / "cache"
        shutil.copytree(self.cache, cache)
        file = rng.choice(sorted(cache.glob("*.safetensors")))
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        file.write_bytes(mutate(data[:end], rng, same_length=True) + data[end:])
        read = self.tokens(cache)
        assert all(
            torch.equal(one[name], other[name]) for one, other in zip(read, self.stored, strict=True) for name in one
        )

    def tokens(self, cache: Path) -> list[dict[str, torch.Tensor]]:
        """Tokens of all photos, read from a cache."""
        opened = FeatureCache(str(cache), read_features(cache))
        found = []
        for name, split in self.index.splits.items():
            data = open_split(str(self.shards), self.index, name, InputSpec(32), opened)
            found += [
                {kind: data[row][kind] for kind in ("cls", "cells", "regions")} for row in range(len(split.samples))
            ]
        return found

    def manifest(self, rng: random.Random, room: Path) -> None:
        """Signed again, as after a fault before the writing."""
        data = damaged_json(load_json((self.checkpoint / files.MANIFEST).read_bytes()), rng)
        marker = json.dumps({"manifest_sha256": hashlib.sha256(data).hexdigest()}).encode()
        if rng.random() < 0.3:
            marker = damaged_json(load_json(marker), rng)
        read = files.read_manifest({files.MANIFEST: data, files.MARKER: marker}.__getitem__)
        assert_says(read, load_json(data)["files"])

    def state(self, rng: random.Random, room: Path) -> None:
        data = damaged_json({"step": 7, "config": {"train": {"epochs": 3}}, "best": {"step": 5, "loss": 0.5}}, rng)
        (room / files.STATE).write_bytes(data)
        assert_says(files.read_state(room), load_json(data))

    def folds_file(self, rng: random.Random, room: Path) -> None:
        data = damaged_json(self.folds, rng)
        (room / "folds.json").write_bytes(data)
        assert_says(read_folds(room / "folds.json", self.index), load_json(data))

    def recipe(self, rng: random.Random, room: Path) -> None:
        text = rng.choice(sorted(RECIPES.glob("*.yaml"))).read_text()
        data = damaged_yaml(text, rng)
        (room / "recipe.yaml").write_bytes(data)
        read = asdict(read_config(room / "recipe.yaml"))
        assert_says(read, parse_yaml(data.decode()))

    def accelerate(self, rng: random.Random, room: Path) -> None:
        (room / "a.yaml").write_bytes(damaged_yaml((ACCELERATE_CONFIGS / "cpu_2.yaml").read_text(), rng))
        list(accelerate_problems(read_accelerate(room / "a.yaml")))

    def deepspeed(self, rng: random.Random, room: Path) -> None:
        source = rng.choice(sorted((CONFIGURATIONS / "ds_configs").glob("*.json")))
        (room / "d.json").write_bytes(damaged_json(load_json(source.read_bytes()), rng))
        list(deepspeed_problems(read_deepspeed(room / "d.json")))

    def coco_file(self, rng: random.Random, room: Path) -> None:
        (room / "photo.jpg").write_bytes(noisy_photo(0))
        (room / "coco.json").write_bytes(damaged_json(self.coco, rng))
        list(CocoSource(room, room / "coco.json"))

    def table(self, rng: random.Random, room: Path) -> None:
        if rng.random() < 0.5:
            path = room / "metadata.jsonl"
            path.write_bytes(b"\n".join([json.dumps(self.row).encode(), damaged_json(self.row, rng)]))
        else:
            path = room / "metadata.csv"
            cells = [str(value) for value in self.row.values()]
            text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in (self.row, cells, cells))
            path.write_bytes(mutate(text.encode(), rng) if rng.random() < 0.8 else text.encode("utf-16"))
        for row in read_rows(path):
            parse(select_fields(row))


def damaged_yaml(text: str, rng: random.Random) -> bytes:
    """A recipe's text in which something is wrong; flow style is JSON, with all that can be wrong there."""
    if rng.random() < 0.5:
        return damaged_json(yaml.safe_load(text), rng)
    if rng.random() < 0.3:
        more = ("train:\n", "x: &a [1]\ny: *a\n", "data: !!python/name:os.system\n", "\t", "? [a]\n")
        return (text + rng.choice(more)).encode()
    return mutate(text.encode(), rng)


FORMATS: tuple[str, ...] = (
    "index_file", "record", "feature_index", "feature_header", "manifest", "state", "folds_file", "recipe",
    "accelerate", "deepspeed", "coco_file", "table",
)  # fmt: skip
REFUSED = (UserError, Malformed, Damage, files.Damaged, BadLabel)  # the last is a reject of one row


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("formats"))


def test_undamaged_files_are_read(world, tmp_path, monkeypatch):
    """Else the cases below would all be refused for another reason."""
    monkeypatch.setattr(f"{__name__}.damaged_json", lambda values, rng: json.dumps(values).encode())
    monkeypatch.setattr(f"{__name__}.damaged_yaml", lambda text, rng: text.encode())
    monkeypatch.setattr(f"{__name__}.mutate", lambda data, rng, **options: data)
    for name in FORMATS:
        (tmp_path / name).mkdir()
        getattr(world, name)(random.Random(3), tmp_path / name)


def assert_is_one_sentence(text: str) -> None:
    assert 0 < len(text) < 1500
    assert "\n" not in text, text


def test_damaged_files_are_one_sentence_or_what_they_say(world, tmp_path):
    def check(number: int) -> None:
        rng, room = random.Random(f"{SEED} {number}"), tmp_path / str(number)
        room.mkdir()
        try:
            getattr(world, FORMATS[number % len(FORMATS)])(rng, room)
        except REFUSED as refused:
            assert_is_one_sentence(str(refused))

    found = failures(check, range(CASES))
    report = "\n".join(
        f"case {number} of seed {SEED}, {FORMATS[number % len(FORMATS)]}: {problem[-1500:]}"
        for number, problem in sorted(found.items())[:5]
    )
    assert not found, f"{len(found)} of {CASES}:\n{report}"


def through_the_door(world: World, number: int, room: Path) -> tuple[list[str], set[int]]:
    """A command that reads a damaged file, and the statuses with which it may end."""
    rng, kind = random.Random(f"{SEED} door {number}"), number % 4
    shards = room / "shards"
    shutil.copytree(world.shards, shards)
    run = ["-m", "pipeline.train", "--config", str(room / "recipe.yaml"), "--shards", str(shards), "--dry-run"]
    recipe = {"train": {"batch_size": 2, "micro_batch_size": 2, "wandb": False}, "model": {"backbone": "scenes-tiny"}}
    (room / "recipe.yaml").write_text(json.dumps(recipe))
    if kind == 0:
        (room / "recipe.yaml").write_bytes(damaged_json(recipe, rng))
        return run, {0, 2}
    if kind == 1:
        (shards / "index.json").write_bytes(damaged_json(load_json((shards / "index.json").read_bytes()), rng))
        return run, {0, 2}
    if kind == 2:
        (shards / "index.json").write_bytes(damaged_json(load_json((shards / "index.json").read_bytes()), rng))
        words = ["-m", "data_prep", "verify", "--shards", str(shards), "--out", str(room / "out"), "--workers", "1"]
        return words, {0, 2, 3}
    (room / "x.jsonl").write_bytes(damaged_json(world.row, rng))
    shutil.copy(world.photo, room / "a.jpg")
    places = {"source": room, "metadata": room / "x.jsonl", "out": room / "out", "splits": "random", "workers": 1}
    return ["-m", "data_prep", "shard", *(f"--{name}={value}" for name, value in places.items())], {0, 2}


@pytest.mark.parametrize("number", range(DOORS))
def test_a_command_that_meets_a_damaged_file_ends_with_one_sentence(world, tmp_path, number):
    (tmp_path / "room").mkdir()
    words, allowed = through_the_door(world, number, tmp_path / "room")
    done = subprocess.run([python(), *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in allowed, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == (done.returncode == 2), done.stderr
