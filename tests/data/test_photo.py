import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.data import photo
from pipeline.data.photo import BadPhoto, Scratch, decode, probe

SMOOTH = np.asarray(Image.effect_noise((24, 16), 60).resize((96, 64), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def colour_image() -> Image.Image:
    return Image.fromarray(np.stack([SMOOTH, SMOOTH[::-1], SMOOTH[:, ::-1]], axis=-1))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds nothing."""
    bodies = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")]
    chunks = [struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in bodies]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1"])
def test_every_mode_becomes_rgb(mode):
    image = colour_image().convert(mode)
    data = encoded(image, "PNG")
    np.testing.assert_array_equal(decode(data), np.asarray(image.convert("RGBA").convert("RGB")))


def test_a_cmyk_jpeg_is_decoded():
    image = colour_image()
    decoded = decode(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - np.asarray(image)).mean() < 4


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = SMOOTH.astype(np.uint16) * 257
    decoded = decode(encoded(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(decoded, np.repeat(SMOOTH[..., None], 3, axis=-1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("with_simplejpeg", [True, False])
def test_exif_orientation_is_applied(orientation, with_simplejpeg, monkeypatch):
    if not with_simplejpeg:
        monkeypatch.setattr(photo, "simplejpeg", None)
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(colour_image(), "JPEG", exif=exif, quality=95)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert probe(data) == (expected.shape[1], expected.shape[0])
    assert np.abs(decode(data).astype(int) - expected).max() <= 2  # decoders may differ in rounding


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not a picture at all", "not an image"),
        (png_header(40_000, 40_000), "million pixels"),
        (png_header(10_001, 10_000), "million pixels"),
        (encoded(Image.new("RGB", (1, 1)), "PNG"), "under 32 px"),
        (encoded(Image.new("RGB", (400, 31)), "JPEG"), "under 32 px"),
        (encoded(colour_image(), "JPEG")[:900], "cannot be decoded"),
        (encoded(colour_image(), "PNG")[:900], "cannot be decoded"),
    ],
    ids=["empty", "text", "bomb", "large", "tiny", "thin", "cut JPEG", "cut PNG"],
)
def test_a_bad_photo_is_refused_with_its_reason(data, reason):
    with pytest.raises(BadPhoto, match=reason):
        decode(data)


def test_a_bomb_is_refused_from_its_header(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(BadPhoto):
        decode(png_header(40_000, 40_000))


def test_a_png_named_jpg_is_a_photo():
    np.testing.assert_array_equal(decode(encoded(colour_image(), "PNG")), np.asarray(colour_image()))


def test_real_photos_decode_as_pillow_decodes_them(street_photos):
    for path in sorted(street_photos.rglob("*.jpg"))[::8]:
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        assert np.abs(decode(path.read_bytes()).astype(int) - expected).mean() < 0.5


def sizes_in_turn() -> list[bytes]:
    large, small = colour_image().resize((200, 150)), colour_image()
    return [encoded(image, "JPEG", quality=95) for image in (large, small, large)]


def test_scratch_memory_changes_no_pixel():
    scratch = Scratch()
    for data in sizes_in_turn():
        np.testing.assert_array_equal(decode(data, scratch=scratch), decode(data))


@pytest.mark.parametrize(("limit", "shared"), [(photo.MAX_SCRATCH_BYTES, True), (1000, False)])
def test_scratch_memory_is_used_again_up_to_a_limit(limit, shared, monkeypatch):
    monkeypatch.setattr(photo, "MAX_SCRATCH_BYTES", limit)
    scratch = Scratch()
    first, second = (decode(sizes_in_turn()[0], scratch=scratch) for _ in range(2))
    assert np.shares_memory(first, second) is shared


def test_threads_do_not_share_scratch_memory():
    scratch, data = Scratch(), sizes_in_turn()[0]
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(decode, data, scratch=scratch).result()
    assert not np.shares_memory(theirs, decode(data, scratch=scratch))
