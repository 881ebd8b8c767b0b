"""Metadata: the quirks of real tables become typed values or NULL, and nothing disappears without a count."""

from __future__ import annotations

import math

import pytest

from data_prep.sources.metadata import (
    BadLabel,
    explain_unlabelled,
    parse,
    parse_gps,
    parse_label,
    select_fields,
    split_in,
)
from pipeline.data.record import Metadata

NATIX_ROW = {
    "id": 7,
    "gps": "[39.77160604, -86.18823935]",
    "city_name": "indianapolis",
    "scene_description": "Cones block the right lane.",
    "video_info.frame_id": "00030",
    "video_info.seq_id": "2",
    "video_info.vid_id": "a9f3",
    "scene_level_tags.daytime": "Light",
    "scene_level_tags.scene_environment": "Urban",
    "scene_level_tags.travel_alteration": "['Partially Blocked']",
    "scene_level_tags.weather": "['Sunny']",
    "label": 1,
}


def test_a_row_of_the_natix_table_is_read_completely():
    parsed = parse(select_fields(NATIX_ROW))
    assert parsed.metadata == Metadata(
        gps=(39.77160604, -86.18823935),
        weather=("sunny",),
        daytime="light",
        scene="urban",
        city="indianapolis",
        description="Cones block the right lane.",
    )
    assert (parsed.label, parsed.video, parsed.split) == (1, "video a9f3", None)
    assert parsed.travel_alteration == ("partially blocked",)
    assert parsed.unknown == ()


def test_an_empty_row_is_all_null():
    parsed = parse({})
    assert parsed.metadata == Metadata()
    assert (parsed.label, parsed.video, parsed.split, parsed.unknown, parsed.gps_problem) == (
        None,
        None,
        None,
        (),
        None,
    )


@pytest.mark.parametrize("null", [None, "", "  ", "nan", "NaN", "None", "null", "N/A", math.nan])
def test_every_spelling_of_null_is_null_in_every_field(null):
    names = ("gps", "weather", "daytime", "scene", "city", "description", "video", "split")
    parsed = parse(dict.fromkeys(names, null))
    assert parsed.metadata == Metadata()
    assert (parsed.video, parsed.split, parsed.unknown, parsed.gps_problem) == (None, None, (), None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("['Sunny']", ("sunny",)),
        ('["Wet", "Sunny"]', ("sunny", "wet")),
        (["Rainy", "wet"], ("rainy", "wet")),
        ("PARTLY CLOUDY", ("partly cloudy",)),
        ("partly_cloudy; icy", ("partly cloudy", "icy")),
        ("[Foggy]", ("foggy",)),
        ("[]", None),
        ([], None),
        (["nan"], None),
        ([None, "Snowy"], ("snowy",)),
    ],
)
def test_weather_is_read_from_lists_and_from_strings_that_hold_them(value, expected):
    assert parse({"weather": value}).metadata.weather == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("['Partially Blocked', 'Lane Shift']", ("lane shift", "partially blocked")),
        ("['Lane Shift', 'Partially Blocked']", ("lane shift", "partially blocked")),
        ("Fully_Blocked", ("fully blocked",)),
        ("['None']", None),
        ("[]", None),
        (None, None),
    ],
)
def test_travel_alteration_is_words_in_one_order_or_null(value, expected):
    assert parse({"travel_alteration": value}).travel_alteration == expected


def test_unknown_words_are_counted_and_known_ones_beside_them_kept():
    parsed = parse({"weather": "['Sunny', 'Hail']", "daytime": "Noon", "scene": "Tunnel", "split": "holdout"})
    assert parsed.metadata.weather == ("sunny",)
    assert (parsed.metadata.daytime, parsed.metadata.scene, parsed.split) == (None, None, None)
    expected = {("weather", "Hail"), ("daytime", "Noon"), ("scene", "Tunnel"), ("split", "holdout")}
    assert set(parsed.unknown) == expected


def test_categories_that_a_source_does_not_know_are_counted_one_by_one():
    parsed = parse({"category": ["Dragon, green", "Dragon, green", "Elf"]})
    assert parsed.unknown == tuple(("category", name) for name in ("Dragon, green", "Dragon, green", "Elf"))
    assert select_fields({"category": "of a table, which means something else"}) == {}


def test_a_table_without_labels_is_explained():
    assert explain_unlabelled("a.csv", ["file_name", "LABEL "]) == "the column 'label' of a.csv is empty"
    sentence = "a.csv has no column 'label'; its columns are file_name, labels"
    assert explain_unlabelled("a.csv", ["file_name", "labels"]) == sentence


def test_weather_of_unknown_words_only_is_null_and_not_none_of_the_known_ones():
    assert parse({"weather": "['Hail']"}).metadata.weather is None


