"""How the command `features` makes a cache.

One process or many, here or under `accelerate launch`: every process takes whole files of the cache, the first one
plans before and writes the index after. What is finished stays when the work is cut off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.features.extraction import Extractor, Row
from data_prep.features.options import ModelChoice, Options
from data_prep.features.writer import FeatureWriter, PlannedShard, is_written, plan_shards, read_receipt
from data_prep.shards.merge import planned
from data_prep.work.workplace import HEADER_NAME, SUMMARY_NAME, Workplace
from pipeline.config import Config, find_recipe, parse_config
from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_key import STORED_DTYPE, FeatureKey, feature_key
from pipeline.data.features import MASK_DTYPE, FeatureIndex, read_features
from pipeline.data.index import INDEX_NAME, Index, read_index
from pipeline.data.storage import is_url, open_folder
from pipeline.devices import pick_device
from pipeline.distributed import StopSignal
from pipeline.distributed.agreement import on_all_ranks, on_rank_zero
from pipeline.errors import Stopped, UserError, require
from pipeline.files import write_json, write_summary
from pipeline.model.backbone import FrozenBackbone, compute_dtype
from pipeline.progress import say, silence_libraries, track
from pipeline.training.throughput import flops_per_view, matmul_rate
from pipeline.vocabulary import MASK_CLASSES

REMEDY = "choose another --out or remove it"
# Ranks wait for the slowest one with nothing else to do; a fault ends them all through the launcher.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Process:
    """One of those that share the work."""

    rank: int
    world_size: int
    device: torch.device


def extract(
    shards: str | None, out: Path | None, recipe: str, model: ModelChoice, copies: int, options: Options
) -> Path:
    """See the command `features`."""
    start = time.monotonic()
    silence_libraries()
    config = read_choice(recipe, model)
    source = shards or config.data.shards
    target = config.data.features if out is None else str(out)
    require(bool(target) and not is_url(target), "--out", target, "a folder of this machine")
    index = read_index(source)
    with processes(options.device) as process, ExitStack() as held:
        backbone = FrozenBackbone(config.model.backbone, process.device)
        job = Job(config, index, source, Workplace(target, None), copies, options)
        plan = on_rank_zero(lambda: job.begin(backbone, held))
        if plan is None:
            return job.summary_path
        speed = on_all_ranks(lambda: job.compute(backbone, plan, process))
        return on_rank_zero(lambda: job.finish(plan, speed, process.world_size, time.monotonic() - start))


@dataclass
class Job:
    """One cache to be made. `begin` and `finish` are rank 0's, `compute` is every rank's."""

    config: Config
    index: Index
    source: str
    place: Workplace
    copies: int
    options: Options

    @property
    def summary_path(self) -> Path:
        """Of the finished cache."""
        return Path(self.place.out) / SUMMARY_NAME

    def begin(self, backbone: FrozenBackbone, held: ExitStack) -> dict[str, Any] | None:
        """Lock the workplace and plan, or go on with the plan that is there.

        Args:
            backbone: The loaded one.
            held: Gets the lock, which ends with it.

        Returns:
            The plan, with the numbers of the files that are `missing`; None where the cache is finished already.

        Raises:
            UserError: Other features are in the output's place, or the disk cannot hold these.
        """
        held.enter_context(self.place.locked())
        key = feature_key(backbone, self.config.input_spec, self.config.model.pool_grid)
        size = row_bytes(key, backbone.hidden_size)
        wanted: dict[str, Any] = {
            "key": asdict(key),
            "dim": backbone.hidden_size,
            "source_sha256": self.index.source_sha256,
            "copies": self.copies,
            "precision": str(compute_dtype(backbone.device)).removeprefix("torch."),
            "version": version("roadwork"),
            "shards": [asdict(shard) for shard in plan_shards(self.index, self.copies, size, self.options.shard_mb)],
        }
        if self._is_finished(key):
            say(f"{self.place.out} is finished already: the same photos, the same backbone, the same views")
            self.place.remove()
            return None
        if self._is_assembled(wanted):
            self.place.publish([shard["name"] for shard in wanted["shards"]])
            return None
        if planned(self.place, wanted) is None:
            self.place.clear()
            write_json(self.place.path / HEADER_NAME, wanted)
        plan = shards_of(wanted)
        missing = [number for number, shard in enumerate(plan) if not is_written(self.place.path, shard)]
        self.place.check_space(size * sum(plan[number].rows for number in missing))
        if len(missing) < len(plan):
            say(f"going on: {len(plan) - len(missing)} of {len(plan)} files are written already")
        return {**wanted, "missing": missing}

    def compute(self, backbone: FrozenBackbone, header: dict[str, Any], process: Process) -> dict[str, Any]:
        """Compute and write this process's share of the missing files.

        Returns:
            What was reached: `rows`, `views`, `images_per_s`, and on a GPU `matmul_tflops` and `mfu`.
        """
        plan = shards_of(header)
        mine = [plan[number] for number in header["missing"][process.rank :: process.world_size]]
        items = [item for shard in mine for item in shard.items]
        rows = sum(shard.rows for shard in mine)
        spec = self.config.input_spec
        data = {name: ShardDataset(self.source, self.index, name, spec) for name in {item.split for item in items}}
        meter = Meter(backbone, self.config.model.view_side)
        workers = spare_cores(process.device) if self.options.workers is None else self.options.workers
        extractor = Extractor(backbone, self.config.model.pool_grid, self.options, workers)
        stop = StopSignal() if "RANK" in os.environ else None
        with FeatureWriter(self.place.path, self.index, mine) as writer:
            meter.begin(extractor)
            for row in self._tracked(extractor.run(data, items), rows, process, meter):
                writer.add(row)
                if stop is not None and stop.received:
                    raise Stopped("the files that are finished are kept; the same command goes on from there")
        return meter.result(rows)

    def finish(self, header: dict[str, Any], speed: dict[str, Any], world_size: int, wall_s: float) -> Path:
        """Describe the written files in an index, and publish all."""
        receipts = [read_receipt(self.place.path, shard) for shard in shards_of(header)]
        written = [receipt for receipt in receipts if receipt is not None]
        assert len(written) == len(receipts), "every rank has written its files"
        values = {name: value for name, value in header.items() if name not in ("shards", "missing")}
        index = FeatureIndex(**{**values, "key": FeatureKey(**values["key"])}, shards=tuple(written))
        photos = sum(len(shard.photos) for shard in written)
        size = sum(shard.bytes for shard in written)
        write_summary(
            self.place.path,
            {
                "photos": photos,
                "copies": self.copies,
                "files": len(written),
                "bytes": size,
                "bytes_per_photo": round(size / max(photos, 1)),
                "key": header["key"],
                "processes": world_size,
                "rank_zero": speed,
                "wall_s": round(wall_s, 3),
            },
        )
        write_json(self.place.path / INDEX_NAME, index.to_json())  # last: with it, the cache is finished
        self.place.publish([shard.name for shard in written])
        say(f"{self.place.out}: tokens of {photos} photos, {size / 1e6:.0f} MB in {len(written)} files")
        return self.summary_path

    def _tracked(self, rows: Iterator[Row], total: int, process: Process, meter: Meter) -> Iterator[Row]:
        if process.rank > 0:
            return rows
        what = "features" if process.world_size == 1 else f"features, process 1 of {process.world_size}"
        return track(rows, total, what, note=meter.note)

    def _is_assembled(self, wanted: dict[str, Any]) -> bool:
        """Whether a run was cut off when all was done but the last renaming."""
        if not (self.place.path / INDEX_NAME).exists():
            return False
        found = asdict(read_features(self.place.path))
        names = [shard["name"] for shard in found.pop("shards")]
        return names == [shard["name"] for shard in wanted["shards"]] and found == {
            name: value for name, value in wanted.items() if name != "shards"
        }

    def _is_finished(self, key: FeatureKey) -> bool:
        """Whether the output is there.

        Raises:
            UserError: It holds something else, or is damaged.
        """
        out, folder = Path(self.place.out), open_folder(self.place.out)
        if not folder.exists(INDEX_NAME):
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UserError(f"{out} exists and holds no finished features; {REMEDY}")
            return False
        found = read_features(out)
        difference = found.key.difference(key)
        if difference is not None or found.key.num_views != key.num_views:
            difference = difference or f"number of views {found.key.num_views}, and not {key.num_views}"
            raise UserError(f"{out} holds features made with the {difference}; {REMEDY}")
        if found.source_sha256 != self.index.source_sha256:
            raise UserError(f"{out} holds features of other shards than {self.source}; {REMEDY}")
        if found.copies != self.copies:
            raise UserError(f"{out} holds features made with --copies {found.copies}, not {self.copies}; {REMEDY}")
        for shard in found.shards:
            if not folder.exists(shard.name) or folder.size(shard.name) != shard.bytes:
                raise UserError(f"{out} is damaged, {shard.name} is missing or not {shard.bytes} bytes long; {REMEDY}")
        return True


class Meter:
    """How fast the backbone is fed, beside how fast it could be."""

    def __init__(self, backbone: FrozenBackbone, side: int):
        """On a GPU, count a view's operations and measure the rate of matrix products."""
        self.flops, self.rate = 0, 0.0
        if backbone.device.type == "cuda":
            self.flops, self.rate = flops_per_view(backbone.config, side), matmul_rate(backbone.device)

    def begin(self, extractor: Extractor) -> None:
        """Start the clock."""
        self.extractor, self.start = extractor, time.monotonic()

    def note(self) -> str:
        """For the progress line: the share of the GPU's matrix rate that the backbone uses."""
        return f"{self._mfu():.0%} MFU" if self.rate else ""

    def result(self, rows: int) -> dict[str, Any]:
        """See `Job.compute`."""
        wall_s = time.monotonic() - self.start
        found = {"rows": rows, "views": self.extractor.views, "images_per_s": round(rows / max(wall_s, 1e-9), 2)}
        if self.rate:
            found |= {"matmul_tflops": round(self.rate / 1e12, 1), "mfu": round(self._mfu(), 4)}
        return found

    def _mfu(self) -> float:
        """Model FLOPs utilisation since the start, decoding and writing included."""
        return self.extractor.views * self.flops / (time.monotonic() - self.start) / self.rate


