"""Component 2: twelve views of a photo. One global view, nine overlapping tiles, two undistorted crops."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.names import NUM_VIEWS, TILE_GRID

CANVAS_RATIO = 2.5  # canvas side in view sides: three tiles that overlap by a quarter
TILE_STRIDE = 0.75  # in view sides
TILES = range(1, 1 + TILE_GRID**2)
CROPS = range(1 + TILE_GRID**2, NUM_VIEWS)
KEPT_SIZES = 1024  # sizes of photos whose boxes are kept; a data set has few, and computing them takes 1 % of a photo
# Lanczos in `interpolate` came with torch 2.13; before that, Pillow resizes, with the same geometry.
TORCH_LANCZOS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def canvas_boxes(width: int, height: int, side: int) -> list[tuple[int, int, int, int]]:
    """Each view's box on the square canvas of side 2.5 S, as x0, y0, x1, y1 in canvas pixels.

    The crops are the squares of side min(width, height) at both ends of the long side. On the canvas, whose axes are
    scaled independently, they are rectangles, snapped to whole canvas pixels.

    Args:
        width: Width of the photo in pixels.
        height: Height of the photo in pixels.
        side: View side S in pixels.
    """
    canvas, stride = canvas_side(side), round(TILE_STRIDE * side)
    tiles = [
        (x, y, x + side, y + side)
        for y in range(0, TILE_GRID * stride, stride)
        for x in range(0, TILE_GRID * stride, stride)
    ]
    across = max(1, round(canvas * min(1.0, height / width)))
    down = max(1, round(canvas * min(1.0, width / height)))
    crops = [(0, 0, across, down), (canvas - across, canvas - down, canvas, canvas)]
    return [(0, 0, canvas, canvas), *tiles, *crops]


def canvas_side(side: int) -> int:
    """Side of the canvas in pixels, for views of side S."""
    return round(CANVAS_RATIO * side)


def view_boxes(width: int, height: int, side: int) -> torch.Tensor:
    """Each view's box in the photo: float32 [12, 4] as x0, y0, x1, y1 in [0, 1]."""
    return _view_boxes(width, height, side).clone()


@lru_cache(KEPT_SIZES)
def _view_boxes(width: int, height: int, side: int) -> torch.Tensor:
    return torch.tensor(canvas_boxes(width, height, side), dtype=torch.float32) / canvas_side(side)


def useful_views(width: int, height: int, side: int, num_views: int = NUM_VIEWS) -> torch.Tensor:
    """Which views show pixels that no coarser view shows at full scale: bool [num_views].

    From coarse to fine:

    - The global view always counts. If the photo is no larger than a view, it has every pixel, and the others would
      only enlarge them.
    - The crops of a square photo are the same as the global view.
    - If the short side is no longer than a view, the crops have every pixel of their squares, and the tiles inside them
      add nothing: all of them up to an aspect of 2, all but the middle ones up to 2.5.

    Args:
        width: Width of the photo in pixels.
        height: Height of the photo in pixels.
        side: View side S in pixels.
        num_views: Number of views, from the first.
    """
    return _useful_views(width, height, side, num_views).clone()


@lru_cache(KEPT_SIZES)
def _useful_views(width: int, height: int, side: int, num_views: int) -> torch.Tensor:
    useful = torch.full((NUM_VIEWS,), max(width, height) > side)
    useful[0] = True
    useful[CROPS] &= width != height
    if min(width, height) <= side and num_views == NUM_VIEWS:
        useful[TILES] &= ~_inside_crops(view_boxes(width, height, side))
    return useful[:num_views]


def _inside_crops(boxes: torch.Tensor) -> torch.Tensor:
    """Which tiles lie inside the crops, of all boxes [12, 4]: bool [9]."""
    tiles, (first, last) = boxes[TILES], boxes[CROPS]
    inside_first = (tiles[:, 2:] <= first[2:]).all(dim=1)
    inside_last = (tiles[:, :2] >= last[:2]).all(dim=1)
    they_meet = (first[2:] >= last[:2]).all()
    return inside_first | inside_last | they_meet


