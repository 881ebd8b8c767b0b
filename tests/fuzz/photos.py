"""Photos to damage: small ones of every format, taken apart so that metadata can be damaged and nothing else."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from tests.fuzz.mutation import HUGE, mutate

WIDTH, HEIGHT = 96, 64
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Formats of values in TIFF by their number, and some numbers that mean nothing.
TIFF_TYPES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255, 65535)


@dataclass(frozen=True)
class Base:
    """A good photo without metadata."""

    name: str
    format: str
    data: bytes


@cache
def bases() -> tuple[Base, ...]:
    """Good photos: every format, with each mode and way of encoding that Pillow writes."""
    seed = Image.fromarray(np.random.default_rng(3).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    colour = seed.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    grey = np.asarray(colour.convert("L"))
    frames = {"save_all": True, "append_images": [colour.rotate(90), colour.rotate(180)], "duration": 50}
    made: tuple[tuple[str, Image.Image, str, dict[str, object]], ...] = (
        ("baseline", colour, "JPEG", {"quality": 90}),
        ("progressive", colour, "JPEG", {"progressive": True, "subsampling": 0}),
        ("restarts", colour, "JPEG", {"restart_marker_rows": 1}),
        ("grey", colour.convert("L"), "JPEG", {}),
        ("CMYK", colour.convert("CMYK"), "JPEG", {}),
        ("RGB", colour, "PNG", {}),
        ("RGBA", colour.convert("RGBA"), "PNG", {}),
        ("palette", colour.quantize(64), "PNG", {"transparency": 3}),
        ("16 bit", Image.fromarray(grey.astype(np.uint16) * 257), "PNG", {}),
        ("animation", colour, "PNG", frames),
        ("lossy", colour, "WEBP", {}),
        ("lossless", colour.convert("RGBA"), "WEBP", {"lossless": True}),
        ("animation", colour, "WEBP", frames),
    )
    return tuple(Base(name, kind, _encode(image, kind, options)) for name, image, kind, options in made)


def _encode(image: Image.Image, kind: str, options: dict[str, object]) -> bytes:
    with io.BytesIO() as stream:
        image.save(stream, kind, **options)
        return stream.getvalue()


def exif_block(rng: random.Random) -> bytes:
    """A good block of EXIF with an orientation and a position, without the name in front."""
    exif = Image.Exif()
    exif.endian = rng.choice("<>")
    exif[274] = rng.randint(1, 8)
    exif[271], exif[272], exif[282] = "a camera", "a model", 72.0
    exif.get_ifd(0x8769).update({36867: "2026:11:30 12:00:00", 33434: 0.01, 37500: bytes(200)})
    place = ((39.0, 46.0, 17.8), (86.0, 11.0, 17.7))
    exif.get_ifd(0x8825).update({1: "N", 2: place[0], 3: "W", 4: place[1], 5: b"\0", 29: "2026:11:30"})
    return exif.tobytes().removeprefix(b"Exif\0\0")


def damage_tiff(block: bytes, rng: random.Random) -> bytes:
    """Change fields of directory entries: tags, types, counts and offsets that do not fit."""
    order = "<" if block[:2] == b"II" else ">"
    damaged = bytearray(block)
    (directory,) = struct.unpack_from(order + "I", block, 4)
    starts = [directory]
    entries = [entry for start in starts for entry in _entries(block, order, start, starts)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        entry, field = rng.choice(entries), rng.randrange(5)
        if field == 0:
            struct.pack_into(order + "H", damaged, entry, rng.choice((274, 0x8825, 0x8769, 1, 2, 0xFFFF)))
        elif field == 1:
            struct.pack_into(order + "H", damaged, entry + 2, rng.choice(TIFF_TYPES))
        elif field == 2:
            struct.pack_into(order + "I", damaged, entry + 4, rng.choice((0, 2, 3, 64, 65, *HUGE)))
        elif field == 3:
            struct.pack_into(order + "I", damaged, entry + 8, rng.choice((rng.randrange(len(block) + 8), *HUGE)))
        else:
            struct.pack_into(order + "H", damaged, rng.choice(starts), rng.choice((0, 1, 200, 65535)))
    return bytes(damaged)


def _entries(block: bytes, order: str, start: int, starts: list[int]) -> list[int]:
    """Places of a directory's entries; directories that they lead to are added to `starts`."""
    (count,) = struct.unpack_from(order + "H", block, start)
    entries = [start + 2 + 12 * number for number in range(count)]
    for entry in entries:
        tag, _, _, value = struct.unpack_from(order + "HHII", block, entry)
        if tag in (0x8769, 0x8825):
            starts.append(value)
    return entries


