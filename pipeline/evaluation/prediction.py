"""Predictions for files: find photos, read them, answer, write the answers."""

from __future__ import annotations

import csv
import glob
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.data import Dataset

from pipeline.data.batch import batches_of, collate
from pipeline.data.dataset import prepare
from pipeline.data.photo import BadPhoto
from pipeline.errors import UserError, require
from pipeline.evaluation.inference import kept_views
from pipeline.model.config import InputSpec
from pipeline.model.roadwork import RoadworkModel
from pipeline.names import LABEL_NAMES

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
NOT_A_NUMBER = "the model's answer is not a number"
COLUMNS = ("path", "probability", "label", "kept_views", "error")
Row = dict[str, Any]
# A photo's views and an empty reason, or None and the reason why there are none.
Prepared = tuple[dict[str, torch.Tensor] | None, str]
Batch = tuple[dict[str, torch.Tensor] | None, list[str]]


def find_photos(inputs: list[str]) -> list[Path]:
    """The files that paths, folders and patterns name: in the order given, sorted within each, each file once.

    Raises:
        UserError: One of them matches nothing.
    """
    require(bool(inputs), "--input", inputs, "files, folders or glob patterns")
    found: dict[Path, None] = {}
    for name in inputs:
        # A file's name may contain a pattern's characters, so existing paths go first.
        places = [Path(name)] if Path(name).exists() else [Path(p) for p in sorted(glob.glob(name, recursive=True))]
        photos = [photo for place in places for photo in (_images_under(place) if place.is_dir() else [place])]
        if not photos:
            raise UserError(f"--input {name!r} leads to no photo; name files, folders with images, or a pattern")
        found |= dict.fromkeys(photos)
    return list(found)


def _images_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


class PhotoFiles(Dataset[Prepared]):
    """Views of files, or the reason why a file has none."""

    def __init__(self, files: list[Path], spec: InputSpec):
        self.files, self.spec = files, spec

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Prepared:
        """See `pipeline.data.dataset.prepare`."""
        try:
            return prepare(self.files[row].read_bytes(), self.spec), ""
        except BadPhoto as error:
            return None, str(error)
        except OSError as error:
            return None, f"cannot be read: {error.strerror}"


def collate_readable(samples: list[Prepared]) -> Batch:
    """Stack the photos that have views; the list of reasons has an entry for every photo."""
    readable = [views for views, _ in samples if views is not None]
    return collate(readable) if readable else None, [reason for _, reason in samples]


def answers(model: RoadworkModel, files: list[Path], batch_size: int, workers: int) -> Iterator[Row]:
    """One row per file, in the order of the files."""
    dataset = PhotoFiles(files, model.config.input_spec)
    paths = iter(files)
    for views, reasons in batches_of(dataset, batch_size, workers, collate_readable):
        scored = iter(() if views is None else score(model, views))
        for reason, path in zip(reasons, paths, strict=False):
            answer = {"error": reason} if reason else next(scored)
            yield {**dict.fromkeys(COLUMNS), **answer, "path": os.fspath(path)}


@torch.inference_mode()
def score(model: RoadworkModel, views: dict[str, torch.Tensor]) -> list[Row]:
    """Probability, label and kept views of each photo of a batch, or an error where the answer is not a number."""
    output = model(views, null_metadata=True)
    assert output.logits is not None
    return [
        # Nine digits restore every float32; exactly 0.5 counts as none.
        {"probability": float(f"{p:.9g}"), "label": LABEL_NAMES[int(p > 0.5)], "kept_views": kept}
        if math.isfinite(p)
        else {"error": NOT_A_NUMBER}
        for p, kept in zip(model.probability(output.logits).tolist(), kept_views(output), strict=True)
    ]


def csv_writer(stream: TextIO) -> Callable[[Row], object]:
    """Write a CSV header, and return a function that writes a row. Views are joined by semicolons."""
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    return lambda row: writer.writerow({**row, "kept_views": ";".join(row["kept_views"] or ())})


def jsonl_writer(stream: TextIO) -> Callable[[Row], object]:
    """Return a function that writes a row as one line of JSON. Views are a list."""
    return lambda row: stream.write(json.dumps(row, allow_nan=False) + "\n")


WRITERS: dict[str, Callable[[TextIO], Callable[[Row], object]]] = {".csv": csv_writer, ".jsonl": jsonl_writer}