def extract_views(
    image: np.ndarray, side: int, num_views: int = NUM_VIEWS, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """Cut the useful views from the photo, which is resized once, to the canvas.

    Tiles are slices of the canvas; the other views are resized from it. All nine tiles share one scale, so none of
    their pixels is resampled twice. The global view and the crops are resampled twice: they match a resize from the
    photo itself at 52 dB PSNR or better, in a sixth of the time.

    Args:
        image: uint8 [H, W, 3], RGB, contiguous.
        side: View side S in pixels, a multiple of 16.
        num_views: Number of views V, from the first; 1 is the global view alone.
        size: Width and height of the photo in pixels, where `image` was decoded smaller.

    Returns:
        uint8 [V, 3, S, S], channels last in memory; zeros where a view is not useful.
    """
    width, height = size or (image.shape[1], image.shape[0])
    useful = useful_views(width, height, side, num_views)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    if max(width, height) <= side:  # the global view alone, and no detour over a larger canvas
        views = _room_for(useful, side)
        views[0] = resize(pixels, side, side)
        return views
    lying, whole = width > height, canvas_side(side)
    canvas = resize(pixels, whole, whole)
    # The global view and both crops show the photo's whole short side, which is shrunk once for all three.
    strip = resize(canvas, side, whole) if lying else resize(canvas, whole, side)
    # Only now: the memory that the first resize has freed is about as large, and still in the processor's cache.
    views = _room_for(useful, side)
    # NumPy copies boxes of pixels two to three times as fast as torch does.
    rows, canvas_rows = views.movedim(-3, -1).numpy(), canvas.movedim(-3, -1).numpy()
    boxes = canvas_boxes(width, height, side)
    wanted = [number for number in range(num_views) if useful[number]]
    crops = [number for number in CROPS if number in wanted]
    # Views from the strip first, while it is in the processor's cache.
    rows[0] = resize(strip, side, side).movedim(-3, -1).numpy()
    for number, crop in zip(crops, _crops(strip, [boxes[number] for number in crops], side), strict=True):
        rows[number] = crop
    for number in TILES:
        if number in wanted:
            x0, y0, x1, y1 = boxes[number]
            rows[number] = canvas_rows[y0:y1, x0:x1]
    return views


def _crops(strip: torch.Tensor, boxes: list[tuple[int, int, int, int]], side: int) -> list[np.ndarray]:
    """Crops [S, S, 3] of a strip [3, S, W] or [3, H, S], in one resize: its filter takes a quarter of a crop's time."""
    if not boxes:
        return []
    rows, lying, number = strip.movedim(-3, -1).numpy(), strip.shape[1] == side, len(boxes)
    parts = [rows[:, x0:x1] if lying else rows[y0:y1] for x0, y0, x1, y1 in boxes]
    along = 0 if lying else 1  # the axis that is not resized
    joined = torch.from_numpy(np.concatenate(parts, along)).movedim(-1, -3)
    shrunk = resize(joined, *((number * side, side) if lying else (side, number * side)))
    return np.split(shrunk.movedim(-3, -1).numpy(), number, along)


def _room_for(useful: torch.Tensor, side: int) -> torch.Tensor:
    """Memory for views, uint8 [V, 3, S, S], channels last; zeros where some are not useful [V]."""
    allocate = torch.empty if useful.all() else torch.zeros
    return allocate((len(useful), side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Antialiased Lanczos resize.

    Args:
        image: uint8 [3, H, W], channels last in memory: `interpolate` takes a third less time then.
        height: New height in pixels.
        width: New width in pixels.

    Returns:
        uint8 [3, height, width], channels last in memory.
    """
    channels_last = image.permute(1, 2, 0)
    if TORCH_LANCZOS:
        # The batch axis goes before the rows: before the channels, its stride would hide the memory layout.
        batch = channels_last[None].permute(0, 3, 1, 2)
        return F.interpolate(batch, (height, width), mode="lanczos", antialias=True)[0]
    resized = Image.fromarray(channels_last.numpy()).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
