"""COCO annotations: masks equal the format's own tool, labels, metadata, and what becomes of broken files."""

from __future__ import annotations

import io
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

from data_prep.metadata import parse
from data_prep.sources import CocoMask, content_from_json, content_to_json, open_source
from data_prep.sources.coco import CATEGORIES
from data_prep.sources.outlines import BadOutline, decode_runs, encode_outline
from pipeline.data.photo import BadPhoto, decode
from pipeline.data.vocabulary import MASK_CLASSES
from pipeline.errors import UserError
from tests.data_prep.photos import encode, jpeg

WIDTH, HEIGHT = 96, 64
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
CATEGORY_IDS = {"Cone": 4, "Barrier": 8, "Worker": 18, "Work Vehicle": 9, "Bike Lane": 15}
ROADWORK_CATEGORIES = (
    "Police Officer", "Police Vehicle", "Sidewalk", "Cone", "Fence", "Drum", "Barricade", "Barrier", "Work Vehicle",
    "Vertical Panel", "Tubular Marker", "Arrow Board", "Temporary Traffic Control Message Board", "Road", "Bike Lane",
    "Temporary Traffic Control Sign", "Work Equipment", "Worker", "Other Roadwork Objects",
    "Temporary Traffic Control Sign: left arrow",
)  # fmt: skip


def image_of(number: int, **extra: Any) -> dict[str, Any]:
    """An entry of `images`."""
    return {"id": number, "file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT, **extra}


def object_of(image: int, category: str, segmentation: Any, number: int = 1) -> dict[str, Any]:
    """An entry of `annotations`."""
    return {
        "id": number, "image_id": image, "category_id": CATEGORY_IDS[category], "segmentation": segmentation,
        "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0,
    }  # fmt: skip


def write_coco(folder: Path, images: list[Any], annotations: list[Any], categories: Any = None) -> Path:
    """A photo for each image with a plain name, and the annotations' file."""
    for entry in images:
        name = entry["file_name"]
        if name.isascii() and name.endswith(".jpg") and len(name) < 10:
            (folder / name).write_bytes(jpeg(entry["id"]))
    listed = categories or [{"id": number, "name": name} for name, number in CATEGORY_IDS.items()]
    file = folder / "annotations.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": listed}))
    return file


def only_input(folder: Path, image: dict[str, Any], annotations: list[Any]) -> Any:
    """The one input of a set of one image."""
    (item,) = open_source(folder, write_coco(folder, [image], annotations))
    return item


def pixels_of(png: bytes) -> np.ndarray:
    """Values of a mask."""
    picture = Image.open(io.BytesIO(png))
    assert (picture.format, picture.mode) == ("PNG", "L")
    return np.asarray(picture)


def drawn(segmentation: Any, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """What an outline covers, bool [height, width], by the runs that we decode."""
    flat = np.zeros(width * height, dtype=bool)
    counts = encode_outline(segmentation, width, height)
    ends = np.cumsum(decode_runs(counts or ""))
    for start, end in zip(ends[0::2], ends[1::2], strict=False):
        flat[start:end] = True
    return flat.reshape(width, height).T


def blob(seed: int, radius: float, points: int = 20) -> list[float]:
    """A star-shaped polygon around the middle of the photo."""
    random = np.random.default_rng(seed)
    angles = np.sort(random.uniform(0, 2 * np.pi, points))
    radii = radius * random.uniform(0.4, 1.0, points)
    corners = np.stack([WIDTH / 2 + radii * np.cos(angles), HEIGHT / 2 + radii * np.sin(angles)], axis=1)
    return corners.ravel().tolist()


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
    "size", [(40_000, 40_000), (0, 64), (-96, -64), ("96", "64"), (None, None), (96.5, 64), (10**12, 1)]
)
def test_impossible_sizes_are_refused_before_anything_is_drawn(tmp_path, size):
    entry = image_of(1, width=size[0], height=size[1])
    item = only_input(tmp_path, entry, [object_of(1, "Cone", [SQUARE])])
    assert item.photo is None
    assert item.problem.startswith("malformed annotations: ")


