"""Latitude and longitude in degrees from what people write into tables; `docs/data.md` lists the forms.

A form that can be read in two ways is not read at all: the reason is kept and reported, with counts and an example.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

NULL_WORDS = frozenset({"", "nan", "none", "null", "na", "n/a", "[]", "()"})
LONGEST = 200  # characters; longer text is no pair of coordinates
UNREADABLE, MISSING_PART = "unreadable", "with one number instead of two"
COMMA = "with a comma that may be decimal or divide two numbers"
SIGN_AND_LETTER = "with a minus sign beside N, S, E or W"

_WHOLE = r"\d{1,15}"
_NUMBER = rf"(?:{_WHOLE}(?:[.,]\d*)?|[.,]\d+)"
_PLAIN = re.compile(rf"[+-]?{_NUMBER}(?:[eE][+-]?\d{{1,3}})?")
# The commonest form, which needs no more than this: a point in both numbers leaves nothing open.
_SIMPLE = re.compile(r"[\[(]?\s*([+-]?\d{1,15}\.\d+)\s*[,; ]\s*([+-]?\d{1,15}\.\d+)\s*[\])]?", re.ASCII)
_WITH_POINT = rf"[+-]?{_WHOLE}(?:\.\d*)?(?:[eE][+-]?\d{{1,3}})?"
_POINT = re.compile(
    rf"(?:SRID=4326;)?\s*POINT\s*(?:Z|M|ZM)?\s*\(\s*({_WITH_POINT})\s+({_WITH_POINT})(?:\s+{_WITH_POINT}){{0,2}}\s*\)",
    re.IGNORECASE,
)
_ISO_6709 = re.compile(r"([+-]\d\d(?:\.\d+)?)([+-]\d{3}(?:\.\d+)?)(?:[+-]\d+(?:\.\d+)?)?(?:CRSWGS_84)?/?")
_GEOJSON = re.compile(
    rf"\{{.*[\"']coordinates[\"']\s*:\s*\[\s*({_WITH_POINT})\s*,\s*({_WITH_POINT})\s*(?:,[^\]]*)?\].*\}}", re.IGNORECASE
)
_AFTER_LABEL = r"\b['\"]?\s*[:=]?\s*([nsew]?[^a-z]*(?:[nsew](?![a-z]))?)"
_LATITUDE = re.compile(rf"\blat(?:itude)?{_AFTER_LABEL}", re.IGNORECASE)
_LONGITUDE = re.compile(rf"\b(?:lon(?:g(?:itude)?)?|lng){_AFTER_LABEL}", re.IGNORECASE)
_EXPONENT = re.compile(r"(?<=\d)E(?=[+-]?\d)|\b(?:NAN|NONE|INF)\b")
# Degrees, then perhaps minutes and seconds: by their marks, by colons, or by spaces.
_ANGLE = re.compile(
    rf"([+-]?)\s*({_NUMBER})\s*(?:°\s*|:\s*|\s+|$)(?:({_NUMBER})\s*(?:'\s*|:\s*|\s+|$)(?:({_NUMBER})\s*\"?)?)?"
)
_MARKED_ANGLE = re.compile(
    rf"[+-]?\s*{_NUMBER}\s*(?:°(?:\s*{_NUMBER}\s*'(?:\s*{_NUMBER}\s*\")?)?|:{_NUMBER}(?::{_NUMBER})?)"
)
_SPELLINGS = (
    (re.compile("[\u2212\u2010-\u2013\ufe63\uff0d]"), "-"),
    (re.compile("[\u00a0\u2000-\u200b\u202f\u3000\ufeff]"), " "),
    (re.compile("[\uff0c\u3001\u060c]"), ","),
    (re.compile("[\u00ba\u02da]"), "°"),
    (re.compile("[\u2032\u2019\u2018\u00b4\u02b9\u02bc`]"), "'"),
    (re.compile("[\u2033\u201d\u201c\u02ba]|''"), '"'),
    # Seconds only beside m for minutes: elsewhere S is south, and in capitals nothing tells.
    (re.compile(r"(m[a-z.]*\s*[\d.,]+)\s*s(?:ec(?:onds?)?\.?)?(?![a-z])"), r'\1"'),
    (re.compile(r"(M[A-Z.]*\s*[\d.,]+)\s*S\b"), r"\1?"),
    (re.compile(r"(?<=[\d.,])\s*d(?:eg(?:rees?)?\.?)?(?=[^a-z]|$)", re.IGNORECASE), "°"),
    (re.compile(r"(?<=[\d.,])\s*m(?:in(?:utes?)?\.?)?(?=[^a-z]|$)", re.IGNORECASE), "'"),
    (re.compile(r"\b(north|south|east|west)\b", re.IGNORECASE), lambda match: match[0][0].upper()),
)


class BadGps(ValueError):
    """Coordinates that cannot be read, or in more than one way; the message says why, in a few words."""


def is_null(value: Any) -> bool:
    """Whether a value is None, NaN, or one of the words that tables use for them."""
    if isinstance(value, float | Decimal):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in NULL_WORDS)


def check_gps(latitude: float, longitude: float) -> tuple[tuple[float, float] | None, str | None]:
    """The coordinates as a pair, or None with the reason why they are no place on a street."""
    if not (math.isfinite(latitude) and math.isfinite(longitude)):
        return None, "not finite"
    if 90 < abs(latitude) <= 180 and abs(longitude) <= 90:
        return None, "out of range, perhaps latitude and longitude are swapped"
    if abs(latitude) > 90 or abs(longitude) > 180:
        return None, "out of range"
    if latitude == 0 and longitude == 0:
        return None, "zero"  # what cameras without a fix write
    return (latitude, longitude), None


def read_pair(value: Any, longitude_first: bool = False) -> tuple[float, float] | None:
    """Latitude and longitude from one cell; None where it is empty.

    Args:
        value: Text of any of the known forms, or a list [latitude, longitude] or [latitude, longitude, altitude].
        longitude_first: Whether two bare numbers are longitude and latitude, as the column's name may say.

    Raises:
        BadGps: The cell cannot be read.
    """
    if isinstance(value, list | tuple):
        return _from_list(value, longitude_first)
    if is_null(value):
        return None
    if not isinstance(value, str) or len(value) > LONGEST:
        raise BadGps(MISSING_PART if _is_number(value) else UNREADABLE)
    if (found := _SIMPLE.fullmatch(value.strip())) and not longitude_first:
        return float(found[1]), float(found[2])
    text = _respell(value.strip())
    if pair := _from_standard(text):
        return pair
    text, brackets = _unwrap(text.removeprefix("geo:").strip())
    if re.search("[NSEW°:]", _EXPONENT.sub("", text.upper())):
        return _from_angles(text.upper())
    return _from_list(_split(text, brackets), longitude_first)


def read_columns(fields: Mapping[str, Any]) -> tuple[float, float] | None:
    """Latitude and longitude from the fields of a row, named as in `metadata.COLUMNS`; None where all are empty.

    Raises:
        BadGps: There is a value that cannot be read.
    """
    pair = read_pair(fields.get("gps")) or read_pair(fields.get("lonlat"), longitude_first=True)
    names = ("latitude", "longitude")
    if pair or all(is_null(fields.get(name)) for name in names):
        return pair
    if any(is_null(fields.get(name)) for name in names):
        raise BadGps(MISSING_PART)
    latitude, longitude = (
        read_angle(fields[name], letters, fields.get(f"{name}_ref"))
        for name, letters in zip(names, ("NS", "EW"), strict=True)
    )
    return latitude, longitude


def read_angle(value: Any, letters: str, reference: Any = None) -> float:
    """Degrees from a cell that holds one coordinate.

    Args:
        value: A number, or text with a number, or with degrees, minutes and seconds.
        letters: The hemispheres of this coordinate, the positive one first: "NS" or "EW".
        reference: What a column beside it says of the hemisphere, as EXIF has it; None without one.

    Returns:
        Degrees; infinity where the cell has it, or a number that no float holds.

    Raises:
        BadGps: The cell cannot be read.
    """
    if _is_number(value):
        degrees = float(value) if isinstance(value, float | Decimal) or abs(value) < 2**63 else math.inf
    elif isinstance(value, str) and len(value) <= LONGEST:
        text = value.strip()
        degrees = _angle(text if _PLAIN.fullmatch(text) else _respell(text), letters)
    else:
        raise BadGps(UNREADABLE)
    side = "" if is_null(reference) else str(reference).strip("\0 ").upper()[:1]
    if side == letters[1]:
        return -abs(degrees)
    if side == letters[0] and degrees < 0:
        raise BadGps(SIGN_AND_LETTER)
    return degrees


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _respell(text: str) -> str:
    """The same text with one character for each kind of mark."""
    for pattern, mark in _SPELLINGS:
        text = pattern.sub(mark, text)
    return text.strip()


def _from_standard(text: str) -> tuple[float, float] | None:
    """The pair of a text that says itself which number is which; None for other text."""
    if found := _POINT.fullmatch(text) or _GEOJSON.fullmatch(text):
        return float(found[2]), float(found[1])
    if found := _ISO_6709.fullmatch(text):
        return float(found[1]), float(found[2])
    labelled = [pattern.findall(text) for pattern in (_LATITUDE, _LONGITUDE)]
    if all(len(found) == 1 for found in labelled):
        return _both(*(found[0].strip(" \t,;/|{}()[]'\"") for found in labelled))
    return None


def _unwrap(text: str) -> tuple[str, bool]:
    """The text inside brackets, braces and quotes, and whether there were brackets."""
    inside = text.strip("[](){}")
    return inside.strip(), inside != text


def _from_list(parts: Sequence[Any], longitude_first: bool) -> tuple[float, float] | None:
    if all(is_null(part) for part in parts):
        return None
    if len(parts) not in (2, 3):
        raise BadGps(MISSING_PART if len(parts) == 1 and _is_one_number(parts[0]) else UNREADABLE)
    return _both(parts[1], parts[0]) if longitude_first else _both(parts[0], parts[1])


def _is_one_number(part: Any) -> bool:
    return _is_number(part) or bool(_PLAIN.fullmatch(str(part).strip()[:LONGEST]))


def _both(first: Any, second: Any) -> tuple[float, float]:
    if is_null(first) or is_null(second):
        raise BadGps(MISSING_PART)
    return read_angle(first, "NS"), read_angle(second, "EW")


def _split(text: str, brackets: bool) -> list[str]:
    """The numbers of a text without marks; whether a comma is decimal must follow from the text."""
    if any(mark in text for mark in ";|/\t"):
        parts = re.split(r"\s*[;|/\t]\s*", text)
    elif "," not in text:
        parts = text.split()
    elif "." in text or re.search(r"[a-z]", text, re.IGNORECASE):
        parts = re.split(r"\s*,\s*|\s+", text)
    else:
        parts = _split_at_commas(text, brackets)
    return [part.strip().strip("'\"") for part in parts]


def _split_at_commas(text: str, brackets: bool) -> list[str]:
    """The numbers of a text whose commas divide them or are decimal."""
    spaced = re.split(r"\s*,\s+|\s+", text)
    if len(spaced) > 1:
        return spaced
    parts = text.split(",")
    decimal = len(parts) == 4 and all(re.fullmatch(r"\d{3,}", part) for part in parts[1::2])
    if decimal:
        return [",".join(parts[:2]), ",".join(parts[2:])]
    if len(parts) == 2 and not brackets and parts[1][:1].isdigit():
        raise BadGps(COMMA if len(parts[1]) <= 3 else MISSING_PART)
    if len(parts) > 2:
        raise BadGps(COMMA)
    return parts


def _from_angles(text: str) -> tuple[float, float]:
    """Latitude and longitude with letters, in whatever order, or with the marks of degrees."""
    letters = re.findall("[NSEW]", text)
    if not letters:
        angles = _MARKED_ANGLE.findall(text)
        rest = re.sub(r"[\s,;/|]", "", _MARKED_ANGLE.sub("", text))
        if len(angles) != 2 or rest:
            raise BadGps(UNREADABLE)
        return _angle(angles[0].strip(), "NS"), _angle(angles[1].strip(), "EW")
    if len(letters) == 1:
        raise BadGps(MISSING_PART if _ANGLE.fullmatch(text.strip(" NSEW")) else UNREADABLE)
    if len(letters) != 2 or (letters[0] in "NS") == (letters[1] in "NS"):
        raise BadGps(UNREADABLE)
    between = re.split("[NSEW]", text)
    numbers = between[1:] if text[0] in "NSEW" else between[:2]
    if (between[0] if text[0] in "NSEW" else between[2]).strip(" ,;/|"):
        raise BadGps(UNREADABLE)
    values = [_angle(number.strip(" ,;/|") + letter, "NSEW") for number, letter in zip(numbers, letters, strict=True)]
    return (values[0], values[1]) if letters[0] in "NS" else (values[1], values[0])


def _angle(text: str, letters: str) -> float:
    """Degrees of one coordinate; `letters` are those that may stand beside it."""
    unquoted = text.strip().strip("'\"")
    text = unquoted if _PLAIN.fullmatch(unquoted) else text.strip()
    if text.lower().lstrip("+-") in ("inf", "infinity"):
        return math.inf
    if _PLAIN.fullmatch(text):
        return float(text.replace(",", "."))
    upper = text.upper()
    letter = next((end for end in (upper[-1:], upper[:1]) if end and end in "NSEW"), "")
    if letter:
        if letter not in letters:
            raise BadGps(
                f"with {letter} where {' or '.join(letters)} belongs, perhaps latitude and longitude are swapped"
            )
        upper = upper[:-1] if upper.endswith(letter) else upper[1:]
    found = _ANGLE.fullmatch(upper.strip())
    if not found:
        raise BadGps(UNREADABLE)
    if found[1] == "-" and letter:
        raise BadGps(SIGN_AND_LETTER)
    parts = [part.replace(",", ".") for part in found.groups()[1:] if part]
    numbers = [float(part) for part in parts]
    # Only the last may have decimals, and 60 is what rounding makes of 59.99.
    if any(number % 1 for number in numbers[:-1]) or any(number > 60 for number in numbers[1:]):
        raise BadGps(UNREADABLE)
    degrees = sum(number / 60**power for power, number in enumerate(numbers))
    degrees = round(degrees, 9)  # 0.1 mm, so that 39 degrees 46.2 minutes are 39.77
    return -degrees if found[1] == "-" or letter in ("S", "W") else degrees
