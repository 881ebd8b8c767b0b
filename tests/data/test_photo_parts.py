"""Taking photos apart: metadata cost no photo, other formats are named, and nothing claims more than it may."""

from __future__ import annotations

import ast
import io
import random
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from pipeline.data import photo_parts
from pipeline.data.photo import BadPhoto, decode, decode_mask, open_header, probe
from pipeline.data.photo_parts import take_apart
from tests.fuzz.photos import Base, bases, chunk

ROOT = Path(__file__).parents[2]
EXIF_ROTATED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def base(name: str, kind: str) -> bytes:
    return next(one.data for one in bases() if (one.name, one.format) == (name, kind))


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def saved(kind: str) -> bytes:
    with io.BytesIO() as stream:
        Image.new("RGB", (64, 64), (9, 90, 200)).save(stream, kind)
        return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (saved("GIF"), "GIF"), (saved("BMP"), "BMP"), (saved("TIFF"), "TIFF"), (saved("JPEG2000"), "JPEG 2000"),
        (saved("AVIF"), "AVIF"), (b"MM\0*\0\0\0\x08" + bytes(40), "TIFF"), (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"), (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"), (b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom", "CR3"),
    ],
)  # fmt: skip
def test_formats_that_are_not_read_are_named(data, name):
    with pytest.raises(BadPhoto, match=f"^{name}; convert it to JPEG$"):
        decode(data)


@pytest.mark.parametrize(
    "data", [EPS, b"%PDF-1.7\n", b"<svg/>", b"BM, a text", b"\0\0\0\x18ftypisom\0\0\0\0mp42", b"\xff"]
)
def test_what_is_no_photo_is_not_an_image_and_starts_no_program(data, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    for reads in (decode, decode_mask, probe):
        with pytest.raises(BadPhoto, match="not an image"):
            reads(data)


@pytest.mark.parametrize("folder", ["pipeline", "data_prep", "benchmarks", "docs"])
def test_every_image_is_opened_with_the_formats_that_are_expected(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "Image.open":
                assert "formats" in {keyword.arg for keyword in call.keywords}, f"{file}:{call.lineno}"


@pytest.mark.parametrize("one", bases(), ids=lambda one: f"{one.format} {one.name}")
def test_the_picture_is_what_pillow_decodes_from_the_whole_file(one: Base):
    with Image.open(io.BytesIO(one.data)) as image:
        assert probe(one.data) == image.size
        if image.mode.startswith("I"):
            expected = np.repeat(np.asarray(image)[..., None] // 257, 3, axis=-1)
        else:
            expected = np.asarray(image.convert("RGBA").convert("RGB"))
    np.testing.assert_array_equal(decode(one.data), expected)


def test_of_an_animation_the_first_frame_is_taken():
    still = decode(base("RGB", "PNG"))
    np.testing.assert_array_equal(decode(base("animation", "PNG")), still)
    assert np.abs(decode(base("animation", "WEBP")).astype(int) - still).mean() < 8


@pytest.mark.parametrize("value", [b"\0\x02", b"\0\x05", b"\0\x07", b"\0\x0b", b"\0\x0c", b"\xff\xff"])
def test_a_rotated_photo_whose_exif_has_tags_of_wrong_types_is_turned_all_the_same(value):
    # Rewriting such a block, as `ImageOps.exif_transpose` does, raises a TypeError for most of these.
    entries = b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + b"".join(
        tag + value + b"\0\0\0\x01\0\0\0\x08" for tag in (b"\x01\x1a", b"\x82\x98", b"\x87\x69", b"\x88\x25")
    )
    block = b"MM\0*\0\0\0\x08\0\x05" + entries + bytes(4)
    good = base("baseline", "JPEG")
    data = good[:2] + segment(0xE1, b"Exif\0\0" + block) + good[2:]
    np.testing.assert_array_equal(decode(data), np.rot90(decode(good), -1))


@pytest.mark.parametrize(
    "metadata",
    [
        segment(0xE1, b"Exif\0\0MM"),
        segment(0xE1, b"Exif\0\0" + bytes(60)),
        segment(
            0xE2, b"MPF\0MM\0*\0\0\0\x08\0\x01\xb0\x01\0\x04\0\0\0\x01\0\0\0\x09\0\0\0\0"
        ),  # nine pictures, and no list
        segment(0xE2, b"ICC_PROFILE\0\x01\x01" + bytes(20)),
        segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff"),
        segment(0xFE, b"a comment") * 300,
    ],
)
def test_damaged_metadata_cost_no_jpeg(metadata):
    good = base("baseline", "JPEG")
    data = good[:2] + metadata + good[2:]
    assert take_apart(data).picture == take_apart(good).picture  # what the decoders get
    np.testing.assert_array_equal(decode(data), decode(good))


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"zTXt", b"a word\0\0" + zlib.compress(bytes(80 << 20))),
        chunk(b"iCCP", b"a name\0\0" + zlib.compress(bytes(8 << 20))),
        chunk(b"tEXt", b"no end of the word"),
        chunk(b"acTL", b"") + chunk(b"fcTL", b""),
        chunk(b"eXIf", b"MM"),
        chunk(b"tIME", bytes(7))[:-1] + b"?",
    ],
)
def test_damaged_metadata_cost_no_png(metadata):
    good = base("RGB", "PNG")
    data = good[:33] + metadata + good[33:]
    assert take_apart(data).picture == take_apart(good).picture
    np.testing.assert_array_equal(decode(data), decode(good))