def test_the_label_is_the_images_own_or_follows_from_its_objects(tmp_path):
    images = [image_of(1), image_of(2), image_of(3), image_of(4, label=0), image_of(5, label=None)]
    annotations = [object_of(number, "Cone", [SQUARE]) for number in (1, 4, 5)] + [object_of(2, "Bike Lane", [SQUARE])]
    items = list(open_source(tmp_path, write_coco(tmp_path, images, annotations)))
    assert [item.fields["label"] for item in items] == [1, 0, 0, 0, None]


def test_a_mask_is_given_where_everything_is_outlined_and_nowhere_else(tmp_path):
    images = [image_of(number) for number in range(1, 5)]
    images += [image_of(5, label=1), image_of(6, label=None), image_of(7, label="None"), image_of(8, label="what")]
    box_only = object_of(4, "Worker", [])
    del box_only["segmentation"]
    annotations = [
        object_of(1, "Cone", [SQUARE, []]),
        object_of(2, "Bike Lane", []),
        object_of(3, "Cone", [SQUARE]),
        object_of(3, "Worker", [[]]),
        object_of(4, "Cone", [SQUARE]),
        box_only,
    ]
    items = list(open_source(tmp_path, write_coco(tmp_path, images, annotations)))
    assert [item.mask is not None for item in items] == [True, True, False, False, False, False, True, False]
    assert not pixels_of(items[1].mask.read()).any()


def test_every_category_of_roadwork_has_a_place(tmp_path, capsys):
    assert set(CATEGORIES.values()) == {*MASK_CLASSES, None}
    categories = [{"id": number, "name": name} for number, name in enumerate(ROADWORK_CATEGORIES)]
    annotations = [
        {"id": number, "image_id": number, "category_id": number, "segmentation": [SQUARE]}
        for number in range(len(categories))
    ]
    images = [image_of(number) for number in range(len(categories))]
    items = list(open_source(tmp_path, write_coco(tmp_path, images, annotations, categories)))
    assert capsys.readouterr().err == ""
    found = {
        name: int(pixels_of(item.mask.read())[20, 20]) for name, item in zip(ROADWORK_CATEGORIES, items, strict=True)
    }
    assert found["Cone"] == found["Tubular Marker"] == 1
    assert found["Barricade"] == found["Fence"] == 2
    assert found["Temporary Traffic Control Sign"] == found["Temporary Traffic Control Sign: left arrow"] == 3
    assert (found["Worker"], found["Work Vehicle"], found["Work Equipment"]) == (4, 5, 6)
    assert found["Police Officer"] == found["Bike Lane"] == 0


def test_unknown_categories_are_counted_and_named_once(tmp_path, capsys):
    categories = [{"id": 1, "name": "TRAFFIC_CONE"}, {"id": 2, "name": "Dragon"}, {"id": 3, "name": "Elf"}]
    annotations = [
        {"id": number, "image_id": 1, "category_id": category, "segmentation": [SQUARE]}
        for number, category in enumerate([1, 2, 2])
    ]
    source = open_source(tmp_path, write_coco(tmp_path, [image_of(1)], annotations, categories))
    (item,) = source
    list(source)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "'Dragon' (2 objects), 'Elf' (0 objects)" in said
    assert set(np.unique(pixels_of(item.mask.read()))) == {0, 1}


def test_what_images_carry_beside_cocos_keys_is_metadata(tmp_path):
    extra = {
        "gps": [39.77160604, -86.18823935],
        "city_name": "indianapolis",
        "scene_description": "Cones close the right lane.",
        "video_info": {"vid_id": "v7", "seq_id": 3, "frame_id": "1"},
        "scene_level_tags": {
            "weather": ["Sunny", "Wet"], "daytime": "Light", "scene_environment": "Urban",
            "travel_alteration": ["Partially Blocked"],
        },
    }  # fmt: skip
    parsed = parse(only_input(tmp_path, image_of(1, **extra), [object_of(1, "Cone", [SQUARE])]).fields)
    assert parsed.metadata.gps == (39.77160604, -86.18823935)
    assert parsed.metadata.weather == ("sunny", "wet")
    assert (parsed.metadata.daytime, parsed.metadata.scene, parsed.metadata.city) == ("light", "urban", "indianapolis")
    assert parsed.metadata.description == "Cones close the right lane."
    assert (parsed.label, parsed.video) == (1, "video v7")


