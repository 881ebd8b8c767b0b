"""The feature cache on a CPU: how fast it is made and read, what an epoch from it takes, and how many bytes it has.

Extraction and training are limited by the machine as a whole, so these rates are by the wall clock. `benchmarks.gpu`
measures what a GPU changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.form import Goal, Report, Row, compare, exact, interleave, machine, publish, timed, versions
from benchmarks.loops import BareLoop
from data_prep.features.command import features as make_cache
from data_prep.features.extraction import Extractor, decoding_workers
from data_prep.features.job import row_bytes
from data_prep.features.options import ModelChoice, Options
from data_prep.features.writer import FeatureWriter, plan_shards
from data_prep.scenes.data_set import KIND, scenes
from data_prep.shards.command import shard
from pipeline.cli import command
from pipeline.config import Config, find_recipe, read_config
from pipeline.data.batch import collate
from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_dataset import FeatureDataset, open_split
from pipeline.data.feature_key import feature_key
from pipeline.data.feature_reader import SMALL
from pipeline.data.features import COLUMNS, open_cache
from pipeline.data.index import INDEX_NAME, Index, read_index
from pipeline.files import sha256_of, write_json
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.encoder import all_tokens
from pipeline.model.roadwork import RoadworkModel

PACKAGES = ("torch", "transformers", "safetensors", "simplejpeg")
RECIPE = "demo"
BATCH = 16
FILES = 4  # that a round of extraction writes
LOOP_GOAL, READ_GOAL, EPOCH_GOAL = Goal(0.95), Goal(1), Goal(1 / 3, at_most=True)
NOTES = {
    "loop": "both in one process with a thread for each core. Theirs takes photo after photo: read, decode, cut, "
    "twelve views through the backbone on all threads, keep the tokens in memory. Ours runs passes side by side, each "
    "on one thread, decodes meanwhile, and also writes, hashes and syncs the cache, which theirs leaves out",
    "read": "one process, samples in random order, files in the memory of the system, every checksum compared. Theirs "
    "reads a sample five times, four tensors of the cache and the record in its tar; ours reads it once",
    "epoch": "the head of the demo recipe, forward, backward and AdamW on every photo of the training split, with all "
    "views in every fourth step as in training; both read in one process",
    "room": "tokens in bf16, only of the views that add something, and the shares of the mask's classes in float16; "
    "theirs is the JPEG files that all comes from",
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    images: int
    extracted: int
    """Photos of one round of extraction."""
    rounds: int


FULL = Plan(images=600, extracted=96, rounds=5)
QUICK = Plan(images=80, extracted=32, rounds=3)


def features(quick: bool = False, out: Path | None = None, seed: int = 0) -> Path:
    """Measure extraction on a CPU, training from the cache and its size.

    Args:
        quick: Fewer photos and rounds, in 90 seconds on two cores.
        out: Folder for features.json; benchmarks/results if not given, or runs/benchmarks with --quick.
        seed: Seed of the scenes and of the order of measuring.
    """
    rows = measure(QUICK if quick else FULL, seed)
    return publish(Report("features", machine(), versions(PACKAGES), seed, rows), out, quick)


def measure(plan: Plan, seed: int) -> tuple[Row, ...]:
    """All rows of the benchmark."""
    with tempfile.TemporaryDirectory(prefix="roadwork-features-") as place:
        shards, cache = Path(place) / "shards", Path(place) / "cache"
        scenes(Path(place) / "photos", plan.images, "1024x768", seed=seed)
        shard(Path(place) / "photos", shards, val_share=0.0, test_share=0.0, splits="random")
        make_cache(str(shards), cache, recipe=RECIPE, model=ModelChoice(), device="cpu")
        config, index = read_config(find_recipe(RECIPE)), read_index(shards)
        config.data.shards = str(shards)
        on = f"{KIND} 1024x768, {config.model.backbone}, CPU"
        return (
            extraction(config, index, plan, Path(place) / "again", on, seed),
            reading(config, index, cache, Path(place) / "columns", plan, on, seed),
            epochs(config, index, str(cache), plan, on, seed),
            room(index, cache, on),
        )


def extraction(config: Config, index: Index, plan: Plan, out: Path, on: str, seed: int) -> Row:
    """Photos per second into the cache, beside a plain loop."""
    model = config.model
    backbone = FrozenBackbone(model.backbone)
    data = ShardDataset(config.data.shards, index, "train", config.input_spec)
    size = row_bytes(feature_key(backbone, config.input_spec, model.pool_grid), backbone.hidden_size)
    file_mb = size * (plan.extracted // FILES + 0.5) / 1e6
    options = Options("cpu", None, None, compile=False, attention="auto", shard_mb=file_mb)
    shards = plan_shards(index, 0, size, file_mb)[:FILES]
    items = [item for one in shards for item in one.items]
    out.mkdir()

    def ours() -> None:
        extractor = Extractor(backbone, model.pool_grid, options, decoding_workers(backbone.device))
        with FeatureWriter(out, index, shards) as writer:
            for row in extractor.run({"train": data}, items):
                writer.add(row)

    def theirs() -> None:
        kept = []
        for item in items:
            photo = collate([data[item.row]])
            kept.append(all_tokens(backbone, photo["views"], photo["boxes"], photo["view_mask"], model.pool_grid))

    found = interleave({"ours": timer(ours), "theirs": timer(theirs)}, plan.rounds, seed)
    rates = {name: [len(items) / second for second in seconds] for name, seconds in found.items()}
    what = f"extraction, {on}"
    return compare(what, "a plain loop", rates["ours"], rates["theirs"], "images/s", LOOP_GOAL, NOTES["loop"])


def reading(config: Config, index: Index, cache: Path, columns: Path, plan: Plan, on: str, seed: int) -> Row:
    """Samples per second from the cache, beside the same cache in the format before."""
    data = open_split(config.data.shards, index, "train", config.input_spec, open_cache(str(cache), index))
    assert isinstance(data, FeatureDataset)
    write_columns(data, columns)
    before = open_split(config.data.shards, index, "train", config.input_spec, open_cache(str(columns), index))
    order = np.random.default_rng(seed).permutation(len(data)).tolist()

    def read(source: ShardDataset) -> None:
        for row in order:
            source[row]

    for row in order:  # equal samples, or the rates would be those of different work
        assert all(torch.equal(data[row][name], before[row][name]) for name in ("cls", "cells", "regions"))
    found = interleave(
        {name: timer(partial(read, one)) for name, one in (("ours", data), ("theirs", before))}, plan.rounds, seed
    )
    rates = {name: [len(order) / second for second in seconds] for name, seconds in found.items()}
    what = f"a sample from the cache, {on}"
    return compare(what, COLUMNS, rates["ours"], rates["theirs"], "samples/s", READ_GOAL, NOTES["read"])


def write_columns(data: FeatureDataset, folder: Path) -> None:
    """Write a cache without copies in the format before, in which each tensor of a file lies with those of its rows."""
    folder.mkdir()
    reader, written, done = data.reader, [], 0
    for file in reader.index.shards:
        stored = [reader.read(row, 0) for row in range(done, done + len(file.photos))]
        rows = [row._replace(record=row.record[:0]) for row in stored]
        columns = {name: torch.cat([getattr(row, name) for row in rows]) for name in ("cls", "cells", "masks")}
        columns |= {name: torch.stack([getattr(row, name) for row in rows]) for name in ("regions", *SMALL)}
        path = folder / file.name
        save_file(columns, path)
        photos = tuple(replace(photo, checksums=(row.checksum(),))
                       for photo, row in zip(file.photos, rows, strict=True))  # fmt: skip
        written.append(replace(file, bytes=path.stat().st_size, sha256=sha256_of(path), photos=photos))
        done += len(file.photos)
    index = replace(reader.index, format=COLUMNS, shards=tuple(written), tars=())
    write_json(folder / INDEX_NAME, index.to_json())


def epochs(config: Config, index: Index, cache: str, plan: Plan, on: str, seed: int) -> Row:
    """Seconds of a training epoch from the cache, beside one from the photos."""
    splits = {
        name: open_split(config.data.shards, index, "train", config.input_spec, open_cache(place, index))
        for name, place in (("ours", cache), ("theirs", ""))
    }
    steps = -(-len(splits["ours"]) // BATCH)
    model = RoadworkModel.build(config.model, config.loss, config.data.decode_scale).train()
    loop = BareLoop(model, config.optim, steps)

    def epoch(data: ShardDataset) -> None:
        torch.manual_seed(seed)
        for step, batch in enumerate(DataLoader(data, BATCH, sampler=RandomSampler(data), collate_fn=collate)):
            loop.step(step, [batch], keep_all=step % config.train.distil_every == 0)

    arms = {name: timer(partial(epoch, data)) for name, data in splits.items()}
    found = interleave(arms, plan.rounds, seed)
    what, against = f"an epoch from the cache, {on}", "an epoch from the photos"
    return compare(what, against, found["ours"], found["theirs"], "s", EPOCH_GOAL, NOTES["epoch"])


def timer(work: Callable[[], object]) -> Callable[[], float]:
    """A function that runs `work` and returns how many seconds it took."""
    return lambda: timed(work).wall_s


def room(index: Index, cache: Path, on: str) -> Row:
    """Compare the bytes of a photo in the cache with those of the photo's file."""
    samples = index.split("train").samples
    photos = [sample.members[sample.photo_extension][1] for sample in samples]
    stored = sum(path.stat().st_size for path in cache.glob("*.safetensors")) / len(samples)
    both = stored, sum(photos) / len(photos)
    return exact(f"room of a photo's tokens, {on}", "its JPEG", *both, "bytes", None, NOTES["room"])


if __name__ == "__main__":
    raise SystemExit(command(features))
