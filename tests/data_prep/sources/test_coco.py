"""COCO annotations: labels, masks, metadata, and what becomes of broken files."""

from __future__ import annotations

import json
import math
import random
from contextlib import suppress

import pytest
from PIL import Image

from data_prep.sources.coco import CATEGORIES
from data_prep.sources.metadata import parse
from data_prep.sources.opening import open_source
from pipeline.data.photo import BadPhoto
from pipeline.errors import UserError
from pipeline.names import MASK_CLASSES
from tests.data_prep.examples import encode, jpeg, pixels
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


def test_the_size_is_that_of_the_photo_where_the_file_has_none(tmp_path):
    images = [image_of(1, width=None, height=None), image_of(2), image_of(3, width=96.0, height=64.0)]
    images += [image_of(4, width=math.nan, height=""), image_of(5, width="96", height=None)]
    del images[1]["width"], images[1]["height"]
    annotations = [object_of(number, "Cone", [SQUARE]) for number in range(1, 6)]
    masks = [item.mask.read() for item in open_source(tmp_path, write_coco(tmp_path, images, annotations))]
    assert len(set(masks)) == 1
    assert pixels_of(masks[0]).shape == (64, 96)


def test_without_a_size_nothing_tells_how_the_outlines_of_a_turned_photo_lie(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = write_coco(tmp_path, [image_of(n, width=None, height=None) for n in (1, 2, 3)], [object_of(1, "Cone", [])])
    for number in (1, 2):
        (tmp_path / f"{number}.jpg").write_bytes(encode(pixels(number), exif=exif))
    (tmp_path / "3.jpg").write_bytes(b"no photo")
    first, second, third = open_source(tmp_path, file)
    assert "malformed annotations: EXIF turns the photo, and without width and height" in first.problem
    assert pixels_of(second.mask.read()).shape == (96, 64)
    assert (third.problem, third.mask) == ("", None)  # whoever reads it says why


def test_ids_that_a_table_turned_into_floats_are_the_same_ids(tmp_path):
    images = [image_of(1), image_of(2)]
    annotations = [object_of(1, "Cone", [SQUARE]), object_of(2, "Worker", [SQUARE])]
    file = write_coco(tmp_path, images, annotations)
    content = json.loads(file.read_text())
    for entries, keys in (("images", ["id"]), ("annotations", ["image_id", "category_id"])):
        for entry in content[entries]:
            entry.update({key: float(entry[key]) for key in keys})
    runs = {"size": [64.0, 96.0], "counts": [5.0, 5.0, 64.0 * 96 - 10]}
    content["annotations"].append({"id": 3.0, "image_id": 2.0, "category_id": 4.0, "segmentation": runs})
    file.write_text(json.dumps(content))
    first, second = open_source(tmp_path, file)
    assert (first.problem, second.problem) == ("", "")
    assert sorted(set(pixels_of(second.mask.read()).ravel())) == [0, 1, 4]


@pytest.mark.parametrize(
    ("key", "value"), [("id", 1.5), ("id", True), ("id", None), ("id", [1]), ("file_name", None), ("file_name", {})]
)
def test_an_entry_without_a_usable_key_is_named(tmp_path, key, value):
    file = write_coco(tmp_path, [image_of(1), image_of(2)], [])
    content = json.loads(file.read_text())
    content["images"][1][key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"entry 1 of the images in .* has no usable {key}"):
        open_source(tmp_path, file)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_annotations_are_read_in_the_encodings_of_tables(tmp_path, encoding):
    (tmp_path / "é.jpg").write_bytes(jpeg(1))
    file = write_coco(tmp_path, [image_of(1, file_name="é.jpg", city_name="Orléans")], [])
    file.write_bytes(json.dumps(json.loads(file.read_text()), ensure_ascii=False).encode(encoding))
    (item,) = open_source(tmp_path, file)
    assert (item.name, item.fields["city"]) == ("é.jpg", "Orléans")


def test_deep_nesting_doubled_keys_and_endless_numbers_are_one_sentence(tmp_path):
    file = write_coco(tmp_path, [image_of(1)], [])
    sound = file.read_text()
    for depth, sentence in ((40, "entry 0 of the images .* nested more than"), (100_000, "nested too deeply")):
        file.write_text(sound.replace('"id": 1,', '"id": 1, "deep": ' + '{"a":' * depth + "1" + "}" * depth + ",", 1))
        with pytest.raises(UserError, match=sentence):
            open_source(tmp_path, file)
    file.write_text(sound.replace('"id": 1,', '"id": 1, "id": 2,', 1))
    with pytest.raises(UserError, match="the key 'id' twice"):
        open_source(tmp_path, file)
    runs = {"size": [64, 96], "counts": "o" * 5_000_000}
    file = write_coco(tmp_path, [image_of(1)], [object_of(1, "Cone", runs)])
    (item,) = open_source(tmp_path, file)
    assert "a number in the run lengths without end" in item.problem


@pytest.mark.parametrize("seed", range(15))
def test_random_mutations_are_inputs_or_one_sentence(tmp_path, seed):
    pick = random.Random(seed)
    images = [image_of(number, gps="[1.5, 2.5]") for number in range(1, 4)]
    annotations = [object_of(number, "Cone", [SQUARE]) for number in range(1, 4)]
    runs = {"size": [64, 96], "counts": [10, 20, 64 * 96 - 30]}
    file = write_coco(tmp_path, images, [*annotations, object_of(2, "Worker", runs)])
    sound = file.read_text()
    odd = [None, True, -1, 0, 1.5, 10**30, math.inf, math.nan, "", "x", [], {}, [[]], {"a": [1]}, "1" * 300, [SQUARE]]
    for _ in range(10):
        content = json.loads(sound)
        for _ in range(pick.randint(1, 3)):
            holder = pick.choice([content, *(entry for name in content for entry in content[name])])
            if isinstance(holder, dict) and holder:
                holder[pick.choice(list(holder))] = pick.choice(odd)
            content = content if all(isinstance(content[name], list) for name in content) else json.loads(sound)
        file.write_text(json.dumps(content))
        sentence = ""
        try:
            for item in open_source(tmp_path, file):
                if item.mask is not None:
                    with suppress(BadPhoto):
                        item.mask.read()
        except UserError as error:
            sentence = str(error)
        assert "\n" not in sentence