def read_choice(recipe: str, model: ModelChoice) -> Config:
    """The configuration of a recipe with the changes to its model."""
    changes = [f"--model.{name}={value}" for name, value in asdict(model).items() if value is not None]
    return parse_config(["--config", str(find_recipe(recipe)), *changes], "data_prep features")[0]


def shards_of(header: dict[str, Any]) -> list[PlannedShard]:
    """The files of a plan, in order."""
    return [PlannedShard(**shard) for shard in header["shards"]]


def row_bytes(key: FeatureKey, dim: int) -> int:
    """Most bytes of one row: that of a photo all of whose views add something, with all classes in its mask."""
    tokens = (2 + 2 * key.pool_grid**2) * dim * STORED_DTYPE.itemsize
    views = key.num_views * (tokens + 4 * torch.float32.itemsize + torch.bool.itemsize)
    return views + len(MASK_CLASSES) * (key.mask_side**2 * MASK_DTYPE.itemsize + 1) + 1


def spare_cores(device: torch.device) -> int:
    """Workers for each process of this machine: with a GPU all cores decode; without, the passes need most of them."""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, share - 1) if device.type == "cuda" else min(1, share - 1)


@contextmanager
def processes(device: str) -> Iterator[Process]:
    """Join the others that `accelerate launch` started, or be alone.

    Over gloo with GPUs too: nothing but words goes between the processes, and they may wait long.
    """
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        chosen = pick_device(device)
        if chosen.type == "cuda":
            if chosen.index is None:
                chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(chosen)
        yield Process(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()