def test_every_entry_and_every_photo_is_accounted_for(tmp_path):
    names = ["../outside.jpg", "/etc/hostname", "x" * 300 + ".jpg", "\ud800.jpg", "gone.jpeg"]
    images = [image_of(1), image_of(2), image_of(2, file_name="3.jpg"), image_of(4, file_name="./1.jpg")]
    images += [image_of(10 + number, file_name=name) for number, name in enumerate(names)]
    annotations = [object_of(number, "Cone", [SQUARE]) for number in (1, 77, 77, 78)]
    file = write_coco(tmp_path, images, annotations)
    (tmp_path / "3.jpg").write_bytes(jpeg(3))
    (tmp_path / "extra.jpg").write_bytes(jpeg(4))
    source = open_source(tmp_path, file)
    items = list(source)
    assert source.total == len(items) == 12
    assert [(item.name, item.problem) for item in items] == [
        ("1.jpg", ""),
        ("2.jpg", "several images have the same id: 2"),
        ("3.jpg", "several images have the same id: 2"),
        ("1.jpg", "an earlier image has the same file name"),
        *[(name, "the photo is missing") for name in names],
        ("annotations.json#77", "the annotations are of an image that is not listed"),
        ("annotations.json#78", "the annotations are of an image that is not listed"),
        ("extra.jpg", "no image in annotations.json"),
    ]
    assert all(json.loads(json.dumps(item.name).encode()) == item.name for item in items)


def test_an_object_of_no_listed_category_is_a_reject(tmp_path):
    item = only_input(tmp_path, image_of(1), [{"id": 5, "image_id": 1, "category_id": 99, "segmentation": [SQUARE]}])
    assert item.problem == "malformed annotations: category 99 is not listed (annotation 5)"


def test_the_stamp_changes_with_photos_and_annotations(tmp_path):
    file = write_coco(tmp_path, [image_of(1)], [])
    before = open_source(tmp_path, file).stamp()
    assert open_source(tmp_path, file).stamp() == before
    write_coco(tmp_path, [image_of(1)], [object_of(1, "Cone", [SQUARE])])
    between = open_source(tmp_path, file).stamp()
    (tmp_path / "1.jpg").write_bytes(jpeg(5))
    assert len({before, between, open_source(tmp_path, file).stamp()}) == 3


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "are not JSON"),
        ("\xff", "are not JSON"),
        ("[" * 100_000, "are not JSON"),
        ("[]", "images is missing"),
        ('{"images": [], "categories": []}', "annotations is missing"),
        ('{"images": [], "categories": [], "annotations": []}', "lists no images"),
        ('{"images": [7], "categories": [], "annotations": []}', "entry 0 of the images in .* has no usable id"),
        (
            '{"images": [{"id": 1}], "categories": [], "annotations": []}',
            "entry 0 of the images .* no usable file_name",
        ),
        ('{"images": [], "categories": [{"id": 1}], "annotations": []}', "entry 0 of the categories .* no usable name"),
        (
            '{"images": [], "categories": [], "annotations": [{"segmentation": [], "category_id": 1}]}',
            "entry 0 of the annotations .* no usable image_id",
        ),
        (
            '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [],'
            ' "categories": [{"id": 1, "name": "Cone"}, {"id": 1, "name": "Worker"}]}',
            "two categories with the id 1",
        ),
    ],
)
def test_broken_files_are_the_users_mistake(tmp_path, content, sentence):
    file = tmp_path / "a.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=sentence):
        open_source(tmp_path, file)
