"""How the command `features` makes a cache.

One process does it, or many under `accelerate launch`. The first process plans the files, every process writes some of
them, and the first one writes the index at the end. Finished files are kept if the work is interrupted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.features.extraction import Extractor, Row, decoding_workers, refuse_unsupported
from data_prep.features.options import ModelChoice, Options
from data_prep.features.writer import FeatureWriter, Plan, PlannedShard, plan_shards
from data_prep.work.receipts import Receipts
from data_prep.work.workplace import HEADER_NAME, Workplace
from pipeline.config import Config, find_recipe, parse_config
from pipeline.data.allocator import keep_freed_memory
from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_key import STORED_DTYPE, FeatureKey, feature_key
from pipeline.data.features import FORMAT, MASK_DTYPE, FeatureShard, read_features
from pipeline.data.index import INDEX_NAME, Index, read_index
from pipeline.data.storage import is_url
from pipeline.devices import out_of_memory
from pipeline.distributed.agreement import first_of_node_first, on_all_ranks, on_rank_zero
from pipeline.distributed.processes import processes
from pipeline.distributed.signals import StopSignal
from pipeline.errors import Stopped, require
from pipeline.files import write_json, write_summary
from pipeline.model.backbone import FrozenBackbone, compute_dtype
from pipeline.model.float8 import E4M3
from pipeline.names import MASK_CLASSES
from pipeline.parsing.typed_json import to_type
from pipeline.progress import say, silence_libraries, track
from pipeline.training.throughput import flops_per_view, matmul_rate

FP8 = str(E4M3).removeprefix("torch.")


def extract(
    shards: str | None, out: Path | None, recipe: str, model: ModelChoice, copies: int, options: Options
) -> Path:
    """Make a feature cache; see the command `features` for the arguments."""
    start = time.monotonic()
    silence_libraries()
    keep_freed_memory()  # this process decodes too where there are no workers
    config = read_choice(recipe, model)
    source = shards or config.data.shards
    target = config.data.features if out is None else str(out)
    require(bool(target) and not is_url(target), "--out", target, "a folder of this machine")
    index = read_index(source)
    with processes(options.device) as chosen, ExitStack() as held:
        refuse_unsupported(options, chosen)
        backbone = first_of_node_first(lambda first: FrozenBackbone(config.model.backbone, chosen, not first))
        job = Job(config, index, source, Workplace(target, None), copies, options)
        work = on_rank_zero(lambda: job.begin(backbone, held))
        if work is None:
            return Path(job.workplace.summary_path)
        plan, missing = work
        speed = on_all_ranks(lambda: job.compute(backbone, missing))
        return on_rank_zero(lambda: job.finish(plan, speed, time.monotonic() - start))


@dataclass
class Job:
    """One cache to be made. `begin` and `finish` are rank 0's, `compute` is every rank's."""

    config: Config
    index: Index
    source: str
    workplace: Workplace
    copies: int
    options: Options

    def begin(self, backbone: FrozenBackbone, held: ExitStack) -> tuple[Plan, list[PlannedShard]] | None:
        """Lock the workplace and plan, or resume with the plan that is there.

        Args:
            backbone: The loaded backbone.
            held: Takes over the lock, and releases it at its end.

        Returns:
            The plan, and the files that are not written yet; None where the cache is finished already.

        Raises:
            UserError: The output holds other features, or the disk cannot hold these.
        """
        workplace = self.workplace
        held.enter_context(workplace.locked())
        key = feature_key(backbone, self.config.input_spec, self.config.model.pool_grid)
        size = row_bytes(key, backbone.hidden_size)
        plan = Plan(
            format=FORMAT,
            key=key,
            dim=backbone.hidden_size,
            source_sha256=self.index.source_sha256,
            copies=self.copies,
            precision=self.precision(backbone.device),
            version=version("roadwork"),
            shards=tuple(plan_shards(self.index, self.copies, size, self.options.shard_mb)),
            tars=tuple(sorted({tar.sha256 for split in self.index.splits.values() for tar in split.shards})),
        )
        if self._is_finished(key, plan.precision):
            say(f"{workplace.out} is finished already: the same photos, the same backbone, the same views")
            workplace.remove()
            return None
        made = workplace.assembled(read_features)
        same_files = made is not None and [file.name for file in made.shards] == [file.name for file in plan.shards]
        if made is not None and same_files and made == plan.index(made.shards):
            workplace.publish(made.shards)
            return None
        if workplace.planned(Plan.from_json) != plan:
            workplace.clear()
            write_json(workplace.path / HEADER_NAME, plan.to_json())
        receipts = Receipts(workplace.path)
        missing = [shard for shard in plan.shards if not receipts.is_whole(shard.name)]
        workplace.check_space(sum(size * shard.rows + record_bytes(self.index, shard) for shard in missing))
        if len(missing) < len(plan.shards):
            say(f"resuming: {len(plan.shards) - len(missing)} of {len(plan.shards)} files are written already")
        return plan, missing

    def compute(self, backbone: FrozenBackbone, missing: list[PlannedShard]) -> dict[str, Any]:
        """Compute and write this process's share of the missing files.

        Returns:
            What was reached: `rows`, `views`, `images_per_s`, on a GPU `matmul_tflops` and `mfu`, and what
            `Extractor.start` has.
        """
        share = missing[dist.get_rank() :: dist.get_world_size()]
        items = [item for shard in share for item in shard.items]
        rows = sum(shard.rows for shard in share)
        spec = self.config.input_spec
        data = {name: ShardDataset(self.source, self.index, name, spec) for name in {item.split for item in items}}
        workers = decoding_workers(backbone.device) if self.options.workers is None else self.options.workers
        extractor = Extractor(backbone, self.config.model.pool_grid, self.options, workers)
        stop = StopSignal() if "RANK" in os.environ else None
        meter = Meter(extractor, self.config.model.view_side)
        with out_of_memory("--batch_views"), FeatureWriter(self.workplace.path, self.index, share) as writer:
            for row in _tracked(extractor.run(data, items), rows, meter):
                writer.add(row)
                if stop is not None and stop.received:
                    raise Stopped("the files that are finished are kept; the same command resumes from there")
        return meter.result(rows)

    def finish(self, plan: Plan, speed: dict[str, Any], wall_s: float) -> Path:
        """Describe the written files in an index, and publish all."""
        receipts = Receipts(self.workplace.path)
        written = tuple(to_type(receipts.read(shard.name), FeatureShard) for shard in plan.shards)
        photos = sum(len(shard.photos) for shard in written)
        size = sum(shard.bytes for shard in written)
        summary = {
            "photos": photos,
            "copies": self.copies,
            "files": len(written),
            "bytes": size,
            "bytes_per_photo": round(size / max(photos, 1)),
            "key": asdict(plan.key),
            "processes": dist.get_world_size(),
            "rank_zero": speed,
            "wall_s": round(wall_s, 3),
        }
        write_summary(self.workplace.path, summary)
        # Last: with it, the cache is finished.
        write_json(self.workplace.path / INDEX_NAME, plan.index(written).to_json())
        path = self.workplace.publish(written)
        say(f"{self.workplace.out}: tokens of {photos} photos, {size / 1e6:.0f} MB in {len(written)} files")
        return Path(path)

    def precision(self, device: torch.device) -> str:
        """The type in which the backbone multiplies on a device, such as bfloat16."""
        return FP8 if self.options.precision == "fp8" else str(compute_dtype(device)).removeprefix("torch.")

    def _is_finished(self, key: FeatureKey, precision: str) -> bool:
        """Whether the output is there already.

        Raises:
            UserError: The output folder holds something else, or a damaged cache.
        """
        found = self.workplace.finished(read_features, "features")
        if found is None:
            return False
        difference = found.key.difference(key)
        if difference is None and found.key.num_views != key.num_views:
            difference = f"number of views {found.key.num_views}, and not {key.num_views}"
        if difference is not None:
            raise self.workplace.refused(f"holds features made with the {difference}")
        if found.source_sha256 != self.index.source_sha256:
            raise self.workplace.refused(f"holds features of other shards than {self.source}")
        if found.copies != self.copies:
            raise self.workplace.refused(f"holds features made with --copies {found.copies}, not {self.copies}")
        # float32 and bfloat16 differ by no more than the rounding of what is stored; FP8 differs from both.
        if found.precision != precision and FP8 in (found.precision, precision):
            raise self.workplace.refused(f"holds features made in {found.precision}, not {precision}")
        self.workplace.check_whole(found.shards)
        return True


class Meter:
    """How fast the backbone computes, beside how fast it could."""

    def __init__(self, extractor: Extractor, side: int):
        """On a GPU, count a view's operations and measure the rate of matrix products; then start the clock."""
        self.extractor, self.flops, self.rate = extractor, 0, 0.0
        backbone = extractor.backbone
        if backbone.device.type == "cuda":
            self.flops, self.rate = flops_per_view(backbone.config, side), matmul_rate(backbone.device)
        self.start = time.monotonic()

    def note(self) -> str:
        """For the progress line: the share of the GPU's matrix rate that the backbone uses."""
        return f"{self._mfu():.0%} MFU" if self.rate else ""

    def result(self, rows: int) -> dict[str, Any]:
        """The speed that was reached; see `Job.compute` for the values."""
        wall_s = time.monotonic() - self.start
        found = {"rows": rows, "views": self.extractor.views, "images_per_s": round(rows / max(wall_s, 1e-9), 2)}
        if self.rate:
            found |= {"matmul_tflops": round(self.rate / 1e12, 1), "mfu": round(self._mfu(), 4)}
        return found | (self.extractor.start or {})

    def _mfu(self) -> float:
        """Model FLOPs utilisation since the start, decoding and writing included."""
        return self.extractor.views * self.flops / (time.monotonic() - self.start) / self.rate


