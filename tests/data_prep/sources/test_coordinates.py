"""Coordinates as people write them: read where one reading is possible, and otherwise NULL with the reason."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from decimal import Decimal

import pytest

from data_prep.sources.coordinates import COMMA, MISSING_PART, SIGN_AND_LETTER, UNREADABLE
from data_prep.sources.gps_notes import GpsNotes
from data_prep.sources.metadata import parse_gps, select_fields


def dms(value: float, letters: str, form: str) -> str:
    """Degrees, minutes and seconds with a letter; `form` holds the three and the letter."""
    seconds = round(abs(value) * 3600, 3)
    minutes, seconds = divmod(seconds, 60)
    degrees, minutes = divmod(minutes, 60)
    return form.format(int(degrees), int(minutes), f"{seconds:.3f}", letters[value < 0])


def in_letters(form: str, between: str) -> Callable[[float, float], str]:
    """Both coordinates as `dms` writes them."""
    return lambda lat, lon: f"{dms(lat, 'NS', form)}{between}{dms(lon, 'EW', form)}"


def comma(value: float) -> str:
    """A number with a decimal comma."""
    return f"{value:.6f}".replace(".", ",")


FORMS: dict[str, Callable[[float, float], object]] = {
    "list": lambda lat, lon: [lat, lon],
    "altitude": lambda lat, lon: [lat, lon, 213.5],
    "list of text": lambda lat, lon: [f"{lat}", f"{lon}"],
    "natix": lambda lat, lon: f"[{lat}, {lon}]",
    "tuple": lambda lat, lon: f"({lat}, {lon})",
    "quoted": lambda lat, lon: f"['{lat}', '{lon}']",
    "comma": lambda lat, lon: f"{lat:.6f}, {lon:.6f}",
    "tight comma": lambda lat, lon: f"{lat:.6f},{lon:.6f}",
    "blank": lambda lat, lon: f"{lat:.6f} {lon:.6f}",
    "semicolon": lambda lat, lon: f"{lat:.6f};{lon:.6f}",
    "bar": lambda lat, lon: f"{lat:.6f} | {lon:.6f}",
    "slash": lambda lat, lon: f"{lat:.6f}/{lon:.6f}",
    "plus": lambda lat, lon: f"{lat:+.6f} {lon:+.6f}",
    "altitude after": lambda lat, lon: f"{lat:.6f}, {lon:.6f}, 213.5",
    "typeset minus": lambda lat, lon: f"{lat:.6f}, {lon:.6f}".replace("-", "\u2212"),
    "decimal comma, semicolon": lambda lat, lon: f"{comma(lat)}; {comma(lon)}",
    "decimal comma, blank": lambda lat, lon: f"{comma(lat)} {comma(lon)}",
    "decimal comma, comma and blank": lambda lat, lon: f"{comma(lat)}, {comma(lon)}",
    "exponent": lambda lat, lon: f"{lat:.9e} {lon:.9e}",
    "point": lambda lat, lon: f"POINT({lon:.6f} {lat:.6f})",
    "point with altitude": lambda lat, lon: f"SRID=4326;Point Z ({lon:.6f} {lat:.6f} 213)",
    "geojson": lambda lat, lon: json.dumps({"type": "Point", "coordinates": [lon, lat]}),
    "geo": lambda lat, lon: f"geo:{lat:.6f},{lon:.6f}",
    "iso 6709": lambda lat, lon: f"{lat:+010.6f}{lon:+011.6f}/",
    "labels": lambda lat, lon: f"lat: {lat:.6f}, lon: {lon:.6f}",
    "labels, other order": lambda lat, lon: f"lng={lon:.6f} lat={lat:.6f}",
    "json": lambda lat, lon: json.dumps({"latitude": lat, "longitude": lon}),
    "python": lambda lat, lon: str({"lat": lat, "lng": lon}),
    "letters": lambda lat, lon: f"{abs(lat):.6f} {'NS'[lat < 0]}, {abs(lon):.6f} {'EW'[lon < 0]}",
    "letters, tight": lambda lat, lon: f"{abs(lat):.6f}{'NS'[lat < 0]}{abs(lon):.6f}{'EW'[lon < 0]}",
    "letters first": lambda lat, lon: f"{'ns'[lat < 0]}{abs(lat):.6f} {'ew'[lon < 0]}{abs(lon):.6f}",
    "letters, other order": lambda lat, lon: f"{abs(lon):.6f}{'EW'[lon < 0]} {abs(lat):.6f}{'NS'[lat < 0]}",
    "words": lambda lat, lon: (
        f"{abs(lat):.6f}° {'south' if lat < 0 else 'north'}, {abs(lon):.6f}° {'west' if lon < 0 else 'East'}"
    ),
    "degree marks": lambda lat, lon: f"{lat:.6f}°, {lon:.6f}°",
    "letters, decimal comma": lambda lat, lon: (
        f"{comma(abs(lat))}° {'NS'[lat < 0]}, {comma(abs(lon))}° {'EW'[lon < 0]}"
    ),
    "seconds": in_letters("{0}°{1}'{2}\"{3}", " "),
    "seconds, typeset": in_letters("{0}° {1}′ {2}″ {3}", ", "),
    "seconds, curly": in_letters("{0}º{1}’{2}”{3}", "; "),
    "seconds, exiftool": in_letters("{0} deg {1}' {2}\" {3}", ", "),
    "seconds, letters": in_letters("{0}d{1}m{2}s {3}", " "),
    "seconds, letter first": in_letters("{3}{0} {1} {2}", " "),
    "seconds, colons": in_letters("{0}:{1}:{2}{3}", " "),
    "seconds, blanks": in_letters("{0} {1} {2} {3}", ", "),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_random_places_written_in_each_form_are_read_back(form, seed):
    pick = random.Random(f"{form} {seed}")
    for _ in range(20):
        place = round(pick.uniform(-90, 90), 6), round(pick.uniform(-180, 180), 6)
        if pick.random() < 0.3:
            place = round(place[0] / 90, 6), round(place[1] / 180, 6)  # near zero, where signs and zeros get lost
        written = FORMS[form](*place)
        read, problem = parse_gps({"gps": written})
        assert problem is None, written
        assert read == pytest.approx(place, abs=2e-6), written


@pytest.mark.parametrize("seed", range(20))
def test_random_places_in_two_columns_are_read_back(seed):
    pick = random.Random(seed)
    names = [
        ("latitude", "longitude"), ("LAT", "LON"), ("lat", "lng"), ("Lat", "Long"), ("GPS Latitude", "GPS Longitude"),
        ("gps_lat", "gps_lon"), ("Latitude (deg)", "Longitude (deg)"), ("location.lat", "location.lng"),
    ]  # fmt: skip
    ways: list[Callable[[float, str], object]] = [
        lambda value, _: value,
        lambda value, _: Decimal(str(value)),
        lambda value, _: f" {value} ",
        lambda value, _: comma(value),
        lambda value, letters: f"{abs(value)}{letters[value < 0]}",
        lambda value, letters: dms(value, letters, "{0} deg {1}' {2}\" {3}"),
        lambda value, letters: dms(value, letters, "{0}°{1}'{2}\" {3}"),
        lambda value, letters: dms(value, letters, "{3} {0} {1} {2}"),
        lambda value, letters: f"{value}".encode(),
    ]
    for _ in range(50):
        place = round(pick.uniform(-90, 90), 6), round(pick.uniform(-180, 180), 6)
        columns, way = pick.choice(names), pick.choice(ways)
        row = {name: way(value, letters) for name, value, letters in zip(columns, place, ("NS", "EW"), strict=True)}
        read, problem = parse_gps(select_fields(row))
        assert problem is None, row
        assert read == pytest.approx(place, abs=2e-6), row


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("39,7716", MISSING_PART),
        ("39.7716", MISSING_PART),
        ("39.77 N", MISSING_PART),
        (39.77, MISSING_PART),
        ([39.77, None], MISSING_PART),
        ([39.77, math.nan], MISSING_PART),
        ("39,77", COMMA),
        ("1,2,3,4,5", COMMA),
        ("-39.77 S, 86.19 E", SIGN_AND_LETTER),
        ("39.77 O, 86.19 N", UNREADABLE),  # Ost is east, and Ouest is west
        ("39D46M17S 86D11M17S", UNREADABLE),  # seconds, or south
        ("39 46 17.8 86 11 17.7", UNREADABLE),
        ("39°75'N 86°11'W", UNREADABLE),
        ("39.5°30'N 86°11'W", UNREADABLE),
        ("39.771.604, 1.2.3", UNREADABLE),
        ("1_0, 2_0", UNREADABLE),
        ("Indianapolis, IN", UNREADABLE),
        ("NEWS", UNREADABLE),
        ([[39.77, -86.19]], UNREADABLE),
        ([1, 2, 3, 4], UNREADABLE),
        ({"a": 1}, UNREADABLE),
        (True, UNREADABLE),
        ([True, False], UNREADABLE),
        ("[" * 5000, UNREADABLE),
        ("1" * 100, UNREADABLE),
        ("1e999, 2", "not finite"),
        ("inf, -inf", "not finite"),
        ([10**400, 1], "not finite"),
        ([math.inf, 1], "not finite"),
        ("391.5, 1000", "out of range"),
        ("-122.3, 47.6", "out of range, perhaps latitude and longitude are swapped"),
        ("0, 0", "zero"),
        ("0°0'0\"N 0°0'0\"E", "zero"),
    ],
)
def test_what_cannot_be_read_in_one_way_is_null_with_the_reason(value, problem):
    assert parse_gps({"gps": value}) == (None, problem)


def test_letters_that_belong_to_the_other_column_are_told():
    place, problem = parse_gps({"latitude": "86.19 W", "longitude": "39.77 N"})
    assert place is None
    assert problem == "with W where N or S belongs, perhaps latitude and longitude are swapped"


def test_a_cell_that_is_empty_leaves_the_other_columns_to_speak():
    columns = {"latitude": 1.5, "longitude": 2.5}
    assert parse_gps({"gps": "", **columns}) == ((1.5, 2.5), None)
    assert parse_gps({"gps": [3.5, 4.5], **columns}) == ((3.5, 4.5), None)


def test_columns_that_put_longitude_first_say_so_by_their_name():
    assert parse_gps(select_fields({"lnglat": "-86.19 39.77"})) == ((39.77, -86.19), None)
    assert parse_gps(select_fields({"gps.type": "Point", "gps.coordinates": [-86.19, 39.77]})) == (
        (39.77, -86.19),
        None,
    )
    assert parse_gps(select_fields({"lonlat": "POINT(-86.19 39.77)"})) == ((39.77, -86.19), None)


def test_hemispheres_in_columns_of_their_own_count():
    row = {"GPSLatitude": 33.86, "GPSLatitudeRef": "S", "GPSLongitude": 151.21, "GPSLongitudeRef": "East"}
    assert parse_gps(select_fields(row)) == ((-33.86, 151.21), None)
    assert parse_gps(select_fields({**row, "GPSLatitude": -33.86})) == ((-33.86, 151.21), None)
    assert parse_gps(select_fields({**row, "GPSLongitude": -151.21})) == (None, SIGN_AND_LETTER)


@pytest.mark.parametrize("seed", range(50))
def test_random_marks_and_digits_are_a_place_on_earth_or_a_reason(seed):
    pick = random.Random(seed)
    for _ in range(100):
        text = "".join(pick.choice("0123456789.,;:|/ -+NSEWnsewdmeE°'\"′[](){}latongPOINT\t\0") for _ in range(30))
        place, problem = parse_gps({"gps": text[: pick.randint(0, 30)]})
        assert place is None or (problem is None and abs(place[0]) <= 90 and abs(place[1]) <= 180), text


def test_reasons_are_counted_with_an_example():
    notes = GpsNotes()
    for number, told in enumerate(["hill", "valley", "0, 0", "1.5 2.5"]):
        notes.add(f"{number}.jpg", told, *parse_gps({"gps": told}))
    assert notes.reasons() == "2 unreadable (such as 'hill' of '0.jpg'); 1 zero (such as '0, 0' of '2.jpg')"
    assert notes.doubts("the photos") == []


@pytest.mark.parametrize(("far", "told"), [(0, False), (5, False), (6, True), (10, True)])
def test_places_beyond_the_polar_circle_are_doubted_where_most_lie_there(far, told):
    notes = GpsNotes()
    for number in range(10):
        notes.add(f"{number}.jpg", "cells", (-86.19, 39.77) if number < far else (39.77, -86.19), None)
    sentences = notes.doubts("the photos")
    assert len(sentences) == told
    if told:
        assert f"{far} of 10 places lie beyond 66 degrees of latitude" in sentences[0]
        assert "swapped (such as 'cells' of '0.jpg')" in sentences[0]


def test_exif_tells_what_is_swapped_and_what_is_elsewhere():
    notes, lyon = GpsNotes(), (45.76, 4.84)
    for number in range(3):
        notes.add(f"{number}.jpg", "cells", lyon[::-1], None, exif=lyon)
    notes.add("near.jpg", "cells", (45.77, 4.85), None, exif=lyon)
    notes.add("far.jpg", "cells", (48.85, 2.35), None, exif=lyon)
    swapped, apart = notes.doubts("the photos")
    assert "3 of 5 places have latitude and longitude swapped, says the photos' EXIF" in swapped
    assert "1 of 5 places are more than 50 km from what the photos' EXIF says (such as 'cells' of 'far.jpg')" in apart
