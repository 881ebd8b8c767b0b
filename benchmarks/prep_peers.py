"""Sharding with other tools, as their users write it, at their sensible fastest.

Every way of writing reads each photo, hashes it, looks at its header, types its metadata, writes the original bytes,
and hashes the file that it made, as `data_prep shard` does.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.table import embed_table_storage
from PIL import Image

FEATURES = Features(
    {
        "image": datasets.Image(decode=False),
        **dict.fromkeys(("key", "sha256", "daytime", "scene", "city", "description", "video"), Value("string")),
        **dict.fromkeys(("width", "height", "label"), Value("int64")),
        "gps": List(Value("float64")),
        "weather": List(Value("string")),
    }
)
ROW_GROUP_BYTES = 100_000_000  # datasets.config.MAX_ROW_GROUP_SIZE

Route = Literal["imagefolder", "paths", "bytes"]


def check_header(data: bytes) -> tuple[int, int]:
    """Format and size from the header."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        assert image.format == "JPEG"
        return image.size


def read_photos(folder: str, keep: bool = True) -> Iterator[dict[str, Any]]:
    """The photos of a folder with `metadata.csv`, as a script of twenty lines reads them.

    Args:
        folder: Folder of procedural scenes.
        keep: Yield the bytes; otherwise the path, from which `datasets` reads them again.
    """
    with Path(folder, "metadata.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            path = Path(folder, row["file_name"])
            data = path.read_bytes()
            yield {
                "image": {"bytes": data, "path": path.name} if keep else {"bytes": None, "path": str(path)},
                **_facts(path, data, row),
                "label": int(row["label"]),
                "daytime": row["scene_level_tags.daytime"] or None,
                "scene": row["scene_level_tags.scene_environment"] or None,
                "city": row["city_name"] or None,
                "description": row["scene_description"] or None,
                "video": row["video_info.vid_id"] or None,
            }


def write_parquet(folder: Path, out: Path, route: Route) -> str:
    """Make `out/photos.parquet` with `datasets`. Returns the file's SHA-256, which the hub asks for.

    Args:
        folder: Folder of the photos.
        out: Empty folder for the file.
        route: "bytes" gives the photos' bytes to `from_generator`, and `to_parquet` is all. "paths" gives their paths,
            and takes the steps of `push_to_hub` up to the sending: a map over row groups embeds the bytes, then
            `to_parquet`. "imagefolder" lets `load_dataset` read folder and table and a map look at each photo, and then
            does the same as "paths".
    """
    cache = str(out / "cache")
    if route == "imagefolder":
        photos = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
        photos = photos.cast_column("image", datasets.Image(decode=False)).map(_look)
    else:
        arguments = {"folder": str(folder), "keep": route == "bytes"}
        photos = Dataset.from_generator(read_photos, FEATURES, cache_dir=cache, gen_kwargs=arguments)
    if route != "bytes":
        total = sum(path.stat().st_size for path in (folder / "images").iterdir())
        rows = max(1, ROW_GROUP_BYTES * len(photos) // total)
        arrow = photos.with_format("arrow")
        photos = arrow.map(embed_table_storage, batched=True, batch_size=rows, keep_in_memory=True)
    photos.to_parquet(out / "photos.parquet")
    return _hash(out / "photos.parquet")


def write_tar(folder: Path, out: Path) -> str:
    """Make `out/photos.tar` with `tarfile`: for each photo its bytes and a JSON record. Returns the tar's SHA-256."""
    with tarfile.open(out / "photos.tar", "w") as tar:
        for row in read_photos(str(folder)):
            data = row.pop("image")["bytes"]
            for extension, content in (("jpg", data), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{row['key']}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return _hash(out / "photos.tar")


def _look(row: dict[str, Any]) -> dict[str, Any]:
    """What the map of the imagefolder route adds to a row."""
    path = Path(row["image"]["path"])
    return _facts(path, path.read_bytes(), row)


def _facts(path: Path, data: bytes, row: dict[str, Any]) -> dict[str, Any]:
    """What is read from a photo, and the lists in its row of the table."""
    width, height = check_header(data)
    return {
        "key": path.stem,
        "sha256": hashlib.sha256(data).hexdigest(),
        "width": width,
        "height": height,
        "gps": _literal(row["gps"]),
        "weather": _literal(row["scene_level_tags.weather"]),
    }


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _literal(text: str | None) -> Any:
    """The list that a cell spells, or None."""
    try:
        return ast.literal_eval(text or "")
    except (SyntaxError, ValueError):
        return None