def _tracked(rows: Iterator[Row], total: int, meter: Meter) -> Iterator[Row]:
    """Let the first process show how far its share of the rows is."""
    if dist.get_rank() > 0:
        return rows
    what = "features" if dist.get_world_size() == 1 else f"features, process 1 of {dist.get_world_size()}"
    return track(rows, total, what, note=meter.note)


def read_choice(recipe: str, model: ModelChoice) -> Config:
    """The configuration of a recipe with the changes to its model."""
    changes = [f"--model.{name}={value}" for name, value in asdict(model).items() if value is not None]
    return parse_config(["--config", str(find_recipe(recipe)), *changes], "data_prep features")[0]


def row_bytes(key: FeatureKey, dim: int) -> int:
    """The most bytes of a row without its record: all views add something, and the mask has all classes."""
    tokens = (2 + 2 * key.pool_grid**2) * dim * STORED_DTYPE.itemsize
    views = key.num_views * (tokens + 4 * torch.float32.itemsize + torch.bool.itemsize)
    return views + len(MASK_CLASSES) * (key.mask_side**2 * MASK_DTYPE.itemsize + 1) + 1


def record_bytes(index: Index, shard: PlannedShard) -> int:
    """Bytes of the records in a file."""
    samples = index.splits[shard.split].samples[shard.first : shard.first + shard.photos]
    return shard.copies * sum(sample.members["json"][1] for sample in samples)
