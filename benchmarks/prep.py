"""Speed of `data_prep shard`, per core, against `datasets` and a script with `tarfile`.

One core and one process for everything. The rate is photos per second of the core's time, user and system: the disk is
the same for all, and what writing out and neighbours add to the wall clock would only blur the comparison.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow

from benchmarks import prep_peers as peers
from benchmarks.form import Goal, Report, Row, Timing, compare, interleave, machine, one_core, publish, timed, versions
from data_prep.scenes.data_set import KIND, scenes
from data_prep.shards.command import shard
from pipeline.cli import command

PACKAGES = ("datasets", "pyarrow", "pillow", "simplejpeg")
UNIT = "images/s per core"
Arms = dict[str, Callable[[], Timing]]


@dataclass(frozen=True)
class PhotoSet:
    """Procedural scenes to measure on."""

    size: str
    images: int
    drawn: int
    """Scenes that are drawn, which takes long; the others are copies with a comment in the JPEG, so other bytes."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    sets: tuple[PhotoSet, ...]
    rounds: int


FULL = Plan((PhotoSet("1024x768", 3000, 750), PhotoSet("4032x3024", 240, 60)), rounds=5)
QUICK = Plan((PhotoSet("1024x768", 320, 80), PhotoSet("4032x3024", 24, 6)), rounds=3)


HUB_GOAL = Goal(2)
PEERS = (
    ("imagefolder", "datasets, imagefolder", HUB_GOAL,
     "load_dataset('imagefolder') with Image(decode=False), map for hash, size and types, then what push_to_hub does "
     "before it sends: map(embed_table_storage), to_parquet and SHA-256"),
    ("paths", "datasets, paths", HUB_GOAL,
     "from_generator with paths, hash, size and types, then the same steps of push_to_hub"),
    ("bytes", "datasets, bytes", None,
     "from_generator with the bytes, to_parquet and SHA-256: less than push_to_hub does"),
    ("tar", "tarfile script", None, "one tar, written as it is read: neither splits, clusters, weights nor an index"),
)  # fmt: skip
"""The arms that `data_prep shard` is compared with: name, name for a reader, goal, and how the arm was set up."""


def prep(quick: bool = False, out: Path | None = None, seed: int = 0) -> Path:
    """Measure how many photos a core shards in a second, beside other tools in the same run.

    The scenes, their shards and the files of the other tools need about 4 GB in the folder for temporary files.

    Args:
        quick: Fewer photos and rounds, in 90 seconds on two cores; the fixed costs of a data set then weigh more than
            they do.
        out: Folder for prep.json; benchmarks/results if not given, or runs/benchmarks with --quick.
        seed: Seed of the scenes and of the order of measuring.
    """
    rows = measure(QUICK if quick else FULL, seed)
    return publish(Report("prep", machine(), versions(PACKAGES), seed, rows), out, quick)


def measure(plan: Plan, seed: int) -> tuple[Row, ...]:
    """All rows of the benchmark."""
    datasets.disable_progress_bars()
    pyarrow.set_cpu_count(1)
    rows: list[Row] = []
    for photos in plan.sets:
        with tempfile.TemporaryDirectory(prefix="roadwork-prep-") as place:
            folder = draw(photos, Path(place) / "photos", seed)
            with one_core():
                rows += compare_arms(make_arms(folder, Path(place) / "out"), photos, plan.rounds, seed)
    return tuple(rows)


def draw(photos: PhotoSet, folder: Path, seed: int) -> Path:
    """Draw a folder of scenes, no two with the same bytes, without the masks, which the other tools do not carry."""
    scenes(folder, photos.drawn, photos.size, seed=seed)
    shutil.rmtree(folder / "masks")
    with (folder / "metadata.csv").open(newline="") as stream:
        rows = [{name: cell for name, cell in row.items() if name != "mask"} for row in csv.DictReader(stream)]
    rows += [copy(folder, rows[n % photos.drawn], n) for n in range(photos.drawn, photos.images)]
    with (folder / "metadata.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def copy(folder: Path, row: dict[str, str], number: int) -> dict[str, str]:
    """Write a photo once more, with its number as a comment; returns the copy's row."""
    data, comment = (folder / row["file_name"]).read_bytes(), str(number).encode()
    name = f"images/{number:06d}.jpg"
    segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
    (folder / name).write_bytes(data[:2] + segment + data[2:])
    return {**row, "file_name": name}


def compare_arms(arms: Arms, photos: PhotoSet, rounds: int, seed: int) -> list[Row]:
    """Run all arms in turns, and make a row of each comparison.

    Each arm runs once before, untimed, so that files are in the page cache and modules are loaded.
    """
    for arm in arms.values():
        arm()
    timings = interleave(arms, rounds, seed)
    rates = {name: [photos.images / timing.core_s for timing in taken] for name, taken in timings.items()}
    walls = {name: photos.images / np.median([timing.wall_s for timing in taken]) for name, taken in timings.items()}
    return [
        compare(
            f"sharding, {photos.size} {KIND}", against, rates["shard"], rates[name], UNIT, goal,
            f"{note}; {photos.images} photos made of {photos.drawn} scenes, {rounds} rounds; by the wall clock, "
            f"{walls['shard']:.0f} images/s against {walls[name]:.0f}",
        )
        for name, against, goal, note in PEERS
    ]  # fmt: skip


def make_arms(folder: Path, out: Path) -> Arms:
    """Ways to write a folder of photos; what they wrote is removed."""
    writers: dict[str, Callable[[], object]] = {
        "shard": lambda: shard(folder, out / "shards", check="header", workers=1),
        "imagefolder": lambda: peers.write_parquet(folder, out, "imagefolder"),
        "paths": lambda: peers.write_parquet(folder, out, "paths"),
        "bytes": lambda: peers.write_parquet(folder, out, "bytes"),
        "tar": lambda: peers.write_tar(folder, out),
    }

    def run(write: Callable[[], object]) -> Timing:
        out.mkdir()
        try:
            return timed(write)
        finally:
            shutil.rmtree(out)

    return {name: partial(run, write) for name, write in writers.items()}


if __name__ == "__main__":
    raise SystemExit(command(prep))
