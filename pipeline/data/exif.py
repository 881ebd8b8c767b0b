"""Read the few tags of EXIF that matter here, from a block that may be damaged in any way.

Pillow reads every tag, and copies what each one claims to be: a crafted block of some megabytes fills the memory. Here
a block is read in bounded time and memory, and what cannot be read counts as absent.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection

ORIENTATION, GPS_BLOCK = 0x0112, 0x8825
GPS_TAGS = LATITUDE_REF, LATITUDE, LONGITUDE_REF, LONGITUDE = 1, 2, 3, 4
MOST_VALUES = 64  # of one tag; those that are read here have three at most
# TIFF 6.0, section 2: number of a type to the format of `struct`. Bytes and texts stay bytes; 13 is an offset.
BYTES = frozenset({1, 2, 7})
NUMBERS = {3: "H", 4: "I", 5: "II", 6: "b", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d", 13: "I"}
INTEGERS = frozenset({3, 4, 6, 8, 9, 13})
NAME = re.compile(rb"^(Exif\0\0){1,2}")  # twice in some WebPs
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
Value = bytes | tuple[float, ...]


def orientation_of(exif: bytes, xmp: bytes = b"") -> int:
    """Orientation 1 to 8, by EXIF or else by XMP; 1, upright, where neither gives one.

    Args:
        exif: A block of EXIF; empty without one.
        xmp: An XMP packet; empty without one.
    """
    value = _first_integer(_read(exif, None, (ORIENTATION,), INTEGERS).get(ORIENTATION))
    if value is None and (found := XMP_ORIENTATION.search(xmp)):
        return int(found[1])
    return value if value is not None and 1 <= value <= 8 else 1


def gps_of(exif: bytes) -> dict[int, Value]:
    """The tags of a position, as far as they are there; 0/0 is NaN, and n/0 infinite."""
    block = _first_integer(_read(exif, None, (GPS_BLOCK,), INTEGERS).get(GPS_BLOCK))
    return {} if block is None else _read(exif, block, GPS_TAGS, NUMBERS.keys() | BYTES)


def _first_integer(value: Value | None) -> int | None:
    return int(value[0]) if value else None


def _read(block: bytes, offset: int | None, wanted: Collection[int], types: Collection[int]) -> dict[int, Value]:
    """The wanted tags of a directory; of tags that are there twice the first one, as Pillow does.

    Args:
        block: EXIF, with or without its name in front.
        offset: Where the directory is, in bytes; None for the first.
        wanted: Numbers of the tags.
        types: Numbers of the types that are read.
    """
    block = NAME.sub(b"", block)
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 8:
        return {}
    magic, first = struct.unpack_from(order + "HI", block, 2)
    if magic not in (0x2A, 0x2A00):
        return {}
    offset = first if offset is None else offset
    if offset < 8 or offset + 2 > len(block):
        return {}
    (count,) = struct.unpack_from(order + "H", block, offset)
    found: dict[int, Value] = {}
    for entry in range(offset + 2, min(offset + 2 + 12 * count, len(block) - 11), 12):
        tag, kind, values = struct.unpack_from(order + "HHI", block, entry)
        usable = tag in wanted and tag not in found and kind in types
        if usable and (value := _value(block, order, entry, kind, values)) is not None:
            found[tag] = value
    return found


def _value(block: bytes, order: str, entry: int, kind: int, count: int) -> Value | None:
    """The values of one tag; None where there are none, too many, or where they lie outside the block."""
    if not 1 <= count <= MOST_VALUES:
        return None
    layout = f"{order}{count}s" if kind in BYTES else order + NUMBERS[kind] * count
    start, size = entry + 8, struct.calcsize(layout)
    if size > 4:
        (start,) = struct.unpack_from(order + "I", block, start)
    if start + size > len(block):
        return None
    values = struct.unpack_from(layout, block, start)
    if kind in BYTES:
        text: bytes = values[0]
        return text
    if len(values) > count:  # fractions
        return tuple(_divide(n, d) for n, d in zip(values[::2], values[1::2], strict=True))
    return values


def _divide(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.inf if numerator else math.nan
