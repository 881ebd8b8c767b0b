"""Outlines of COCO: what they cover equals the format's own tool, masks lie like their photo, damage is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from matplotlib.path import Path as Outline
from PIL import Image

from data_prep.sources.content import content_from_json, content_to_json
from data_prep.sources.opening import open_source
from data_prep.sources.outlines import BadOutline, CocoMask, decode_runs, encode_outline
from pipeline.data.photo import BadPhoto, decode
from pipeline.names import MASK_CLASSES
from tests.data_prep.examples import encode
from tests.data_prep.sources.annotations import (
    HEIGHT,
    SQUARE,
    WIDTH,
    blob,
    image_of,
    object_of,
    only_input,
    pixels_of,
    write_coco,
)


def drawn(segmentation: Any, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """What an outline covers, bool [height, width], by the runs that we decode."""
    flat = np.zeros(width * height, dtype=bool)
    counts = encode_outline(segmentation, width, height)
    ends = np.cumsum(decode_runs(counts or ""))
    for start, end in zip(ends[0::2], ends[1::2], strict=False):
        flat[start:end] = True
    return flat.reshape(width, height).T


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in the tool's own decode
@pytest.mark.parametrize("seed", range(5))
def test_a_polygon_covers_what_cocos_own_tool_says(seed):
    polygons = [blob(seed, 30), blob(seed + 100, 20)]
    parts = pycocotools.mask.frPyObjects(polygons, HEIGHT, WIDTH)
    expected = pycocotools.mask.decode(pycocotools.mask.merge(parts))
    assert np.array_equal(drawn(polygons), expected)
    assert 100 < expected.sum() < expected.size


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("radius", [90, 3e3, 5e8])
def test_a_polygon_that_leads_outside_is_clipped(seed, radius):
    polygon = blob(seed, radius, points=7)
    columns, rows = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    centres = np.stack([columns.ravel(), rows.ravel()], axis=1)
    inside = Outline(np.array(polygon).reshape(-1, 2)).contains_points(centres).reshape(HEIGHT, WIDTH)
    # Pixels that an edge crosses may fall either way: few edges cross the photo.
    assert (drawn([polygon]) != inside).mean() < 0.03


def test_a_polygon_outside_the_photo_covers_nothing():
    assert not drawn([[200, 10, 230, 10, 230, 30]]).any()
    assert not drawn([[-50, -60, -20, -60, -20, -10]]).any()


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_run_lengths_survive_compressed_and_not(density):
    cells = np.random.default_rng(0).random((HEIGHT, WIDTH)) < density
    compressed = pycocotools.mask.encode(np.asfortranarray(cells.astype(np.uint8)))
    size, counts = [HEIGHT, WIDTH], compressed["counts"].decode()
    assert np.array_equal(drawn({"size": size, "counts": counts}), cells)
    column_order = cells.T.ravel()
    changes = np.flatnonzero(np.diff(column_order)) + 1
    runs = np.diff([0, *changes, column_order.size]).tolist()
    runs = [0, *runs] if column_order[0] else runs
    assert np.array_equal(drawn({"size": size, "counts": runs}), cells)
    assert decode_runs(counts) == runs


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 2, 3]], "a polygon of 3 numbers"),
        ([[1, 2, 3, 4]], "a polygon of 4 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
        ([1, 2, 3, 4, 5, 6], "a polygon of 1 numbers"),
        ([[[1, 2], [3, 4], [5, 6]]], "a polygon of 6 numbers"),
        ([["a", 2, 3, 4, 5, 6]], "something other than numbers"),
        ([[None, 2, 3, 4, 5, 6]], "nowhere"),
        ([[float("nan"), 2, 3, 4, 5, 6]], "nowhere"),
        ([[1, 2, 3, float("inf"), 5, 6]], "nowhere"),
        ([[1, 2, 3, 4, 1e300, 6]], "nowhere"),
        ([[10**400, 2, 3, 4, 5, 6]], "something other than numbers"),
        ("polygon", "str instead of polygons"),
        ({"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}, "run lengths for size"),
        ({"counts": [WIDTH * HEIGHT]}, "run lengths for size None"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 10]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": []}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [-1, WIDTH * HEIGHT + 1]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [0.5, WIDTH * HEIGHT - 0.5]}, "neither whole numbers nor a string"),
        ({"size": [HEIGHT, WIDTH]}, "neither whole numbers nor a string"),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "5:o"}, "end within a number"),
        ({"size": [HEIGHT, WIDTH], "counts": "é"}, "character 'é'"),
        ({"size": [HEIGHT, WIDTH], "counts": "5:Y3"}, "do not add up"),
    ],
)
def test_malformed_outlines_are_refused_and_so_is_their_photo(tmp_path, segmentation, reason):
    with pytest.raises(BadOutline, match=reason):
        encode_outline(segmentation, WIDTH, HEIGHT)
    item = only_input(tmp_path, image_of(1), [object_of(1, "Cone", segmentation, number=12)])
    assert item.photo is None
    assert item.problem.startswith("malformed annotations: ")
    assert item.problem.endswith("(annotation 12)")


def test_smaller_objects_lie_over_larger_ones_whatever_their_order(tmp_path):
    large, small = [5, 5, 60, 5, 60, 60, 5, 60], SQUARE
    masks = []
    for order in (1, -1):
        objects = [object_of(1, "Work Vehicle", [large]), object_of(1, "Worker", [small])][::order]
        masks.append(pixels_of(only_input(tmp_path, image_of(1), objects).mask.read()))
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[5:60, 5:60] = 1 + MASK_CLASSES.index("construction vehicle")
    expected[10:30, 10:30] = 1 + MASK_CLASSES.index("worker")
    assert np.array_equal(masks[0], expected)
    assert np.array_equal(masks[1], expected)


def test_a_mask_is_the_same_after_a_journey_and_at_every_reading(tmp_path):
    mask = only_input(
        tmp_path, image_of(1), [object_of(1, "Cone", [SQUARE]), object_of(1, "Worker", [blob(1, 20)])]
    ).mask
    assert isinstance(mask, CocoMask)
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert content_from_json(json.loads(json.dumps(content_to_json(mask)))) == mask
    assert mask.read() == mask.read()


def turned_photo(orientation: int, width: int, height: int) -> bytes:
    """Grey with a red rectangle at columns 8 to 40 and rows 16 to 24 of the stored pixels, and an EXIF orientation."""
    stored = np.full((height, width, 3), 90, dtype=np.uint8)
    stored[16:24, 8:40] = (230, 30, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(stored, quality=95, subsampling=0, exif=exif)


def annotate_turned(tmp_path: Path, orientation: int, size: Sequence[int], polygons: list[Any]) -> CocoMask:
    """A mask for the photo 1.jpg of the folder, as annotations of another size may have it."""
    entry = {"id": 1, "file_name": "1.jpg", "width": size[0], "height": size[1]}
    file = write_coco(tmp_path, [entry], [object_of(1, "Cone", [polygon]) for polygon in polygons])
    (tmp_path / "1.jpg").write_bytes(turned_photo(orientation, WIDTH, HEIGHT))
    (item,) = open_source(tmp_path, file)
    assert item.mask is not None
    return item.mask


def red(photo: bytes) -> np.ndarray:
    """Where a decoded photo is red."""
    return decode(photo)[..., 0].astype(int) - decode(photo)[..., 1] > 90


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_outlines_of_the_stored_pixels_turn_with_the_photo(tmp_path, orientation):
    rectangle = [8, 16, 40, 16, 40, 24, 8, 24]
    mask = annotate_turned(tmp_path, orientation, (WIDTH, HEIGHT), [rectangle]).read()
    assert np.array_equal(pixels_of(mask) == 1, red((tmp_path / "1.jpg").read_bytes()))
    assert pixels_of(mask).any()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_outlines_of_the_turned_photo_stay(tmp_path, orientation):
    rows, columns = np.nonzero(red(turned_photo(orientation, WIDTH, HEIGHT)))
    left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    rectangle = [int(number) for number in (left, top, right, top, right, bottom, left, bottom)]
    mask = annotate_turned(tmp_path, orientation, (HEIGHT, WIDTH), [rectangle]).read()
    assert np.array_equal(pixels_of(mask) == 1, red((tmp_path / "1.jpg").read_bytes()))


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_outlines_that_may_lie_either_way_are_refused_and_an_empty_mask_is_not(tmp_path, orientation):
    with pytest.raises(BadPhoto, match="EXIF turns the photo"):
        annotate_turned(tmp_path, orientation, (WIDTH, HEIGHT), [SQUARE]).read()
    assert not pixels_of(annotate_turned(tmp_path, orientation, (WIDTH, HEIGHT), []).read()).any()


def test_annotations_of_another_size_are_refused(tmp_path):
    with pytest.raises(BadPhoto, match="of another size: 48x32, the photo is 96x64"):
        annotate_turned(tmp_path, 1, (48, 32), [SQUARE]).read()
    with pytest.raises(BadPhoto, match="of another size: 64x96"):
        annotate_turned(tmp_path, 1, (64, 96), []).read()


def test_a_file_that_is_no_photo_is_refused_for_that(tmp_path):
    mask = annotate_turned(tmp_path, 1, (WIDTH, HEIGHT), [SQUARE])
    (tmp_path / "1.jpg").write_bytes(b"")
    with pytest.raises(BadPhoto, match="the file is empty"):
        mask.read()
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(OSError, match=r"1\.jpg"):
        mask.read()


@pytest.mark.parametrize(
    "size", [(40_000, 40_000), (0, 64), (-96, -64), ("96.5", "x"), (None, 63), (96.5, None), (96.5, 64), (10**12, 1)]
)
def test_impossible_sizes_are_refused_before_anything_is_drawn(tmp_path, size):
    entry = image_of(1, width=size[0], height=size[1])
    item = only_input(tmp_path, entry, [object_of(1, "Cone", [SQUARE])])
    assert item.photo is None
    assert item.problem.startswith("malformed annotations: ")
