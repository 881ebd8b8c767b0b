"""From photos to tokens at the speed of the backbone: full batches, decoded and uploaded while it computes."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from pipeline.devices import MIN_CUDNN, spare_cores
from pipeline.errors import UserError
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.compiled import compile_layers
from pipeline.model.config import MAX_VIEWS_PER_PASS
from pipeline.model.encoder import Tokens, view_tokens
from pipeline.model.float8 import refuse_without_float8, to_float8
from pipeline.names import NUM_VIEWS
from pipeline.progress import say

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MOST_PHOTOS = 256  # in one batch, where each has one view
MOST_PASSES = 4  # side by side on a CPU; each takes memory, and the interpreter serves one at a time


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
    record: bytes
    """The sample's record as JSON."""
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
        """By row the fields of `Row` but for its tokens: useful `views` uint8 [M, 3, S, S], `boxes` and `view_mask`."""
        item = self.items[number]
        data = self.data[item.split]
        record, photo = data.sample(item.row)
        with data.naming(data.split.samples[item.row].shard, data.split.samples[item.row]):
            image, size = decode_scaled(photo, data.spec)
        mask = data.mask(item.row)
        rows = [data.cut(image, size, mask, record, copy) for copy in range(item.copies)]
        same = {"photo": item.row, "sha256": record.sha256, "record": json.dumps(record.to_json()).encode()}
        return [{**same, **row, "views": _useful(row["views"], row["view_mask"])} for row in rows]


