"""Predict roadwork on photos: `python -m pipeline.predict --model RUN/model --input PHOTOS --output CSV`."""

from __future__ import annotations

import csv
import glob
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.cli import command
from pipeline.data.dataset import collate, prepare
from pipeline.data.memory import keep_freed_memory
from pipeline.data.photo import BadPhoto
from pipeline.data.vocabulary import LABEL_NAMES
from pipeline.errors import UserError, require
from pipeline.files import write_json
from pipeline.inference import kept_views, load_model, pick_device, probability_of
from pipeline.model.roadwork import RoadworkModel
from pipeline.progress import say, track

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
COLUMNS = ("path", "probability", "label", "kept_views", "error")
Row = dict[str, Any]
# Views and an empty reason, or the reason why there are none.
Prepared = tuple[dict[str, torch.Tensor] | None, str]
Batch = tuple[dict[str, torch.Tensor] | None, list[str]]


def predict(
    model: Path,
    input: list[str],
    output: Path,
    *,
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
) -> Path:
    """Predict roadwork on photographs, without metadata. A broken photograph is a row with an error.

    Args:
        model: Folder of a trained or exported model.
        input: Files, folders (searched through for images) and glob patterns.
        output: A .csv or .jsonl file: path, probability, label, kept_views, error; one row per photo.
        batch_size: Photos in one forward pass.
        workers: Processes that read, decode and cut views; 0 does it in this one.
        device: cpu, cuda, cuda:1, or auto for a GPU where there is one.

    Returns:
        The path of a summary beside the output.
    """
    require(batch_size >= 1, "--batch_size", batch_size, "1 or more")
    require(workers >= 0, "--workers", workers, "0 or more")
    require(output.suffix in WRITERS, "--output", str(output), f"a file that ends in {' or '.join(WRITERS)}")
    start, files = time.monotonic(), find_photos(input)
    classifier = load_model(model, pick_device(device))
    counts: Counter[str] = Counter()
    with whole_file(output) as stream:
        write = WRITERS[output.suffix](stream)
        for row in track(answers(classifier, files, batch_size, workers), len(files), "predicting"):
            write(row)
            counts["failed" if row["error"] else row["label"]] += 1
    failed = counts.pop("failed", 0)
    if failed:
        say(f"{failed} of {len(files)} photos could not be read; the column `error` says why")
    wall_s = time.monotonic() - start
    # Several outputs may share a folder, such as /tmp, so the summary carries the output's name.
    summary = output.with_suffix(".summary.json").resolve()
    values = {
        "output": str(output.resolve()),
        "model": str(model.resolve()),
        "photos": len(files),
        "failed": failed,
        "labels": dict(counts),
        "wall_s": round(wall_s, 2),
        "images_per_s": round(len(files) / wall_s, 2),
    }
    write_json(summary, values)
    return summary


def find_photos(inputs: list[str]) -> list[Path]:
    """Files, folders and patterns to files, in the order given, sorted within a folder or pattern, each once.

    Raises:
        UserError: One of them leads to nothing.
    """
    require(bool(inputs), "--input", inputs, "files, folders or glob patterns")
    found: dict[Path, None] = {}
    for name in inputs:
        # A file may have a pattern's characters in its name, so what exists goes first.
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

    def __init__(self, files: list[Path], side: int, num_views: int):
        self.files, self.side, self.num_views = files, side, num_views

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Prepared:
        """See `pipeline.data.dataset.prepare`."""
        try:
            return prepare(self.files[row].read_bytes(), self.side, self.num_views), ""
        except BadPhoto as error:
            return None, str(error)
        except OSError as error:
            return None, f"cannot be read: {error.strerror}"


def collate_readable(samples: list[Prepared]) -> Batch:
    """Stack the photos that have views; the reasons keep the places of all."""
    readable = [views for views, _ in samples if views is not None]
    return collate(readable) if readable else None, [reason for _, reason in samples]


def answers(model: RoadworkModel, files: list[Path], batch_size: int, workers: int) -> Iterator[Row]:
    """One row per file, in their order."""
    dataset = PhotoFiles(files, model.config.view_side, model.config.num_views)
    loader = DataLoader(
        dataset, batch_size, num_workers=workers, collate_fn=collate_readable, worker_init_fn=keep_freed_memory
    )
    paths = iter(files)
    for views, reasons in loader:
        scored = iter(() if views is None else score(model, views))
        for reason, path in zip(reasons, paths, strict=False):
            answer = {} if reason else next(scored)
            yield {**dict.fromkeys(COLUMNS), **answer, "path": os.fspath(path), "error": reason or None}


@torch.inference_mode()
def score(model: RoadworkModel, views: dict[str, torch.Tensor]) -> list[Row]:
    """Probability, label and kept views of each photo of a batch."""
    output = model(**views, null_metadata=True)
    return [
        # Nine digits give back every float32; exactly 0.5 counts as none.
        {"probability": float(f"{p:.9g}"), "label": LABEL_NAMES[int(p > 0.5)], "kept_views": kept}
        for p, kept in zip(probability_of(model, output), kept_views(output), strict=True)
    ]


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name once the block has ended without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def csv_writer(stream: TextIO) -> Callable[[Row], object]:
    """Writes the header now, and later rows; views are joined by semicolons."""
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    return lambda row: writer.writerow({**row, "kept_views": ";".join(row["kept_views"] or ())})


def jsonl_writer(stream: TextIO) -> Callable[[Row], object]:
    """Writes a JSON object per line; views are a list."""
    return lambda row: stream.write(json.dumps(row) + "\n")


WRITERS: dict[str, Callable[[TextIO], Callable[[Row], object]]] = {".csv": csv_writer, ".jsonl": jsonl_writer}


if __name__ == "__main__":
    raise SystemExit(command(predict))
