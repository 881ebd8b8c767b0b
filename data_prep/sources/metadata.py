"""From the strings of a metadata row to typed, NULL-safe values; what cannot be read is counted, not lost."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from data_prep.sources.coordinates import BadGps, check_gps, is_null, read_columns
from data_prep.sources.tables import shorten
from pipeline.data.index import SPLITS
from pipeline.data.record import Metadata
from pipeline.names import DAYTIME, SCENE, WEATHER

# Our field, and the columns that may hold it: the plain name, then those of the NATIX table.
COLUMNS = {
    "label": ("label",),
    "gps": (
        "gps", "gps_coordinates", "gps_coords", "gps_position", "gpsposition", "coordinates", "coords", "geolocation",
        "latlon", "lat_lon", "latlong", "lat_long", "latlng", "lat_lng", "wkt", "point", "geometry",
    ),
    # Longitude first, as GeoJSON has it.
    "lonlat": (
        "lonlat", "lon_lat", "longlat", "long_lat", "lnglat", "lng_lat",
        "gps.coordinates", "geometry.coordinates", "location.coordinates",
    ),
    "latitude": (
        "latitude", "lat", "gps.latitude", "gps.lat", "gps.y", "gps_latitude", "gps_lat", "gpslatitude",
        "location.latitude", "location.lat", "coordinates.latitude", "coordinates.lat",
    ),
    "longitude": (
        "longitude", "lon", "lng", "long", "gps.longitude", "gps.lon", "gps.lng", "gps.long", "gps.x", "gps_longitude",
        "gps_lon", "gps_lng", "gpslongitude", "location.longitude", "location.lon", "location.lng",
        "coordinates.longitude", "coordinates.lon", "coordinates.lng",
    ),
    "latitude_ref": ("latitude_ref", "lat_ref", "gps_latitude_ref", "gpslatituderef"),
    "longitude_ref": ("longitude_ref", "lon_ref", "lng_ref", "gps_longitude_ref", "gpslongituderef"),
    "weather": ("weather", "scene_level_tags.weather"),
    "daytime": ("daytime", "scene_level_tags.daytime"),
    "scene": ("scene", "scene_environment", "scene_level_tags.scene_environment"),
    "city": ("city", "city_name"),
    "description": ("description", "scene_description"),
    "travel_alteration": ("travel_alteration", "scene_level_tags.travel_alteration"),
    "video": ("video", "vid_id", "video_info.vid_id"),
    "sequence": ("sequence", "seq_id", "video_info.seq_id"),
    "split": ("split",),
    "mask": ("mask",),
    # Names of unknown categories of objects. COCO sources fill this in; no column has it.
    "category": (),
}  # fmt: skip
GPS_FIELDS = frozenset({"gps", "lonlat", "latitude", "longitude"})
VOCABULARIES = {"weather": WEATHER, "daytime": DAYTIME, "scene": SCENE}
LONGEST_LIST = 10_000  # characters of a list in one cell; Python's parser would take all memory for longer ones
LABEL_WORDS = {
    **dict.fromkeys(("0", "0.0", "false", "no", "none", "no roadwork"), 0),
    **dict.fromkeys(("1", "1.0", "true", "yes", "roadwork"), 1),
}
SPLIT_WORDS = {
    **{name: name for name in SPLITS},
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("valid", "validation", "dev"), "val"),
    **dict.fromkeys(("testing",), "test"),
}
SPLIT_IN_NAME = re.compile(r"(?:partial-)?(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)


class BadLabel(ValueError):
    """A label that is neither 0, 1 nor NULL."""


@dataclass(frozen=True)
class Parsed:
    """The typed values of a row."""

    metadata: Metadata
    label: int | None
    video: str | None
    """Frames with the same name are near-duplicates."""
    split: str | None
    """The split that the source gives the photo."""
    unknown: tuple[tuple[str, str], ...]
    """Field and word, for each word that our vocabulary lacks."""
    gps_problem: str | None
    """Why coordinates that were given became NULL."""
    travel_alteration: tuple[str, ...] | None
    """How the traffic is led past an obstacle, in the source's words, sorted. It nearly states the label, so it is only
    measured and reported, and no record holds it."""


def select_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Rename a row's columns to our fields, and leave out those that are not ours.

    Case does not count, nor do blanks for underscores or a unit in brackets: `GPS Latitude (deg)` is `gps_latitude`.
    """
    by_name = {spelled: value for name, value in row.items() for spelled in reversed(spellings(name))}
    by_name |= {spellings(name)[0]: value for name, value in row.items()}
    found = {field: [n for n in names if n in by_name] for field, names in COLUMNS.items()}
    return {field: _plain(by_name[names[0]]) for field, names in found.items() if names}


@lru_cache(maxsize=1024)
def spellings(column: str) -> tuple[str, str]:
    """A column's name in lower case, and the same without a unit and with underscores."""
    lower = column.strip().lower()
    return lower, re.sub(r"[\s_-]+", "_", re.sub(r"\s*[(\[][^()\[\]]*[)\]]$", "", lower))