@pytest.mark.parametrize(
    ("fields", "expected", "problem"),
    [
        ({"gps": "[39.5, -86.25]"}, (39.5, -86.25), None),
        ({"gps": "(39.5, -86.25)"}, (39.5, -86.25), None),
        ({"gps": "39.5, -86.25"}, (39.5, -86.25), None),
        ({"gps": "['39.5', '-86.25']"}, (39.5, -86.25), None),
        ({"gps": [39.5, -86.25]}, (39.5, -86.25), None),
        ({"latitude": "39.5", "longitude": " -86.25"}, (39.5, -86.25), None),
        ({"gps": "[0.0, 0.0]"}, None, "zero"),
        ({"gps": [0, 0]}, None, "zero"),
        ({"gps": "[91.0, 100.0]"}, None, "out of range"),
        ({"gps": "[91.0, 10.0]"}, None, "out of range, perhaps latitude and longitude are swapped"),
        ({"gps": "[10.0, -181.0]"}, None, "out of range"),
        ({"gps": "[135.5, 34.69]"}, None, "out of range, perhaps latitude and longitude are swapped"),
        ({"gps": "[90.0, 180.0]"}, (90.0, 180.0), None),
        ({"gps": "[nan, nan]"}, None, None),
        ({"gps": [math.nan, math.nan]}, None, None),
        ({"gps": [39.5, math.nan]}, None, "with one number instead of two"),
        ({"gps": [39.5, math.inf]}, None, "not finite"),
        ({"gps": "somewhere"}, None, "unreadable"),
        ({"gps": "[39.5]"}, None, "with one number instead of two"),
        ({"gps": [1, 2, 3]}, (1.0, 2.0), None),
        ({"latitude": "39.5", "longitude": ""}, None, "with one number instead of two"),
        ({"latitude": "39.5"}, None, "with one number instead of two"),
        ({"latitude": "", "longitude": ""}, None, None),
    ],
)
def test_coordinates_are_a_place_or_null_with_a_reason(fields, expected, problem):
    assert parse_gps(fields) == (expected, problem)


ZEROS = (0, "0", "0.0", False, "FALSE", "no", "None", "No  roadwork")
ONES = (1, "1", 1.0, True, "true", " yes ", "Roadwork")
UNKNOWN = (None, "", " ", "nan", math.nan)


@pytest.mark.parametrize(
    ("value", "expected"),
    [*((v, 0) for v in ZEROS), *((v, 1) for v in ONES), *((v, None) for v in UNKNOWN)],
)
def test_labels_are_zero_one_or_unknown(value, expected):
    assert parse_label(value) == expected


@pytest.mark.parametrize("value", ["maybe", 2, -1, "0.5", "Roadworks?"])
def test_any_other_label_is_refused_by_its_value(value):
    with pytest.raises(BadLabel, match=f"label '{value}'".replace("?", r"\?")):
        parse_label(value)


def test_column_names_match_whatever_their_case_and_our_own_name_wins():
    assert select_fields({"LABEL": 1, "Lat": 2.0, "vid_id": "x", "weather": "Wet", "colour": "red"}) == {
        "label": 1,
        "latitude": 2.0,
        "weather": "Wet",
        "video": "x",
    }
    assert select_fields({"scene_level_tags.weather": "a", "weather": "b"}) == {"weather": "b"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"video": 7}, "video 7"),
        ({"video": 7.0}, "video 7"),  # a column with gaps, read as floats
        ({"video": " 7 ", "sequence": 3}, "video 7"),
        ({"video": math.nan, "sequence": 3}, "sequence 3"),
        ({"sequence": ""}, None),
    ],
)
def test_frames_share_their_video_or_else_their_sequence(fields, expected):
    assert parse(fields).video == expected


@pytest.mark.parametrize(
    ("word", "split"), [("train", "train"), ("Validation", "val"), ("TEST", "test"), ("dev", "val")]
)
def test_the_sources_own_split_is_understood(word, split):
    assert parse({"split": word}).split == split


ODD_CELLS = (
    "[{[]: 1}]", "['\\d']", "[" * 200 + "]" * 200, "[" + "9" * 5000 + "]", "(" + "(" * 5000 + ")", "[\ud800]",
    b"\xff", 10**400, {"a": {}}, [[["Sunny"]]], "[" + "'x'," * 100_000 + "]", float("inf"), object(),
)  # fmt: skip


@pytest.mark.parametrize("cell", ODD_CELLS)
@pytest.mark.parametrize("field", ["weather", "daytime", "city", "split", "video", "description", "gps", "lat"])
def test_a_cell_of_any_kind_is_a_value_or_null(field, cell):
    parsed = parse(select_fields({field: cell}))
    assert parsed.metadata.gps is None
    (parsed.metadata.description or "").encode()  # text that a file can hold


@pytest.mark.parametrize("cell", ODD_CELLS)
def test_a_cell_of_any_kind_is_no_label(cell):
    with pytest.raises(BadLabel, match=r"^label .{1,60} is not 0 or 1$"):
        parse(select_fields({"label": cell}))


@pytest.mark.parametrize(
    ("address", "split"),
    [
        ("data/train-00000-of-00001.parquet", "train"),
        ("default/train/0000.parquet", "train"),
        ("main/partial-validation/0000.parquet", "validation"),
        ("TEST_3.tar", "test"),
        ("a/val0000.tar", "val"),
        ("testing/0.tar", None),
        ("test_data/0.tar", None),
        ("trained-0.tar", None),
        ("0000.tar", None),
    ],
)
def test_the_split_is_in_the_files_name_or_is_its_folder(address, split):
    assert split_in(address) == split
