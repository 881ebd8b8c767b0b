"""Outlines of objects as COCO writes them, and the mask that they make."""

from __future__ import annotations

import io
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask
from PIL import Image

from pipeline.data.photo import BadPhoto, open_header, turn
from pipeline.data.photo_files import read_file

FARTHEST_PX = 1e9  # a coordinate beyond it is damage
# Margin around the photo that holds the edges which clipping adds, so that they are not drawn.
CLIP_MARGIN_PX = 1.0
LONGEST_RUN_BITS = 40  # of a number in the run lengths; photos have fewer pixels
ZLIB_LEVEL = 1  # areas of one value: higher levels save little and take longer


class BadOutline(ValueError):
    """The outline of an object is malformed; the message says how, in a few words."""


@dataclass(frozen=True)
class CocoMask:
    """A mask that is drawn when it is read, in whatever process."""

    photo: str
    """Path of the photo, whose header says how it is turned."""
    width: int
    height: int
    """Pixels, as the annotations have them."""
    objects: tuple[tuple[int, str], ...]
    """Value in the mask and run lengths in COCO's compressed form; later objects lie over earlier ones."""

    def read(self) -> bytes:
        """Draw the mask as a grey PNG, upright like the decoded photo.

        COCO counts pixels as they are stored, but many tools annotate what a viewer shows, which EXIF may have
        turned. Where the two differ in size, the annotations' size tells which was annotated. Where they have the same
        size, nothing tells, and the photo is refused unless no object is drawn.

        Raises:
            OSError: The photo cannot be read.
            BadPhoto: It is no photo, has another size than the annotations, or its EXIF leaves open which way the
                outlines lie.
        """
        header = open_header(read_file(self.photo))
        upright, stored, orientation = header.size, header.stored_size, header.orientation
        annotated = (self.width, self.height)
        if annotated not in (stored, upright):
            sizes = f"{self.width}x{self.height}, the photo is {upright[0]}x{upright[1]}"
            raise BadPhoto(f"the annotations are of another size: {sizes}")
        if self.objects and orientation != 1 and stored == upright:
            raise BadPhoto(f"EXIF turns the photo, and nothing says whether the outlines turn too: {orientation}")
        mask = Image.fromarray(self._draw())
        if annotated != upright:
            mask = turn(mask, orientation)
        with io.BytesIO() as stream:
            mask.save(stream, "PNG", compress_level=ZLIB_LEVEL)
            return stream.getvalue()

    def _draw(self) -> np.ndarray:
        """The mask in the annotations' orientation: uint8 [height, width]."""
        columns = np.zeros(self.width * self.height, dtype=np.uint8)  # runs go down the columns
        for value, counts in self.objects:
            ends = np.cumsum(decode_runs(counts)).tolist()
            for start, end in zip(ends[0::2], ends[1::2], strict=False):  # background comes first
                columns[start:end] = value
        return np.ascontiguousarray(columns.reshape(self.width, self.height).T)


def encode_outline(segmentation: Any, width: int, height: int) -> str | None:
    """Bring polygons or run lengths into COCO's compressed form, clipped to the photo.

    Args:
        segmentation: List of polygons [x1, y1, x2, y2, ...], or {"size": [height, width], "counts": ...} with run
            lengths as numbers or compressed.
        width: Width of the photo in pixels.
        height: Height of the photo in pixels.

    Returns:
        None if there is no outline.

    Raises:
        BadOutline: The outline is malformed.
    """
    if isinstance(segmentation, dict):
        return _encode_runs(segmentation, width, height)
    if not isinstance(segmentation, list | tuple | None):
        raise BadOutline(f"{type(segmentation).__name__} instead of polygons or run lengths")
    # Some tools leave empty polygons behind.
    polygons = [_read_polygon(part) for part in segmentation or () if not isinstance(part, Sized) or len(part)]
    if not polygons:
        return None
    visible = [clipped for polygon in polygons if len(clipped := _clip(polygon, width, height))]
    if not visible:
        return _compress([width * height], width, height)
    parts = pycocotools.mask.frPyObjects([polygon.ravel().tolist() for polygon in visible], height, width)
    return pycocotools.mask.merge(parts)["counts"].decode()


def decode_runs(counts: str) -> list[int]:
    """Run lengths from COCO's compressed form: background first, then alternating, down the columns.

    Each number is written in characters of six bits from "0" on, low ones first: five bits of a number in two's
    complement, and one that says whether more follow. From the fourth run on it is the difference to the run two
    before.

    Raises:
        BadOutline: The string is not of this form.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64:
            raise BadOutline(f"character {character!r} in the run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if shift > LONGEST_RUN_BITS:
            raise BadOutline("a number in the run lengths without end")
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise BadOutline("the run lengths end within a number")
    return runs


def area(counts: str, width: int, height: int) -> int:
    """Pixels inside an outline in COCO's compressed form."""
    return int(pycocotools.mask.area({"size": [height, width], "counts": counts}))


def _encode_runs(segmentation: dict[str, Any], width: int, height: int) -> str:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if isinstance(counts, list) and all(isinstance(run, float) and run.is_integer() for run in counts):
        counts = [int(run) for run in counts]
    if size != [height, width]:
        raise BadOutline(f"run lengths for size {size!r}, not [{height}, {width}]")
    if isinstance(counts, str):
        runs = decode_runs(counts)
    elif isinstance(counts, list) and all(isinstance(run, int) for run in counts):
        runs = counts
    else:
        raise BadOutline("the run lengths are neither whole numbers nor a string")
    if min(runs, default=-1) < 0 or sum(runs) != width * height:
        raise BadOutline("the run lengths do not add up to the size")
    return counts if isinstance(counts, str) else _compress(runs, width, height)


def _compress(runs: Sequence[int], width: int, height: int) -> str:
    return pycocotools.mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"].decode()


def _read_polygon(numbers: Any) -> np.ndarray:
    """Points of a polygon, float64 [N, 2]."""
    try:
        points = np.asarray(numbers, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadOutline("a polygon holds something other than numbers") from error
    if points.ndim != 1 or len(points) < 6 or len(points) % 2:
        raise BadOutline(f"a polygon of {points.size} numbers")
    if not (np.abs(points) < FARTHEST_PX).all():  # NaN is not below anything either
        raise BadOutline("a polygon has a point that is nowhere")
    return points.reshape(-1, 2)


def _clip(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Cut a polygon, [N, 2], at the photo's four sides (Sutherland & Hodgman 1974, "Reentrant polygon clipping").

    The rasterizer itself would walk the whole length of an edge, however far it leads outside.
    """
    low, high = -CLIP_MARGIN_PX, np.array([width, height]) + CLIP_MARGIN_PX
    if ((points >= low) & (points <= high)).all():
        return points
    for axis, bound, inwards in ((0, low, 1), (0, high[0], -1), (1, low, 1), (1, high[1], -1)):
        following = np.roll(points, -1, axis=0)
        depth, next_depth = inwards * (points[:, axis] - bound), inwards * (following[:, axis] - bound)
        crosses = (depth >= 0) != (next_depth >= 0)
        share = np.divide(depth, depth - next_depth, out=np.zeros_like(depth), where=crosses)
        cuts = points + share[:, None] * (following - points)
        # For each edge, the first point if it is inside, then the point where the edge crosses the side.
        both = np.stack([points, cuts], axis=1).reshape(-1, 2)
        points = both[np.stack([depth >= 0, crosses], axis=1).ravel()]
    return points
