"""Speed of `data_prep shard` and of reading its shards, per core, against `datasets`, `tarfile` and `webdataset`.

One core and one process for everything. The rate is photos per second of the core's time, user and system: the disk is
the same for all, and what writing out and neighbours add to the wall clock would only blur the comparison.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow

from benchmarks import prep_peers as peers
from benchmarks.form import Goal, Report, Row, Timing, compare, interleave, machine, one_core, publish, timed, versions
from data_prep.scenes.data_set import KIND, scenes
from data_prep.shards.command import shard
from pipeline.cli import command
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import read_index

PACKAGES = ("datasets", "pyarrow", "pillow", "simplejpeg", "webdataset")
GOAL = Goal(1.5)
UNIT = "images/s per core"


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


@dataclass(frozen=True)
class Comparison:
    """Two arms and what is said about them."""

    what: str
    against: str
    ours: str
    theirs: str
    note: str
    goal: Goal | None = None


NOTES = {
    "imagefolder": "load_dataset('imagefolder') with Image(decode=False), map for hash, size and types, then what "
    "push_to_hub does before it sends: map(embed_table_storage), to_parquet and SHA-256",
    "paths": "from_generator with paths, hash, size and types, then the same steps of push_to_hub",
    "bytes": "from_generator with the bytes, to_parquet and SHA-256: less than push_to_hub does",
    "tar": "one tar, written as it is read: neither splits, clusters, weights nor an index",
    "decode": "ours decodes JPEG to a reduced size and finds near-duplicates by perceptual hash; theirs to full size",
    "draft": "both decode JPEG to a reduced size; ours finds near-duplicates by perceptual hash",
    "arrow": "rows of the Arrow file that load_dataset makes of the Parquet file, untimed; both check SHA-256",
    "unchecked": "the same without the check of SHA-256 in theirs; ours always has it",
    "scan": "both check SHA-256",
}
SHARDING = (
    Comparison("sharding", "datasets, imagefolder", "shard", "imagefolder", NOTES["imagefolder"], GOAL),
    Comparison("sharding", "datasets, paths", "shard", "paths", NOTES["paths"], GOAL),
    Comparison("sharding", "datasets, bytes", "shard", "bytes", NOTES["bytes"], GOAL),
    Comparison("sharding", "tarfile script", "shard", "tar", NOTES["tar"]),
    Comparison("sharding, full check", "tarfile script, Pillow", "full check", "tar decoding", NOTES["decode"]),
    Comparison("sharding, full check", "the same, reduced", "full check", "tar decoding small", NOTES["draft"]),
)
READING = (
    Comparison("reading, random order", "datasets, checked", "random", "rows random", NOTES["arrow"]),
    Comparison("reading, random order", "datasets", "random", "rows random unchecked", NOTES["unchecked"]),
    Comparison("reading, in order", "datasets, checked", "in order", "rows in order", NOTES["arrow"]),
    Comparison("reading, in order", "tarfile, checked", "in order", "tar", NOTES["scan"]),
    Comparison("reading, in order", "webdataset, checked", "in order", "webdataset", NOTES["scan"]),
)

Arms = dict[str, Callable[[], Timing]]


def prep(quick: bool = False, out: Path | None = None, seed: int = 0) -> Path:
    """Measure how many photos a core shards and reads back in a second, beside other tools in the same run.

    The scenes, their shards and the files of the other tools need about 4 GB in the folder for temporary files.

    Args:
        quick: Fewer photos and rounds, in 90 seconds on two cores; the fixed costs of a data set then weigh more than
            they do.
        out: Folder for prep.json; benchmarks/results if not given, or runs/benchmarks with --quick.
        seed: Of the scenes and of the order of measuring.
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
                rows += compare_arms(SHARDING, sharding_arms(folder, Path(place) / "out"), photos, plan.rounds, seed)
                rows += compare_arms(READING, reading_arms(folder, Path(place), seed), photos, plan.rounds, seed)
    return tuple(rows)


def draw(photos: PhotoSet, folder: Path, seed: int) -> Path:
    """A folder of scenes, each one other bytes, without the masks, which the other tools do not carry."""
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


