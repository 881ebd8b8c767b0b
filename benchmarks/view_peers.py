"""Twelve views cut with Pillow alone, and readers of the same tars with `webdataset` and `datasets`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from pipeline.data.views import view_boxes

Cut = Callable[[bytes], torch.Tensor]
"""Makes views uint8 [12, 3, S, S] from the bytes of a photo's file."""
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1."""
Batch = tuple[Sequence[str], torch.Tensor]
"""Keys of B samples and their views."""


def decode_once(data: bytes, side: int) -> torch.Tensor:
    """Decode the photo, and resize every view from its own box of it."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return cut(image.convert("RGB"), side)


def cut(image: Image.Image, side: int) -> torch.Tensor:
    """Every view of a decoded photo: uint8 [V, 3, S, S]."""
    lanczos = Image.Resampling.LANCZOS
    views = [np.asarray(image.resize((side, side), lanczos, box=box)) for box in boxes_px(*image.size, side)]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def boxes_px(width: int, height: int, side: int) -> list[Box]:
    """Each view's box in pixels of the photo."""
    boxes = view_boxes(width, height, side).double() * torch.tensor([width, height, width, height])
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist()]


def webdataset_pillow(tars: list[Path], side: int, batch_size: int, workers: int) -> Iterator[Batch]:
    """The pipeline of the package's documentation: decoded by Pillow, mapped, batched in the workers."""
    samples = open_tars(tars).decode("pilrgb").map(lambda sample: (sample["__key__"], cut(sample["jpg"], side)))
    yield from DataLoader(samples.batched(batch_size), batch_size=None, num_workers=workers)


def webdataset_with(tars: list[Path], cut_views: Cut, batch_size: int, workers: int) -> Iterator[Batch]:
    """A `webdataset` pipeline that lets `cut_views` make the views from the photo's bytes."""
    samples = open_tars(tars).map(lambda sample: (sample["__key__"], cut_views(sample["jpg"])))
    yield from DataLoader(samples.batched(batch_size), batch_size=None, num_workers=workers)


def open_tars(tars: list[Path]) -> Any:
    """A pipeline over the samples of all tars, which are split among the workers."""
    return webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)


def datasets_pillow(tars: list[Path], side: int, batch_size: int, workers: int) -> Iterator[Batch]:
    """A stream of decoded photos, mapped."""
    rows = stream_tars(tars).map(lambda row: {"key": row["__key__"], "views": cut(row["jpg"].convert("RGB"), side)})
    yield from batches_of(rows, batch_size, workers)


def datasets_with(tars: list[Path], cut_views: Cut, batch_size: int, workers: int) -> Iterator[Batch]:
    """A stream of `datasets` that lets `cut_views` make the views from the photo's bytes."""
    rows = stream_tars(tars).cast_column("jpg", datasets.Image(decode=False))
    rows = rows.map(lambda row: {"key": row["__key__"], "views": cut_views(row["jpg"]["bytes"])})
    yield from batches_of(rows, batch_size, workers)


def stream_tars(tars: list[Path]) -> Any:
    """All samples, their tars split among the workers."""
    files = {"train": [str(tar) for tar in tars]}
    return datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)


def batches_of(rows: Any, batch_size: int, workers: int) -> Iterator[Batch]:
    """Batches of a stream, without the columns that the views were made from."""
    for batch in DataLoader(rows.select_columns(["key", "views"]), batch_size, num_workers=workers):
        yield batch["key"], batch["views"]