def with_metadata(base: Base, rng: random.Random, exif: bytes) -> bytes:
    """The photo with a block of EXIF and other metadata, all of the right lengths and checksums.

    Args:
        base: The photo.
        rng: What decides which others, how often, and where.
        exif: The block of EXIF, without the name in front.
    """
    return {"JPEG": _jpeg_with, "PNG": _png_with, "WEBP": _webp_with}[base.format](base.data, rng, exif)


def _jpeg_with(data: bytes, rng: random.Random, exif: bytes) -> bytes:
    def segment(marker: int, body: bytes) -> bytes:
        return b"\xff" * rng.choice((1, 1, 1, 3)) + bytes((marker,)) + struct.pack(">H", len(body) + 2) + body

    blocks = [segment(0xE1, b"Exif\0\0" + exif)]
    names = (b"ICC_PROFILE\0\x01\x01", b"MPF\0II*\0\x08\0\0\0", b"http://ns.adobe.com/xmp/extension/\0", b"")
    for _ in range(rng.choice((0, 0, 1, 3))):
        marker = rng.choice((0xE1, 0xE2, 0xE2, 0xE3, 0xED, 0xEF, 0xFE))
        blocks.append(segment(marker, rng.choice(names) + rng.randbytes(rng.randrange(200))))
    if rng.random() < 0.1:
        blocks.append(blocks[0])
    rest = blocks[1:]
    rng.shuffle(rest)
    return data[:2] + b"".join((blocks[0], *rest)) + data[2:]


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG, with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_with(data: bytes, rng: random.Random, exif: bytes) -> bytes:
    bomb = zlib.compress(bytes(rng.choice((100, 2 << 20))))
    others = (
        chunk(b"tEXt", rng.randbytes(rng.randrange(80))),
        chunk(b"zTXt", b"a word\0\0" + bomb),
        chunk(b"iCCP", b"a name\0\0" + bomb),
        chunk(b"eXIf", exif),
        chunk(b"pHYs", rng.randbytes(rng.randrange(12))),
        chunk(b"acTL", rng.randbytes(rng.randrange(12))),
        chunk(b"tIME", rng.randbytes(7))[:-1] + b"?",  # of a wrong checksum
    )
    blocks = b"".join((chunk(b"eXIf", exif), *(rng.choice(others) for _ in range(rng.choice((0, 0, 1, 3))))))
    place = rng.choice((33, data.index(b"IEND") - 4))  # behind the header, or in front of the end
    return data[:place] + blocks + data[place:]


def _webp_with(data: bytes, rng: random.Random, exif: bytes) -> bytes:
    name = rng.choice((b"", b"Exif\0\0"))
    body = data[12:]
    if not body.startswith(b"VP8X"):
        size = (WIDTH - 1).to_bytes(3, "little") + (HEIGHT - 1).to_bytes(3, "little")
        alpha = 0x10 if body.startswith(b"VP8L") else 0
        body = struct.pack("<4sI", b"VP8X", 10) + bytes((0x08 | alpha, 0, 0, 0)) + size + body
    for kind, content in ((b"EXIF", name + exif), *((b"JUNK", rng.randbytes(9)) for _ in range(rng.choice((0, 1))))):
        body += struct.pack("<4sI", kind, len(content)) + content + bytes(len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def with_size(base: Base, rng: random.Random) -> bytes:
    """The photo with another size in its header, which may be huge."""
    width, height = (rng.choice((1, 31, 32, 95, 97, 2000, 9_999, 16_383, 65_535, 1 << 24)) for _ in range(2))
    data = bytearray(base.data)
    if base.format == "PNG":
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif base.format == "JPEG":
        frame = max(data.find(b"\xff" + marker) for marker in (b"\xc0", b"\xc2"))
        struct.pack_into(">HH", data, frame + 5, height & 0xFFFF, width & 0xFFFF)
    elif data[12:16] == b"VP8X":
        data[24:30] = ((width - 1) & 0xFFFFFF).to_bytes(3, "little") + ((height - 1) & 0xFFFFFF).to_bytes(3, "little")
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little") & 0xF0000000
        struct.pack_into("<I", data, 21, bits | (width - 1 & 0x3FFF) | (height - 1 & 0x3FFF) << 14)
    else:
        struct.pack_into("<HH", data, 26, width & 0x3FFF, height & 0x3FFF)
    return bytes(data)


Damage = Callable[[bytes, random.Random], bytes]
METADATA: tuple[Damage, ...] = (
    damage_tiff,
    lambda block, rng: mutate(block, rng, same_length=True),
    mutate,
    lambda block, rng: rng.randbytes(rng.randrange(100)),
    lambda block, rng: block * rng.choice((1, 2)),
)
