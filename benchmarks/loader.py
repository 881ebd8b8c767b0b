"""Speed of reading shards as batches of twelve views with two workers, beside `webdataset` and `datasets`.

Both packages read the same tars, once as their users write it, with Pillow, and once with `prepare` in its place. The
rate is photos per second of the time that all processes together had a core, user and system, so that neighbours blur
it less than they blur the wall clock.
"""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch

from benchmarks import view_peers as peers
from benchmarks.form import Goal, Report, Row, Timing, compare, interleave, machine, publish, versions
from benchmarks.views import FIDELITY_DB, SIDE, Plan
from data_prep.scenes.data_set import KIND, scenes
from data_prep.shards.command import shard
from data_prep.work.threads import one_thread
from pipeline.cli import command
from pipeline.data.batch import batches_of
from pipeline.data.dataset import ShardDataset, prepare
from pipeline.data.index import Index, read_index
from pipeline.model.config import InputSpec

PACKAGES = ("torch", "webdataset", "datasets", "pillow", "simplejpeg")
WORKERS = 2
BATCH_SIZE = 4
PILLOW_GOAL, SAME_GOAL = Goal(5), Goal(1)


FULL = Plan("4032x3024", photos=64, rounds=5)
QUICK = Plan("4032x3024", photos=12, rounds=2)


@dataclass(frozen=True)
class Shards:
    """What is read."""

    folder: Path
    index: Index

    @property
    def tars(self) -> list[Path]:
        """The tars of the training split."""
        return [self.folder / tar.name for tar in self.index.splits["train"].shards]

    def __len__(self) -> int:
        return len(self.index.splits["train"].samples)


def loader(quick: bool = False, out: Path | None = None, seed: int = 0) -> Path:
    """Measure how many photos a core turns into batches of twelve views in a second, beside other readers.

    Args:
        quick: Fewer photos and rounds, in 90 seconds on two cores; starting the workers then weighs more.
        out: Folder for loader.json; benchmarks/results if not given, or runs/benchmarks with --quick.
        seed: Seed of the scenes and of the order of measuring.
    """
    plan = QUICK if quick else FULL
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="roadwork-loader-") as place, one_thread():  # as it is in the workers
        rows = measure(make_shards(plan, Path(place), seed), plan, seed)
    return publish(Report("loader", machine(1 + WORKERS), versions(PACKAGES), seed, rows), out, quick)


def make_shards(plan: Plan, place: Path, seed: int, processes: int = 0) -> Shards:
    """Procedural scenes without masks, which the other readers would not decode, in twice as many tars as workers."""
    scenes(place / "scenes", plan.photos, plan.size, seed=seed, workers=processes)
    folder = place / "scenes"
    (folder / "metadata.csv").unlink()
    mb = sum(path.stat().st_size for path in (folder / "images").iterdir()) / 1e6
    shard(
        folder / "images", place / "shards",
        splits="random", val_share=0, test_share=0, check="header",
        shard_mb=mb / (2 * WORKERS - 0.5), workers=processes,
    )  # fmt: skip
    return Shards(place / "shards", read_index(place / "shards"))


def measure(shards: Shards, plan: Plan, seed: int) -> tuple[Row, ...]:
    """All rows of the benchmark."""
    cut = partial(views_of, side=SIDE)
    sizes = SIDE, BATCH_SIZE, WORKERS
    openers: dict[str, Callable[[], Iterable[peers.Batch]]] = {
        "ours": lambda: ours(shards),
        "webdataset": lambda: peers.webdataset_pillow(shards.tars, *sizes),
        "datasets": lambda: peers.datasets_pillow(shards.tars, *sizes),
        "webdataset, ours": lambda: peers.webdataset_with(shards.tars, cut, *sizes[1:]),
        "datasets, ours": lambda: peers.datasets_with(shards.tars, cut, *sizes[1:]),
    }
    expected = by_key(openers["ours"]())
    worst_db = {name: fidelity(expected, by_key(openers[name]())) for name in openers if name != "ours"}
    taken = interleave({name: partial(run, opener, len(shards)) for name, opener in openers.items()}, plan.rounds, seed)
    rates = {name: [len(shards) / timing.core_s for timing in timings] for name, timings in taken.items()}
    walls = {name: len(shards) / np.median([timing.wall_s for timing in timings]) for name, timings in taken.items()}
    return tuple(
        compare(
            f"shards to batches of 12 views, {WORKERS} workers, {plan.size} {KIND}",
            against, rates["ours"], rates[name], "photos/s per core", goal,
            f"{note}; {len(shards)} photos in {len(shards.tars)} tars, batches of {BATCH_SIZE}, {plan.rounds} rounds; "
            f"ours also checks SHA-256 and gives metadata and boxes; by the wall clock, {walls['ours']:.1f} photos/s "
            f"against {walls[name]:.1f}; worst view of ours against theirs: {worst_db[name]:.1f} dB",
        )
        for name, against, goal, note in (
            ("webdataset", "webdataset, Pillow", PILLOW_GOAL, "decode('pilrgb'), map, batched"),
            ("datasets", "datasets, Pillow", PILLOW_GOAL, "load_dataset(streaming=True), map, DataLoader"),
            ("webdataset, ours", "webdataset, our views", SAME_GOAL, "map(prepare), batched"),
            ("datasets, ours", "datasets, our views", SAME_GOAL, "Image(decode=False), map(prepare), DataLoader"),
        )
    )  # fmt: skip


def views_of(data: bytes, side: int) -> torch.Tensor:
    """The project's views of a photo, for the other readers to call."""
    return prepare(data, InputSpec(side))["views"]


def ours(shards: Shards) -> Iterator[peers.Batch]:
    """The training split in its order, read as validation reads it."""
    data = ShardDataset(shards.folder, shards.index, "train", InputSpec(SIDE))
    for batch in batches_of(data, BATCH_SIZE, WORKERS):
        yield [data.split.samples[row].key for row in batch["row"].tolist()], batch["views"]


def run(opener: Callable[[], Iterable[peers.Batch]], photos: int) -> Timing:
    """Read everything once, from the start of the workers to their end."""
    core, wall = core_seconds(), time.perf_counter()
    keys = [key for batch in opener() for key in batch[0]]
    timing = Timing(core_seconds() - core, time.perf_counter() - wall)
    assert len(set(keys)) == len(keys) == photos
    return timing


def core_seconds() -> float:
    """Time that this process and its children that have ended had a core."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def by_key(batches: Iterable[peers.Batch]) -> dict[str, torch.Tensor]:
    """The views of each photo, by its key."""
    return {key: views for batch in batches for key, views in zip(*batch, strict=True)}


def fidelity(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """PSNR in dB of the view that differs most, infinite where none does.

    Both must hold the same photos, and every view must be close, or the rates would be those of different work.
    """
    assert ours.keys() == theirs.keys()
    errors = [
        (views.double() - theirs[key].double()).square().mean(dim=(1, 2, 3)).max().item() for key, views in ours.items()
    ]
    psnr = 10 * math.log10(255**2 / max(errors)) if any(errors) else math.inf
    assert psnr >= FIDELITY_DB
    return psnr


if __name__ == "__main__":
    raise SystemExit(command(loader))
