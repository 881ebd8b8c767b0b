"""COCO annotations and their photos, for the tests of the source that reads them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.sources.opening import open_source
from tests.data_prep.examples import jpeg

WIDTH, HEIGHT = 96, 64
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
CATEGORY_IDS = {"Cone": 4, "Barrier": 8, "Worker": 18, "Work Vehicle": 9, "Bike Lane": 15}


def image_of(number: int, **extra: Any) -> dict[str, Any]:
    """An entry of `images`."""
    return {"id": number, "file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT, **extra}


def object_of(image: int, category: str, segmentation: Any, number: int = 1) -> dict[str, Any]:
    """An entry of `annotations`."""
    return {
        "id": number, "image_id": image, "category_id": CATEGORY_IDS[category], "segmentation": segmentation,
        "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0,
    }  # fmt: skip


def write_coco(folder: Path, images: list[Any], annotations: list[Any], categories: Any = None) -> Path:
    """A photo for each image with a plain name, and the annotations' file."""
    for entry in images:
        name = entry["file_name"]
        if name.isascii() and name.endswith(".jpg") and len(name) < 10:
            (folder / name).write_bytes(jpeg(int(entry["id"])))
    listed = categories or [{"id": number, "name": name} for name, number in CATEGORY_IDS.items()]
    file = folder / "annotations.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": listed}))
    return file


def only_input(folder: Path, image: dict[str, Any], annotations: list[Any]) -> Any:
    """The one input of a set of one image."""
    (item,) = open_source(folder, write_coco(folder, [image], annotations))
    return item


def pixels_of(png: bytes) -> np.ndarray:
    """Values of a mask."""
    picture = Image.open(io.BytesIO(png))
    assert (picture.format, picture.mode) == ("PNG", "L")
    return np.asarray(picture)


def blob(seed: int, radius: float, points: int = 20) -> list[float]:
    """A star-shaped polygon around the middle of the photo."""
    random = np.random.default_rng(seed)
    angles = np.sort(random.uniform(0, 2 * np.pi, points))
    radii = radius * random.uniform(0.4, 1.0, points)
    corners = np.stack([WIDTH / 2 + radii * np.cos(angles), HEIGHT / 2 + radii * np.sin(angles)], axis=1)
    return corners.ravel().tolist()