def compare_arms(
    comparisons: tuple[Comparison, ...], arms: Arms, photos: PhotoSet, rounds: int, seed: int
) -> list[Row]:
    """Run all arms in turns, and make a row of each comparison.

    Each runs once before, untimed, so that files are in the page cache and modules are loaded.
    """
    for arm in arms.values():
        arm()
    timings = interleave(arms, rounds, seed)
    rates = {name: [photos.images / timing.core_s for timing in taken] for name, taken in timings.items()}
    walls = {name: photos.images / np.median([timing.wall_s for timing in taken]) for name, taken in timings.items()}
    return [
        compare(
            f"{case.what}, {photos.size} {KIND}",
            case.against,
            rates[case.ours],
            rates[case.theirs],
            UNIT,
            case.goal,
            f"{case.note}; {photos.images} photos made of {photos.drawn} scenes, {rounds} rounds; by the "
            f"wall clock, {walls[case.ours]:.0f} images/s against {walls[case.theirs]:.0f}",
        )
        for case in comparisons
    ]


def sharding_arms(folder: Path, out: Path) -> Arms:
    """Ways to write a folder of photos; what they wrote is removed."""

    def ours(check: Literal["header", "decode"]) -> Callable[[], Any]:
        return lambda: shard(folder, out / "shards", check=check, workers=1)

    def tar(check: peers.Check) -> Callable[[], Any]:
        return lambda: peers.write_tar(folder, out, check)

    writers: dict[str, Callable[[], Any]] = {
        "shard": ours("header"),
        "imagefolder": lambda: peers.write_parquet(folder, out, "imagefolder"),
        "paths": lambda: peers.write_parquet(folder, out, "paths"),
        "bytes": lambda: peers.write_parquet(folder, out, "bytes"),
        "tar": tar(peers.check_header),
        "full check": ours("decode"),
        "tar decoding": tar(peers.decode_fully),
        "tar decoding small": tar(peers.decode_small),
    }

    def run(write: Callable[[], Any]) -> Timing:
        with fresh(out):
            return timed(write)

    return {name: partial(run, write) for name, write in writers.items()}


def reading_arms(folder: Path, place: Path, seed: int) -> Arms:
    """Ways to read back what was written, once and untimed, from one folder of photos.

    Opening is not timed. Every arm must find the same photos.
    """
    out = place / "kept"
    out.mkdir()
    shard(folder, out / "shards", check="header", workers=1)
    peers.write_parquet(folder, out, "bytes")
    peers.write_tar(folder, out, peers.check_header)
    ours, rows = open_shards(out / "shards"), peers.open_parquet(out / "photos.parquet", out / "rows")
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    tars = sorted((out / "shards").glob("*.tar"))
    readers: dict[str, Callable[[], int]] = {
        "random": lambda: read_shards([ours[i] for i in order]),
        "in order": lambda: read_shards(ours),
        "rows random": lambda: peers.read_rows((rows[i] for i in order), verify=True),
        "rows random unchecked": lambda: peers.read_rows((rows[i] for i in order), verify=False),
        "rows in order": lambda: peers.read_rows(rows, verify=True),
        "tar": lambda: peers.read_tar(out / "photos.tar", verify=True),
        "webdataset": lambda: peers.read_webdataset(tars, verify=True),
    }
    expected = sum(path.stat().st_size for path in (folder / "images").iterdir())

    def run(read: Callable[[], int]) -> Timing:
        found: list[int] = []
        timing = timed(lambda: found.append(read()))
        assert found == [expected]
        return timing

    return {name: partial(run, read) for name, read in readers.items()}


def open_shards(folder: Path) -> list[tuple[ShardDataset, int]]:
    """Every sample of every split, in the order of the tars."""
    index = read_index(folder)
    splits = [ShardDataset(folder, index, name, 1, 1, 1) for name, split in index.splits.items() if split.samples]
    return [(split, row) for split in splits for row in range(len(split))]


def read_shards(samples: list[tuple[ShardDataset, int]]) -> int:
    """Read photo and record of each sample; returns the bytes of the photos."""
    total = 0
    for split, row in samples:
        record, photo = split.sample(row)
        assert record.key == split.split.samples[row].key
        total += len(photo)
    return total


@contextmanager
def fresh(folder: Path) -> Iterator[None]:
    """An empty folder, removed afterwards."""
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    raise SystemExit(command(prep))