def split_in(address: str) -> str | None:
    """The split that a file's name begins with, or that one of its folders is named after: `main/train/0.parquet`."""
    path = PurePosixPath(address)
    found = [SPLIT_IN_NAME.match(path.name), *(SPLIT_IN_NAME.fullmatch(part) for part in reversed(path.parent.parts))]
    return next((match[1].lower() for match in found if match), None)


def explain_unlabelled(table: str, columns: Iterable[str]) -> str:
    """Why a table gives no photo a label.

    Args:
        table: Name of the table for the user.
        columns: Names of the table's columns.
    """
    if "label" in select_fields(dict.fromkeys(columns)):
        return f"the column 'label' of {table} is empty"
    return f"{table} has no column 'label'; its columns are {shorten(columns)}"


def parse(fields: dict[str, Any]) -> Parsed:
    """Type the fields of one row, named as in `COLUMNS`; absent ones are NULL.

    Raises:
        BadLabel: There is a label, but it reads neither as 0 nor as 1.
    """
    gps, gps_problem = parse_gps(fields)
    known: dict[str, list[str]] = {}
    unknown: dict[str, list[str]] = {}
    for name, vocabulary in VOCABULARIES.items():
        known[name], unknown[name] = _match(fields.get(name), vocabulary)
    split_word = _text(fields.get("split"))
    split = SPLIT_WORDS.get(split_word.lower()) if split_word else None
    unknown["split"] = [split_word] if split_word and split is None else []
    unknown["category"] = fields.get("category", [])
    daytime, scene = (next(iter(known[name]), None) for name in ("daytime", "scene"))
    city, description = _text(fields.get("city")), _text(fields.get("description"))
    metadata = Metadata(gps, tuple(known["weather"]) or None, daytime, scene, city, description)
    label, alteration = parse_label(fields.get("label")), _words(fields.get("travel_alteration"))
    left_out = tuple((field, word) for field, words in unknown.items() for word in words)
    return Parsed(metadata, label, _video(fields), split, left_out, gps_problem, alteration)


def parse_label(value: Any) -> int | None:
    """0, 1 or None for unknown. The word "None" is the class without roadwork, not NULL.

    Raises:
        BadLabel: The value is none of these.
    """
    word = " ".join(str(value).split()).lower()
    if value is not None and word in LABEL_WORDS:
        return LABEL_WORDS[word]
    if is_null(value):
        return None
    raise BadLabel(f"label {str(value)[:40]!r} is not 0 or 1")


def parse_gps(fields: dict[str, Any]) -> tuple[tuple[float, float] | None, str | None]:
    """Latitude and longitude in degrees, or None, with the reason where coordinates were given."""
    try:
        pair = read_columns(fields)
    except BadGps as error:
        return None, str(error)
    return (None, None) if pair is None else check_gps(*pair)


def _plain(value: Any) -> Any:
    """Bytes as text, decimals as floats, and text without the halves of characters that no file may hold."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, Decimal):
        return float(value)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _video(fields: dict[str, Any]) -> str | None:
    """Name of the video; where the video is unknown, name of the sequence."""
    for kind in ("video", "sequence"):
        name = fields.get(kind)
        if not is_null(name):
            # Tables with gaps turn whole numbers into floats: 7.0 and 7 are the same video.
            return f"{kind} {str(name).strip().removesuffix('.0')}"
    return None


def _text(value: Any) -> str | None:
    return None if is_null(value) else str(value).strip()


def _words(value: Any) -> tuple[str, ...] | None:
    """The words of a list without a vocabulary, sorted."""
    return tuple(sorted({_normalise(str(part)) for part in _as_list(value) if not is_null(part)})) or None


def _match(value: Any, vocabulary: Iterable[str]) -> tuple[list[str], list[str]]:
    """The words of `value` that the vocabulary has, in the vocabulary's order, and the words that it lacks."""
    words = {_normalise(str(part)): str(part).strip() for part in _as_list(value) if not is_null(part)}
    known = [word for word in vocabulary if word in words]
    return known, [original for word, original in words.items() if word not in known]


def _normalise(word: str) -> str:
    return " ".join(re.split(r"[\s_-]+", word.strip().lower()))


def _as_list(value: Any) -> list[Any]:
    """Items of a list, of a string that spells one (`"['Sunny', 'Wet']"`, `"Sunny, Wet"`), or one value."""
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str):
        return [value]
    text = value.strip()
    if text[:1] + text[-1:] in ("[]", "()") and len(text) <= LONGEST_LIST:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of backslashes in the text
                spelled = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            text = text[1:-1]  # such as [nan, nan] or [Sunny]
        else:
            return list(spelled) if isinstance(spelled, list | tuple) else [spelled]
    return [part.strip().strip("'\"") for part in re.split(r"[,;|]", text)]
