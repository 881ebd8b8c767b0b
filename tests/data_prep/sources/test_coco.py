"""COCO annotations: labels, masks, metadata, and what becomes of broken files."""

from __future__ import annotations

import json

import pytest

from data_prep.sources.coco import CATEGORIES
from data_prep.sources.metadata import parse
from data_prep.sources.opening import open_source
from pipeline.errors import UserError
from pipeline.names import MASK_CLASSES
from tests.data_prep.examples import jpeg
from tests.data_prep.sources.annotations import SQUARE, image_of, object_of, only_input, pixels_of, write_coco

ROADWORK_CATEGORIES = (
    "Police Officer", "Police Vehicle", "Sidewalk", "Cone", "Fence", "Drum", "Barricade", "Barrier", "Work Vehicle",
    "Vertical Panel", "Tubular Marker", "Arrow Board", "Temporary Traffic Control Message Board", "Road", "Bike Lane",
    "Temporary Traffic Control Sign", "Work Equipment", "Worker", "Other Roadwork Objects",
    "Temporary Traffic Control Sign: left arrow",
)  # fmt: skip


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


@pytest.mark.parametrize("plural", ["", "s"])
def test_every_category_of_roadwork_has_a_place(tmp_path, capsys, plural):
    assert set(CATEGORIES.values()) == {*MASK_CLASSES, None}
    names = [name if ":" in name else name + plural for name in ROADWORK_CATEGORIES]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
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
    assert parse(item.fields).unknown == (("category", "Dragon"), ("category", "Dragon"))


def test_an_object_of_an_unknown_category_leaves_mask_and_implied_label_open(tmp_path):
    categories = [{"id": 4, "name": "Cone"}, {"id": 5, "name": "Bike Lane"}, {"id": 6, "name": "Dragon"}]
    images = [image_of(1), image_of(2), image_of(3, label=0), image_of(4), image_of(5)]
    objects = [(1, 6), (2, 6), (2, 4), (3, 6), (4, 5)]
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "segmentation": [SQUARE]}
        for number, (image, category) in enumerate(objects)
    ]
    items = list(open_source(tmp_path, write_coco(tmp_path, images, annotations, categories)))
    assert [item.fields["label"] for item in items] == [None, 1, 0, 0, 0]
    assert [item.mask is not None for item in items] == [False, False, False, True, True]
    assert [item.fields.get("category") for item in items] == [["Dragon"], ["Dragon"], ["Dragon"], None, None]


def test_ids_are_the_same_as_numbers_and_as_strings(tmp_path):
    categories = [{"id": "4", "name": "Cone"}, {"id": 5, "name": "Worker"}]
    annotations = [
        {"id": 1, "image_id": "0", "category_id": 4, "segmentation": [SQUARE]},
        {"id": 2, "image_id": 7, "category_id": "5", "segmentation": [SQUARE]},
    ]
    images = [image_of(0), image_of(7) | {"id": "7"}]
    source = open_source(tmp_path, write_coco(tmp_path, images, annotations, categories))
    items = list(source)
    assert source.total == len(items) == 2
    assert [int(pixels_of(item.mask.read())[20, 20]) for item in items] == [1, 4]
    twins = [image_of(7), image_of(7) | {"id": "7", "file_name": "0.jpg"}]
    source = open_source(tmp_path, write_coco(tmp_path, twins, annotations[1:], categories))
    assert [item.problem for item in source] == ["several images have the same id: 7"] * 2


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
