"""From photos to tokens at the speed of the backbone: full batches, decoded and uploaded while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

from data_prep.features.options import Options
from pipeline.data.batch import batches_of
from pipeline.data.dataset import ShardDataset, decode_scaled
from pipeline.data.feature_key import STORED_DTYPE
from pipeline.data.features import PhotoTokens
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.config import MAX_VIEWS_PER_PASS
from pipeline.model.encoder import view_tokens
from pipeline.names import NUM_VIEWS

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MOST_PHOTOS = 256  # in one batch, where each has one view


class Item(NamedTuple):
    """A photo whose rows are to be computed."""

    split: str
    row: int
    """The photo's row in its split."""
    copies: int
    """Number of rows: the photo itself and its augmented copies."""


class Row(NamedTuple):
    """One computed row."""

    photo: int
    """The photo's row in its split."""
    sha256: str
    """SHA-256 of the photo's bytes."""
    tokens: PhotoTokens
    """The row's tokens, without the views that add nothing."""
    mask_targets: torch.Tensor
    """Share of each cell that each class covers, float32 [6, m, m]."""


class ViewDataset(Dataset[list[dict[str, Any]]]):
    """The views of photos and of their augmented copies, those that add nothing left out."""

    def __init__(self, data: Mapping[str, ShardDataset], items: list[Item]):
        """Take the photos of `items`, in their order, from the splits."""
        self.data, self.items = data, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        """By row `photo`, `sha256`, `mask_targets`, useful `views` uint8 [M, 3, S, S], `boxes` and `view_mask`."""
        item = self.items[number]
        data = self.data[item.split]
        record, photo = data.sample(item.row)
        with data.naming(data.split.samples[item.row].shard, data.split.samples[item.row]):
            image, size = decode_scaled(photo, data.spec)
        mask = data.mask(item.row)
        rows = [data.cut(image, size, mask, record, copy) for copy in range(item.copies)]
        same = {"photo": item.row, "sha256": record.sha256}
        return [{**same, **row, "views": row["views"][row["view_mask"]]} for row in rows]


@dataclass(frozen=True)
class ViewBatch:
    """Rows whose views fill one pass of the backbone."""

    rows: list[dict[str, Any]]
    views: torch.Tensor
    """Useful views of all rows, uint8 [M, 3, S, S], on the backbone's device."""
    boxes: torch.Tensor
    """Boxes of all views of the B rows, [B, V, 4], on the backbone's device."""
    view_mask: torch.Tensor
    """Which views are useful, bool [B, V], on the CPU."""


class Extractor:
    """Computes tokens, with the results of one batch fetched while the next one runs.

    Compilation and the choice of a kernel are for GPUs; on a CPU they are left out.
    """

    def __init__(self, backbone: FrozenBackbone, pool_grid: int, options: Options, workers: int):
        self.backbone, self.pool_grid, self.options, self.workers = backbone, pool_grid, options, workers
        self.on_gpu = backbone.device.type == "cuda"
        self.batch_views = options.batch_views or (MAX_VIEWS_PER_PASS if self.on_gpu else NUM_VIEWS)
        self.views = 0
        """Views that were computed."""
        if self.on_gpu and options.compile:
            backbone.model.compile(dynamic=False)

    def run(self, data: Mapping[str, ShardDataset], items: list[Item]) -> Iterator[Row]:
        """The rows of all `items`, in their order."""
        loader = batches_of(ViewDataset(data, items), 1, self.workers, itemgetter(0), pin_memory=self.on_gpu)
        return self.batches(chain.from_iterable(loader))

    def batches(self, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
        """Compute the given rows of a `ViewDataset`, in their order; for a GPU they lie in pinned memory."""
        running: deque[tuple[ViewBatch, list[torch.Tensor], torch.cuda.Event | None]] = deque()
        for batch in self._uploaded(pack(rows, self.batch_views)):
            running.append((batch, *self._launch(batch)))
            if len(running) > 1:
                yield from _finish(*running.popleft())
        while running:
            yield from _finish(*running.popleft())

    def _uploaded(self, packs: Iterable[list[dict[str, Any]]]) -> Iterator[ViewBatch]:
        """Copy views to the device on a stream of their own, beside the pass that is under way."""
        stream = torch.cuda.Stream(self.backbone.device) if self.on_gpu else None
        for rows in packs:
            with torch.cuda.stream(stream) if stream else nullcontext():
                views = torch.cat([row["views"].to(self.backbone.device, non_blocking=True) for row in rows])
                boxes = torch.stack([row["boxes"].to(self.backbone.device, non_blocking=True) for row in rows])
            if stream is not None:
                current = torch.cuda.current_stream(self.backbone.device)
                current.wait_stream(stream)
                for uploaded in (views, boxes):
                    uploaded.record_stream(current)
            yield ViewBatch(rows, views, boxes, torch.stack([row["view_mask"] for row in rows]))

    def _launch(self, batch: ViewBatch) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        """Start a pass and the copy of its results; on a GPU both are only queued."""
        self.views += len(batch.views)
        with self._kernel(), torch.no_grad():
            tokens = view_tokens(self.full_pass, batch.views, batch.boxes, batch.view_mask, self.pool_grid)
        stored = [part.to(STORED_DTYPE) for part in tokens]
        if not self.on_gpu:
            return stored, None
        fetched = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in stored]
        for target, part in zip(fetched, stored, strict=True):
            target.copy_(part, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return fetched, event

    def full_pass(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the backbone on uint8 [M, 3, S, S]; a compiled one always gets a full batch, so that it compiles once."""
        missing = self.batch_views - len(views)
        if not (self.on_gpu and self.options.compile) or missing <= 0:
            return self.backbone(views)
        cls, patches = self.backbone(F.pad(views, (0, 0, 0, 0, 0, 0, 0, missing)))
        return cls[: len(views)], patches[: len(views)]

    def _kernel(self) -> AbstractContextManager[None]:
        if not self.on_gpu or self.options.attention == "auto":
            return nullcontext()
        return sdpa_kernel(KERNELS[self.options.attention])


def pack(rows: Iterable[dict[str, Any]], batch_views: int) -> Iterator[list[dict[str, Any]]]:
    """Group rows so that their useful views fill a batch as far as whole rows can."""
    full: list[dict[str, Any]] = []
    views = 0
    for row in rows:
        if full and (views + len(row["views"]) > batch_views or len(full) == MOST_PHOTOS):
            yield full
            full, views = [], 0
        full.append(row)
        views += len(row["views"])
    if full:
        yield full


def _finish(batch: ViewBatch, parts: list[torch.Tensor], event: torch.cuda.Event | None) -> Iterator[Row]:
    """Wait for the results of a pass, and split them by row."""
    if event is not None:
        event.synchronize()
    cls, cells, regions = parts
    counts = batch.view_mask.sum(1).tolist()
    split = zip(batch.rows, cls.split(counts), cells.split(counts), regions, strict=True)
    for row, one_cls, one_cells, one_regions in split:
        tokens = PhotoTokens(one_cls, one_cells, one_regions, row["boxes"], row["view_mask"])
        yield Row(row["photo"], row["sha256"], tokens, row["mask_targets"])
