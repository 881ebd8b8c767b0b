"""Data sets of procedural street scenes, as a folder of photos or in the layout of the NATIX set on the hub."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from data_prep.scenes import CITIES, STUDY, USUAL_CITIES, SceneConfig, render
from data_prep.work.parallel import Workers
from pipeline.errors import UserError, require
from pipeline.files import write_summary
from pipeline.progress import track

KIND = "procedural scenes"  # follows the photos into the shards and every report on them
JPEG_QUALITY = 90
MAX_IMAGES = 1_000_000
# The hub's own split: photos at random, so that frames of one video lie on both sides, for an audit to find.
TEST_SHARE = 2298 / 8549
TEST_STREAM, NOISE_STREAM = 99, 98
CLEAN_LABEL = "clean_label"
PRESETS: dict[str, dict[str, Any]] = {"plain": {}, "study": STUDY}
ROWS_PER_FILE = 1000
ROWS_PER_GROUP = 100


@dataclass(frozen=True)
class EncodedScene:
    """A scene as it is written."""

    stem: str
    jpeg: bytes
    mask_png: bytes
    label: int
    """The label as written, which label noise may have flipped."""
    metadata: dict[str, Any]


def scenes(
    out: Path,
    images: int = 2400,
    size: str = "1024x768",
    difficulty: float = 0.5,
    seed: int = 0,
    format: Literal["folder", "natix-parquet"] = "folder",
    cities: int = USUAL_CITIES,
    preset: Literal["plain", "study"] = "plain",
    city_shift: float | None = None,
    label_noise: float = 0.0,
    leak: float = 1.0,
    workers: int = 0,
) -> Path:
    """Draw procedural street scenes with labels, masks and metadata.

    The bytes depend on all arguments but `workers`. A finished run of the same arguments is kept as it is.

    Args:
        out: Folder to write; it must not hold anything else.
        images: Number of photos.
        size: WIDTHxHEIGHT of a photo in pixels, 320x240 to 4032x4032.
        difficulty: 0 to 1: smaller objects, more look-alikes, heavier weather.
        seed: Scenes of different seeds have nothing in common but their cities.
        format: "folder" is images/, masks/ and metadata.csv; "natix-parquet" is data/*.parquet with exactly the
            columns and types of natix-network-org/roadwork, split into train and test.
        cities: How many of the 24 cities appear.
        preset: "study" has the objects of `python -m benchmarks.study`, whose number and size `difficulty` does not
            change, only the weather, and cities with cameras of their own.
        city_shift: 0 to 2: how far the cities' cameras differ in colour and contrast; the preset's, 0 or 0.5, if not
            given.
        label_noise: Share of the photos whose label is flipped. Masks stay true; in the layout "folder" the column
            clean_label keeps the true label.
        leak: Share of the roadwork videos whose description and travel alteration tell the label; 1 as in the real set.
        workers: Processes that draw; 0 takes every core.

    Returns:
        The path of summary.json.
    """
    require(1 <= images <= MAX_IMAGES, "images", images, f"in [1, {MAX_IMAGES}]")
    require(1 <= cities <= len(CITIES), "cities", cities, f"in [1, {len(CITIES)}]")
    require(workers >= 0, "workers", workers, "0 or more")
    require(0 <= label_noise <= 0.5, "label_noise", label_noise, "in [0, 0.5]")
    config = SceneConfig(parse_size(size), difficulty, seed, CITIES[:cities], leak=leak, **PRESETS[preset])
    if city_shift is not None:
        config = replace(config, city_shift=city_shift)
    arguments = {
        "images": images, "size": size, "difficulty": difficulty, "seed": seed, "format": format, "cities": cities,
        "preset": preset, "city_shift": config.city_shift, "label_noise": label_noise, "leak": leak,
    }  # fmt: skip
    out = out.resolve()
    if _is_finished(out, arguments):
        return out / "summary.json"
    start = time.monotonic()
    partial_out = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_out, ignore_errors=True)  # what an interrupted run left
    partial_out.mkdir(parents=True)
    write = write_folder if format == "folder" else partial(write_parquet, seed=seed, images=images)
    with Workers(workers, preload=(__name__,)) as pool:
        drawn = (scene for _, scene in pool.map(partial(encode_scene, config, label_noise=label_noise), range(images)))
        positives = sum(write(partial_out, track(drawn, images, "drawing scenes")))
    wall_s = time.monotonic() - start
    summary = {
        "kind": KIND,
        "arguments": arguments,
        "images": images,
        "roadwork": positives,
        "cities": list(config.cities),
        "wall_s": round(wall_s, 2),
        "images_per_s": round(images / wall_s, 2),
    }
    write_summary(partial_out, summary)
    partial_out.replace(out)
    return out / "summary.json"


def parse_size(size: str) -> tuple[int, int]:
    """Width and height in pixels: `1024x768` becomes (1024, 768)."""
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise UserError(f"size is {size!r}, but must be WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(width), int(height)


def _is_finished(out: Path, arguments: dict[str, Any]) -> bool:
    """Whether `out` holds a finished run of these arguments; anything else in it is refused."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    # A summary of another program, or a damaged one, must not be overwritten.
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((out / "summary.json").read_text())["arguments"] == arguments:
            return True
    if any(out.iterdir()):
        raise UserError(
            f"{out} is not empty and holds no finished run of the same arguments; choose another --out or remove it"
        )
    return False


def encode_scene(config: SceneConfig, index: int, label_noise: float = 0.0) -> EncodedScene:
    """Draw and encode one scene, in whatever process."""
    scene = render(config, index)
    metadata = scene.metadata | ({CLEAN_LABEL: scene.label} if label_noise else {})
    wrong = np.random.default_rng([config.seed, NOISE_STREAM, index]).random() < label_noise
    jpeg, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(scene.image).save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    Image.fromarray(scene.mask).save(png, "PNG")
    return EncodedScene(f"{index:06d}", jpeg.getvalue(), png.getvalue(), int(scene.label ^ wrong), metadata)


def write_folder(out: Path, drawn: Iterable[EncodedScene]) -> Iterator[int]:
    """Write images/, masks/ and metadata.csv; yields the label of each scene."""
    (out / "images").mkdir()
    (out / "masks").mkdir()
    with (out / "metadata.csv").open("w", newline="") as stream:
        writer = None
        for scene in drawn:
            name, mask = f"images/{scene.stem}.jpg", f"masks/{scene.stem}.png"
            row = {"file_name": name, **scene.metadata, "label": scene.label, "mask": mask}
            if writer is None:
                writer = csv.DictWriter(stream, list(row))
                writer.writeheader()
            (out / name).write_bytes(scene.jpeg)
            (out / mask).write_bytes(scene.mask_png)
            writer.writerow(row)
            yield scene.label


def natix_schema() -> pyarrow.Schema:
    """Columns and types of natix-network-org/roadwork, with the note that lets `datasets` decode the photos."""
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    text, integer, real = Value("string"), Value("int64"), Value("float64")
    features = {
        "image": ImageFeature(),
        **dict.fromkeys(("id", "width", "height", "license"), integer),
        **dict.fromkeys(("flickr_url", "coco_url"), real),  # all null in that set, hence the odd type
        "date_captured": integer,
        **dict.fromkeys(("gps", "city_name", "scene_description", "video_info.frame_id"), text),
        "video_info.seq_id": integer,
        "video_info.vid_id": text,
        **{f"scene_level_tags.{tag}": text for tag in ("daytime", "scene_environment", "travel_alteration", "weather")},
        "label": integer,
    }
    return Features(features).arrow_schema


def write_parquet(out: Path, drawn: Iterable[EncodedScene], seed: int, images: int) -> Iterator[int]:
    """Write data/train-*.parquet and data/test-*.parquet; yields the label of each scene."""
    schema = natix_schema()
    (out / "data").mkdir()
    is_test = np.random.default_rng([seed, TEST_STREAM]).random(images) < TEST_SHARE
    sizes = {"train": int((~is_test).sum()), "test": int(is_test.sum())}
    tables = {name: ParquetSplit(out / "data", name, rows, schema) for name, rows in sizes.items()}
    for scene, test in zip(drawn, is_test, strict=True):
        image = {"bytes": scene.jpeg, "path": f"{scene.stem}.jpg"}
        row = {"image": image, **scene.metadata, "label": scene.label}
        row.pop(CLEAN_LABEL, None)  # no column of the set
        tables["test" if test else "train"].add(row)
        yield scene.label


class ParquetSplit:
    """One split as numbered parquet files; never more rows in memory than one row group."""

    def __init__(self, folder: Path, split: str, rows: int, schema: pyarrow.Schema):
        files = -(-rows // ROWS_PER_FILE)
        names = (f"{split}-{i:05d}-of-{files:05d}.parquet" for i in range(files))
        self._paths: Iterator[Path] = (folder / name for name in names)
        self._schema, self._rows, self._done = schema, rows, 0
        self._group: list[dict[str, Any]] = []
        self._writer: pyarrow.parquet.ParquetWriter | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; the last one closes the last file."""
        self._group.append(row)
        self._done += 1
        file_ends = self._done == self._rows or self._done % ROWS_PER_FILE == 0
        if len(self._group) == ROWS_PER_GROUP or file_ends:
            if self._writer is None:
                self._writer = pyarrow.parquet.ParquetWriter(next(self._paths), self._schema)
            self._writer.write_table(pyarrow.Table.from_pylist(self._group, self._schema))
            self._group = []
        if file_ends and self._writer is not None:
            self._writer.close()
            self._writer = None