@pytest.mark.parametrize("behind", [False, True])
def test_the_header_of_a_png_gives_the_orientation_and_decodes_nothing(behind, monkeypatch):
    good = base("RGB", "PNG")
    place = good.index(b"IEND") - 4 if behind else 33
    data = good[:place] + chunk(b"eXIf", EXIF_ROTATED) + good[place:]
    np.testing.assert_array_equal(decode(data), np.rot90(decode(good), -1))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("was decoded"))
    assert (probe(good), probe(data)) == ((96, 64), (64, 96))


def test_orientations_in_text_and_xmp_count_where_exif_has_none():
    good = base("RGB", "PNG")
    profile = b"\nexif\n%8d\n" % len(EXIF_ROTATED) + EXIF_ROTATED.hex().encode()
    name, xmp = b"Raw profile type exif\0", b'<rdf:Description tiff:Orientation="6"/>'
    blocks = (
        chunk(b"tEXt", name + profile),
        chunk(b"zTXt", name + b"\0" + zlib.compress(profile)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    )
    for block in blocks:
        data = good[:33] + block + good[33:]
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(decode(data), np.asarray(ImageOps.exif_transpose(image)))
        assert open_header(data).orientation == 6
    jpeg = base("baseline", "JPEG")
    jpeg = jpeg[:2] + segment(0xE1, photo_parts.XMP_NAME + xmp) + jpeg[2:]
    assert open_header(jpeg).orientation == 6


def test_a_webp_that_claims_too_much_is_refused_before_its_decoder_takes_memory(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("was opened"))
    data = bytearray(base("animation", "WEBP"))
    data[24:30] = b"\xff\x3f\0\xff\x3f\0"
    with pytest.raises(BadPhoto, match="16384x16384, more than 80 million pixels"):
        probe(bytes(data))


def test_a_jpeg_with_thousands_of_scans_is_refused():
    good = base("progressive", "JPEG")
    start = good.rindex(b"\xff\xda")
    few, many = (good[:start] + good[start:-2] * count + good[-2:] for count in (3, 700_000))
    np.testing.assert_array_equal(decode(few).shape, decode(good).shape)
    with pytest.raises(BadPhoto, match=r"96x64 in 7000\d\d scans"):
        decode(many)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xd8" + segment(0xFE, b"") * 1001, "more than 1000 segments"),
        (base("RGB", "PNG")[:33] + chunk(b"tEXt", b"") * 1001, "more than 1000 chunks"),
        (base("lossy", "WEBP") + b"JUNK\0\0\0\0" * 1001, "more than 1000 chunks"),
        (b"\xff\xd8\xff" + b"\xff" * 1_000_000, "ends before its picture"),
        (b"\xff\xd8\xff\xd9", "ends before its picture"),
        (b"\xff\xd8\xff\xe1\xff\xff", "ends within its header"),
        (b"\xff\xd8" + segment(0xDA, bytes(10)), "has no size"),
        (base("RGB", "PNG")[:30], "has no size"),
        (base("lossy", "WEBP")[:28], "has no size"),
    ],
)
def test_a_structure_without_end_or_picture_is_one_reason(data, reason, monkeypatch):
    monkeypatch.setattr(photo_parts, "MOST_SEGMENTS", 1000)
    with pytest.raises(BadPhoto, match=reason):
        probe(data)


@pytest.mark.parametrize("error", [TypeError, KeyError, AssertionError, OverflowError, RecursionError, zlib.error])
@pytest.mark.parametrize("place", ["open", "load"])
def test_whatever_a_decoder_raises_is_a_bad_photo(error, place, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error("a reason\nand more")

    owner = Image if place == "open" else ImageFile.ImageFile
    monkeypatch.setattr(owner, place, fail)
    with pytest.raises(BadPhoto, match=r"^cannot be decoded: .*a reason"):
        decode(base("RGB", "PNG"))


def test_a_lack_of_memory_is_not_held_against_the_photo(monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        decode(base("RGB", "PNG"))


def test_large_photos_are_converted_in_strips_that_leave_no_seams(monkeypatch):
    for one in bases():
        whole = decode(one.data)
        monkeypatch.setattr("pipeline.data.photo.STRIP_PIXELS", random.Random(one.name).randint(1, 1000))
        np.testing.assert_array_equal(decode(one.data), whole)