def _useful(views: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The views that the mask has; without a copy if it has all of them, as it does for most photos."""
    return views if bool(mask.all()) else views[mask]


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
    """Computes tokens while later photos are decoded.

    A GPU has one pass queued while another one runs, and its host waits for nothing but the results of the pass before.
    A CPU runs up to `MOST_PASSES` passes side by side, each on its share of the threads: several threads of one small
    pass would spend much of their time waiting for each other.

    Compilation and the choice of a kernel are for GPUs; on a CPU they are left out.
    """

    def __init__(self, backbone: FrozenBackbone, pool_grid: int, options: Options, workers: int):
        """Take the backbone over; with FP8 or compilation, the first pass changes it.

        Args:
            backbone: The loaded backbone, on its device.
            pool_grid: Cells per side g.
            options: How the work is done.
            workers: Processes that decode; 0 decodes in this one.
        """
        self.backbone, self.pool_grid, self.options, self.workers = backbone, pool_grid, options, workers
        self.on_gpu = backbone.device.type == "cuda"
        self.batch_views = options.batch_views or (MAX_VIEWS_PER_PASS if self.on_gpu else NUM_VIEWS)
        self.passes = 1 if self.on_gpu else min(torch.get_num_threads(), MOST_PASSES)
        self.views = 0
        """Views that were computed."""
        self.compiled: bool | None = None
        """Whether the backbone is compiled; None before the first pass."""
        self.start: dict[str, float] | None = None
        """What the first pass measured: `compile_s`, and in FP8 `cosine_of_cls` and `cosine_of_cells`, the mean cosine
        between its tokens and those in the backbone's own precision. None before it."""

    def run(self, data: Mapping[str, ShardDataset], items: list[Item]) -> Iterator[Row]:
        """The rows of all `items`, in their order."""
        loader = batches_of(ViewDataset(data, items), 1, self.workers, itemgetter(0), pin_memory=self.on_gpu)
        return self.batches(chain.from_iterable(loader))

    def batches(self, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
        """Compute the given rows of a `ViewDataset`, in their order; for a GPU they lie in pinned memory."""
        running: deque[tuple[ViewBatch, Callable[[], Tokens]]] = deque()
        # On a CPU one more, so that no pass waits for a photo that this thread decodes.
        ahead = self.passes if self.on_gpu else self.passes + 1
        with self._launcher() as launch:
            for batch in self._uploaded(pack(rows, self.batch_views)):
                if self.start is None:
                    self.start = self._prepare(batch)
                self.views += len(batch.views)
                running.append((batch, launch(batch)))
                if len(running) > ahead:
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

    def _prepare(self, batch: ViewBatch) -> dict[str, float]:
        """Make the backbone what the options want, on the first views; see `start` for what is returned."""
        found = {}
        if self.options.precision == "fp8":
            exact = self._compute(batch)
            to_float8(self.backbone.model)
            ours = self._compute(batch)
            found = {f"cosine_of_{name}": _mean_cosine(getattr(ours, name), getattr(exact, name))
                     for name in ("cls", "cells")}  # fmt: skip
            say("FP8: mean cosine with the tokens of the backbone's own precision "
                f"{found['cosine_of_cls']:.5f} (CLS), {found['cosine_of_cells']:.5f} (cells)")  # fmt: skip
        if self.on_gpu and self.options.compile:
            began = time.monotonic()
            self.compiled = compile_layers(
                self.backbone.model, lambda: self._compute(batch), spare_cores(self.backbone.device)
            )
            found["compile_s"] = round(time.monotonic() - began, 1)
        return found

    @contextmanager
    def _launcher(self) -> Iterator[Callable[[ViewBatch], Callable[[], Tokens]]]:
        """A function that starts a pass, and returns one that waits for its tokens."""
        if self.on_gpu:
            yield self._queue
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // self.passes))  # of this thread, and of those that start after it
        try:
            with ThreadPoolExecutor(self.passes) as pool:
                yield lambda batch: pool.submit(self._compute, batch).result
        finally:
            torch.set_num_threads(threads)

    def _queue(self, batch: ViewBatch) -> Callable[[], Tokens]:
        """Queue a pass and the copy of its results on the GPU's stream."""
        computed = self._compute(batch)
        fetched = Tokens(*(torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in computed))
        for target, part in zip(fetched, computed, strict=True):
            target.copy_(part, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def wait() -> Tokens:
            event.synchronize()
            return fetched

        return wait

    def _compute(self, batch: ViewBatch) -> Tokens:
        """The tokens of a pass as they are stored; on a GPU they are only queued."""
        with self._kernel(), torch.no_grad():
            tokens = view_tokens(self.full_pass, batch.views, batch.boxes, batch.view_mask, self.pool_grid)
            return Tokens(*(part.to(STORED_DTYPE) for part in tokens))

    def full_pass(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the backbone on uint8 [M, 3, S, S]; a compiled one always gets a full batch, so that it compiles once."""
        missing = self.batch_views - len(views)
        compiles = self.on_gpu and self.options.compile and self.compiled is not False
        if not compiles or missing <= 0:
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


def decoding_workers(device: torch.device) -> int:
    """Processes that decode for each one that computes; none on a CPU, whose cores are all busy with passes."""
    return spare_cores(device) if device.type == "cuda" else 0


def refuse_unsupported(options: Options, device: torch.device) -> None:
    """Refuse what this machine cannot compute, or not rightly.

    Raises:
        UserError: Attention by a cuDNN with a fault, or FP8 on a device without it.
    """
    cudnn = torch.backends.cudnn.version() or 0
    if device.type == "cuda" and options.attention == "cudnn" and cudnn < MIN_CUDNN:
        raise UserError(
            f"--attention cudnn needs cuDNN {MIN_CUDNN} (9.15.1) or later, and torch found {cudnn}, whose attention is "
            "wrong for the length of a view; take --attention auto, or, if LD_LIBRARY_PATH names an older cuDNN than "
            "torch's own, remove it there"
        )
    if options.precision == "fp8":
        refuse_without_float8(device)


def _mean_cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return round(F.cosine_similarity(ours.float(), theirs.float(), dim=-1).mean().item(), 6)


def _finish(batch: ViewBatch, wait: Callable[[], Tokens]) -> Iterator[Row]:
    """Wait for the tokens of a pass, and split them by row."""
    cls, cells, regions = wait()
    counts = batch.view_mask.sum(1).tolist()
    split = zip(batch.rows, cls.split(counts), cells.split(counts), regions, strict=True)
    for row, one_cls, one_cells, one_regions in split:
        tokens = PhotoTokens(one_cls, one_cells, one_regions, row["boxes"], row["view_mask"])
        yield Row(row["photo"], row["sha256"], row["record"], tokens, row["mask_targets"])
