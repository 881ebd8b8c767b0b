"""Take the file of a photo apart, without decoding: format, size, the parts that a decoder needs, and metadata.

Decoders are given the picture alone. So damaged metadata cost no photo and change no pixel, and nothing but this module
and `pipeline.data.exif` reads them.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_SEGMENTS = 200_000  # a PNG of 256 MB cut every 4 kB has 65,000; millions of empty ones would take minutes
MOST_SCANNED_PIXELS = 4_000_000_000  # a progressive JPEG has some ten scans; one of some bytes visits every pixel
MOST_PROFILE_BYTES = 1 << 20  # of compressed EXIF, unpacked
# Markers of JPEG. `FF 00` and `FF FF` are none.
MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
SCAN = b"\xff\xda"
STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
END_OF_IMAGE, START_OF_SCAN, EXIF_OR_XMP = 0xD9, 0xDA, 0xE1
SEQUENTIAL = frozenset({0xC0, 0xC1})  # end with their first scan, if it has all components
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# APP0 (JFIF) and APP14 (Adobe) stay, since they say what the colours are.
METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
XMP_NAME, RAW_PROFILE = b"http://ns.adobe.com/xap/1.0/\0", b"Raw profile type exif\0"
# Formats that people have and that are not read, by their first bytes.
OTHERS = (
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("BMP", re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL)),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]")),
    ("AVIF", re.compile(rb".{4}ftyp(.{4})*?avi[fs]", re.DOTALL)),
    ("HEIC", re.compile(rb".{4}ftyp(.{4})*?(he[iv][cmsx]|mi[fa][1f]|msf1)", re.DOTALL)),
    ("CR3", re.compile(rb".{4}ftypcrx ", re.DOTALL)),
    ("JPEG XL", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n")),
    ("JPEG 2000", re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n")),
)


class BadPhoto(ValueError):
    """The bytes are no photo that can be used; the message says why, in a few words."""


@dataclass(frozen=True)
class Parts:
    """What a photo's file is made of."""

    format: str
    """JPEG, PNG or WEBP, as Pillow calls them."""
    width: int
    """Pixels, as stored."""
    height: int
    """Pixels, as stored."""
    picture: bytes
    """The file without its metadata; a WebP has them still, which its decoder does not read."""
    exif: bytes
    """The first EXIF block, which may be damaged; empty without one."""
    xmp: bytes
    """The first XMP packet; empty without one."""


def take_apart(data: bytes) -> Parts:
    """Take a JPEG, PNG or WebP apart, whatever its name is.

    Raises:
        BadPhoto: The file is of another format, or its structure is damaged.
    """
    if not data:
        raise BadPhoto("the file is empty")
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(PNG_SIGNATURE):
        return _png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    start = data[:64]
    name = next((name for name, pattern in OTHERS if pattern.match(start)), None)
    raise BadPhoto("not an image" if name is None else f"{name}; convert it to JPEG")


def _damaged(what: str) -> BadPhoto:
    return BadPhoto(f"cannot be decoded: {what}")


def _jpeg(data: bytes) -> Parts:
    kept, exif, xmp = [], b"", b""
    frame, size = 0, b""
    start = position = 2  # bytes from `start` on are not copied yet
    for _ in range(MOST_SEGMENTS):
        found = MARKER.search(data, position)
        marker = END_OF_IMAGE if found is None else found[1][0]
        if found is None or marker == END_OF_IMAGE:
            raise _damaged("it ends before its picture")
        position = found.end()
        if marker in STANDALONE:
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2 or position + length > len(data):
            raise _damaged("it ends within its header")
        body = data[position + 2 : position + length]
        position += length
        if marker == START_OF_SCAN:
            break
        if marker in FRAMES and not size and len(body) >= 6:
            frame, size = marker, body[1:6]
        if marker == EXIF_OR_XMP and body.startswith(b"Exif\0\0"):
            exif = exif or body[6:]
        elif marker == EXIF_OR_XMP and body.startswith(XMP_NAME):
            xmp = xmp or body
        if marker in METADATA:
            kept.append(data[start : found.start()])
            start = position
    else:
        raise _damaged(f"more than {MOST_SEGMENTS} segments")
    if not size:
        raise _damaged("its header has no size")
    height, width, components = struct.unpack(">HHB", size)
    has_more_scans = frame not in SEQUENTIAL or body[:1] != bytes((components,))
    scans = data.count(SCAN, found.start()) if has_more_scans else 1
    if scans * width * height > MOST_SCANNED_PIXELS:
        raise _damaged(f"{width}x{height} in {scans} scans")
    return Parts("JPEG", width, height, b"".join((data[:2], *kept, data[start:])), exif, xmp)


def _png(data: bytes) -> Parts:
    if data[8:16] != b"\0\0\0\x0dIHDR" or len(data) < 33:
        raise _damaged("its header has no size")
    width, height = struct.unpack_from(">II", data, 16)
    kept, exif, xmp, profile = [PNG_SIGNATURE], b"", b"", b""
    position = len(PNG_SIGNATURE)
    for _ in range(MOST_SEGMENTS):
        length, kind = struct.unpack_from(">I4s", data, position) if position + 8 <= len(data) else (0, b"")
        end = position + 12 + length
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND", b""):
            kept.append(data[position:end])
        elif end <= len(data):
            body = data[position + 8 : end - 4]
            if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                pass  # damaged metadata count as absent
            elif kind == b"eXIf":
                exif = exif or body
            elif kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0\0"):
                xmp = xmp or body
            elif kind in (b"tEXt", b"zTXt") and body.startswith(RAW_PROFILE):
                profile = profile or _raw_profile(body[len(RAW_PROFILE) :], kind == b"zTXt")
        position = end
        if kind == b"IEND" or position >= len(data):
            break
    else:
        raise _damaged(f"more than {MOST_SEGMENTS} chunks")
    return Parts("PNG", width, height, b"".join(kept), exif or profile, xmp)


def _raw_profile(text: bytes, packed: bool) -> bytes:
    """EXIF as ImageMagick writes it into a PNG's text: three lines, then hexadecimal digits."""
    try:
        if packed:  # after a byte that names the method
            text = zlib.decompressobj().decompress(text[1:], MOST_PROFILE_BYTES)
        return bytes.fromhex(b"".join(text[:MOST_PROFILE_BYTES].split(b"\n")[3:]).decode("ascii"))
    except (zlib.error, ValueError):
        return b""


def _webp(data: bytes) -> Parts:
    width, height = _webp_size(data)
    exif, xmp = b"", b""
    position = 12
    for _ in range(MOST_SEGMENTS):
        if position + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, position)
        position += 8
        if kind == b"EXIF":
            exif = exif or data[position : position + length]
        elif kind == b"XMP ":
            xmp = xmp or data[position : position + length]
        position += length + length % 2
    else:
        raise _damaged(f"more than {MOST_SEGMENTS} chunks")
    return Parts("WEBP", width, height, data, exif, xmp)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the first chunk (RFC 9649, sections 2.5 to 2.7)."""
    kind, body = data[12:16], data[20:30]
    if len(body) == 10:
        if kind == b"VP8X":
            return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        if kind == b"VP8L":
            bits = int.from_bytes(body[1:5], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if kind == b"VP8 ":
            return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise _damaged("its header has no size")
