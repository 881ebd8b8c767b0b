"""Predictions for files: read photos, answer, write the answers."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch.utils.data import Dataset

from pipeline.data.batch import batches_of, collate
from pipeline.data.dataset import prepare
from pipeline.data.photo import BadPhoto
from pipeline.data.photo_files import read_file
from pipeline.errors import require
from pipeline.evaluation.inference import kept_views
from pipeline.model.config import InputSpec
from pipeline.model.roadwork import RoadworkModel
from pipeline.names import LABEL_NAMES

NOT_A_NUMBER = "the model's answer is not a number"
COLUMNS = ("path", "probability", "label", "kept_views", "error")
Row = dict[str, Any]
# A photo's views and an empty reason, or None and the reason why there are none.
Prepared = tuple[dict[str, torch.Tensor] | None, str]
Batch = tuple[dict[str, torch.Tensor] | None, list[str]]


class Paths(Protocol):
    """Paths by number, such as a list of them."""

    def __len__(self) -> int:
        """The number of paths."""

    def __getitem__(self, row: int, /) -> Path:
        """The path of a number."""


class PhotoFiles(Dataset[Prepared]):
    """Views of files, or the reason why a file has none."""

    def __init__(self, files: Paths, spec: InputSpec):
        self.files, self.spec = files, spec

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Prepared:
        """See `pipeline.data.dataset.prepare`."""
        try:
            return prepare(read_file(self.files[row]), self.spec), ""
        except BadPhoto as error:
            return None, str(error)
        except OSError as error:
            return None, f"cannot be read: {error.strerror}"


def collate_readable(samples: list[Prepared]) -> Batch:
    """Stack the photos that have views; the list of reasons has an entry for every photo."""
    readable = [views for views, _ in samples if views is not None]
    return collate(readable) if readable else None, [reason for _, reason in samples]


def answers(model: RoadworkModel, photos: Dataset[Prepared], batch_size: int, workers: int) -> Iterator[list[Row]]:
    """A row for each photo of each batch, in the order of the photos, without its path.

    Args:
        model: The model.
        photos: `PhotoFiles`, or a subset of them.
        batch_size: Photos in one forward pass.
        workers: Processes that read; 0 reads in this one.
    """
    for views, reasons in batches_of(photos, batch_size, workers, collate_readable):
        scored = iter(() if views is None else score(model, views))
        yield [{"error": reason} if reason else next(scored) for reason in reasons]


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


# What a spreadsheet takes for a formula, see OWASP's "CSV Injection".
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def csv_writer(stream: TextIO) -> Callable[[Path, Row], object]:
    """Write a CSV header, and return a function that writes a photo's row. Views are joined by semicolons."""
    usual = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    # The usual one leaves a lone carriage return without quotes, which readers take for the end of the line.
    quoted = csv.DictWriter(stream, COLUMNS, lineterminator="\n", quoting=csv.QUOTE_ALL)
    usual.writeheader()

    def write(path: Path, row: Row) -> None:
        cells = {**row, "path": csv_path(os.fspath(path)), "kept_views": ";".join(row.get("kept_views", ()))}
        (quoted if "\r" in cells["path"] + row.get("error", "") else usual).writerow(cells)

    return write


def csv_path(path: str) -> str:
    """A path as a table's cell: one that a spreadsheet would compute as a formula begins with `./`.

    Args:
        path: The path; an absolute one never begins in that way.
    """
    return f"./{path}" if path.startswith(FORMULA) else path


def jsonl_writer(stream: TextIO) -> Callable[[Path, Row], object]:
    """Return a function that writes a photo's row as one line of JSON. Views are a list."""
    return lambda path, row: stream.write(
        json.dumps({**dict.fromkeys(COLUMNS), **row, "path": os.fspath(path)}, allow_nan=False) + "\n"
    )


def check_output(output: Path) -> None:
    """Refuse an output that could not be written after all the work.

    Raises:
        UserError: Its suffix names no format, or it is a folder.
    """
    require(output.suffix in WRITERS, "--output", str(output), f"a file that ends in {' or '.join(WRITERS)}")
    require(not output.is_dir(), "--output", str(output), "a file, and this is a folder")


WRITERS: dict[str, Callable[[TextIO], Callable[[Path, Row], object]]] = {".csv": csv_writer, ".jsonl": jsonl_writer}
