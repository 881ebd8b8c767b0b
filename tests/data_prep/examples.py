"""Small photos, folders of them, and shards read back, for the tests of the offline stage."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.index import Index
from pipeline.data.record import Record
from pipeline.parsing.typed_json import parse_json

# Far apart, so that each is a block of its own.
CITIES = {
    "Oslo": (59.91, 10.75),
    "Lyon": (45.76, 4.84),
    "Lima": (-12.05, -77.04),
    "Perth": (-31.95, 115.86),
    "Osaka": (34.69, 135.50),
    "Quito": (-0.18, -78.47),
    "Cairo": (30.04, 31.24),
    "Delhi": (28.61, 77.21),
}


def pixels(seed: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Smooth random blobs: different seeds look different, copies of one look alike."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: np.ndarray | Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with io.BytesIO() as stream:
        picture.save(stream, format, **options)
        return stream.getvalue()


def jpeg(seed: int, width: int = 96, height: int = 64) -> bytes:
    """A JPEG file of `pixels`."""
    return encode(pixels(seed, width, height), quality=90)


def jpeg_at(seed: int, latitude: float, longitude: float) -> bytes:
    """A JPEG file whose EXIF says where it was taken, in the northern and eastern hemispheres."""
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: "N", 2: (latitude, 0.0, 0.0), 3: "E", 4: (longitude, 0.0, 0.0)})
    return encode(pixels(seed), exif=exif)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file whose columns are the keys of all rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def city_rows(per_city: int, cities: int = len(CITIES)) -> list[dict[str, Any]]:
    """Rows of labelled photos in several cities, 300 m apart within a city."""
    rows = []
    for city, (latitude, longitude) in list(CITIES.items())[:cities]:
        for number in range(per_city):
            gps = f"[{latitude + 0.0027 * number:.8f}, {longitude:.8f}]"
            label = len(rows) % 2
            rows.append({"file_name": f"{city}-{number}.jpg", "label": label, "gps": gps, "city_name": city})
    return rows


def write_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A folder with a photo for each row and `metadata.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, row in enumerate(rows):
        (folder / row["file_name"]).write_bytes(jpeg(seed))
    write_table(folder / "metadata.csv", rows)
    return folder


def read(folder: Path, index: Index) -> dict[str, list[tuple[Record, dict[str, bytes]]]]:
    """Records and members of every sample, read at the index's offsets."""
    found: dict[str, list[tuple[Record, dict[str, bytes]]]] = {}
    for name, split in index.splits.items():
        for sample in split.samples:
            data = (folder / split.shards[sample.shard].name).read_bytes()
            members = {extension: data[start : start + size] for extension, (start, size) in sample.members.items()}
            found.setdefault(name, []).append((parse_json(members["json"], Record), members))
    return found


def content(folder: Path) -> dict[str, str]:
    """Hashes of the files whose bytes must not depend on anything but the input."""
    names = [path for path in sorted(folder.iterdir()) if path.name != "summary.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}
