"""The first look at a photo: broken files are refused with a reason, EXIF is read or ignored."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IFDRational

from data_prep.photos import inspection
from data_prep.photos.inspection import Facts, Reject, Scrutiny, check_mask, inspect, mask_path, thumbnail
from data_prep.sources.content import Location
from pipeline.data import photo_files
from pipeline.data.photo import BadPhoto, open_header
from tests.data_prep.examples import encode, jpeg, pixels


def look_at(folder: Path, data: bytes, mask: bytes | None = None) -> Facts | Reject:
    (folder / "photo").write_bytes(data)
    if mask is not None:
        (folder / "mask").write_bytes(mask)
    return inspect("photo", Location(str(folder / "photo")), Location(str(folder / "mask")) if mask else None)


def exif_gps(data: bytes) -> tuple[float, float] | None:
    return inspection.exif_gps(open_header(data))


def with_gps(latitude: object, north: object, longitude: object, east: object) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: north, 2: latitude, 3: east, 4: longitude})
    return encode(pixels(0), exif=exif)


@pytest.mark.parametrize(
    ("references", "expected"),
    [(("N", "E"), (55.5, 13.25)), (("S", "W"), (-55.5, -13.25)), (("n", "W\0"), (55.5, -13.25))],
)
def test_exif_hemispheres_give_the_sign(references, expected):
    data = with_gps((55.0, 30.0, 0.0), references[0], (13.0, 14.0, 60.0), references[1])
    assert exif_gps(data) == expected


def test_exif_rationals_are_divided():
    third = IFDRational(100, 3)
    latitude, longitude = exif_gps(with_gps((third, 0, 0), "N", (IFDRational(1, 7), 0, 0), "E"))
    assert latitude == pytest.approx(100 / 3, abs=1e-6)
    assert longitude == pytest.approx(1 / 7, abs=1e-6)


@pytest.mark.parametrize(
    "block",
    [
        ((55.0, 30.0), "N", (13.0, 14.0, 0.0), "E"),  # no seconds
        ((55.0, 30.0, 0.0), "", (13.0, 14.0, 0.0), "E"),  # no hemisphere
        ((95.0, 0.0, 0.0), "N", (13.0, 14.0, 0.0), "E"),
        ((0.0, 0.0, 0.0), "N", (0.0, 0.0, 0.0), "E"),  # no fix
        ((IFDRational(0, 0), 0, 0), "N", (13.0, 14.0, 0.0), "E"),
    ],
)
def test_broken_exif_gps_is_null(block):
    assert exif_gps(with_gps(*block)) is None


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_photos_without_exif_or_with_garbage_in_its_place_have_no_gps(tmp_path):
    assert exif_gps(jpeg(0)) is None
    data = with_gps((55.0, 30.0, 0.0), "N", (13.0, 14.0, 0.0), "E")
    start = data.index(b"Exif") + 14
    garbage = data[:start] + b"\xff" * 40 + data[start + 40 :]
    assert exif_gps(garbage) is None
    assert isinstance(look_at(tmp_path, garbage), Facts)


@pytest.mark.parametrize(("format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_the_extension_follows_the_content(tmp_path, format, extension):
    facts = look_at(tmp_path, encode(pixels(0), format))
    assert isinstance(facts, Facts)
    assert (facts.extension, facts.width, facts.height) == (extension, 96, 64)


def test_sizes_are_those_of_the_upright_photo(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    facts = look_at(tmp_path, encode(pixels(0), exif=exif))
    assert isinstance(facts, Facts)
    assert (facts.width, facts.height) == (64, 96)


def png_header(side: int) -> bytes:
    """A grey PNG of a few bytes whose header promises side x side pixels."""
    data = bytearray(encode(np.zeros((40, 40), dtype=np.uint8), "PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not an image"),
        (jpeg(0)[:-200], "cannot be decoded"),
        (jpeg(0)[: len(jpeg(0)) // 2], "cannot be decoded"),
        (encode(pixels(0), "PNG")[:-900], "cannot be decoded"),
        (encode(np.zeros((1, 1, 3), dtype=np.uint8)), "a side is under 32 px"),
        (png_header(40_000), "million pixels"),
        (encode(pixels(0), "BMP"), "BMP; convert it to JPEG"),
    ],
)
def test_unusable_files_are_rejects_with_a_reason(tmp_path, data, reason):
    reject = look_at(tmp_path, data)
    assert isinstance(reject, Reject)
    assert reason in reject.reason
    assert reject.stage == "decode"


def test_kinds_of_rejects_leave_out_what_is_particular():
    assert Reject("a", "1x2, a side is under 32 px", "decode").kind == "a side is under 32 px"
    assert Reject("a", "cannot be decoded: 17 bytes missing", "decode").kind == "cannot be decoded"


def test_a_file_that_vanished_is_a_reject(tmp_path):
    reject = inspect("gone", Location(str(tmp_path / "gone")), None)
    assert reject == Reject("gone", "cannot be read: No such file or directory", "read")


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (encode(np.full((64, 96), 6, dtype=np.uint8), "PNG"), None),
        (encode(np.full((64, 96), 7, dtype=np.uint8), "PNG"), "values above 6"),
        (encode(np.zeros((64, 96, 3), dtype=np.uint8), "PNG"), "8-bit grey PNG"),
        (encode(np.zeros((64, 96), dtype=np.uint8), "JPEG"), "not PNG, but JPEG"),
        (encode(pixels(0)[..., 0] % 7, "PNG")[:-900], "the mask cannot be decoded"),
        (b"nothing", "not an image"),
    ],
)
def test_masks_hold_class_numbers(tmp_path, mask, reason):
    found = look_at(tmp_path, jpeg(0), mask)
    if reason is None:
        assert isinstance(found, Facts)
    else:
        assert isinstance(found, Reject)
        assert reason in found.reason


@pytest.mark.parametrize("shape", [(96, 64), (32, 48), (65, 96), (128, 192)])
def test_a_mask_of_another_size_than_its_photo_is_a_reject(tmp_path, shape):
    found = look_at(tmp_path, jpeg(0), encode(np.zeros(shape, dtype=np.uint8), "PNG"))
    reason = f"the mask is of another size: {shape[1]}x{shape[0]}, the photo is 96x64"
    assert found == Reject("photo", reason, "decode")
    assert found.kind == "the mask is of another size"


def test_a_mask_has_the_size_of_the_upright_photo(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    photo, mask = encode(pixels(0), exif=exif), np.zeros((96, 64), dtype=np.uint8)
    assert isinstance(look_at(tmp_path, photo, encode(mask, "PNG")), Facts)
    assert isinstance(look_at(tmp_path, photo, encode(mask.T, "PNG")), Reject)


def test_a_mask_that_promises_more_pixels_than_its_photo_is_not_decoded(monkeypatch):
    mask = png_header(9600)
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("pixels were read"))
    with pytest.raises(BadPhoto, match="9600x9600, the photo is 96x64"):
        check_mask(mask, (96, 64))


def test_the_mask_of_a_folder_is_taken_unless_it_is_not_there(tmp_path):
    (tmp_path / "photo").write_bytes(jpeg(0))
    photo, scrutiny = Location(str(tmp_path / "photo")), Scrutiny(masks=str(tmp_path))
    without = inspect("photo", photo, None, scrutiny)
    assert isinstance(without, Facts)
    assert (without.mask_sha256, without.mask_from_folder) == (None, False)
    mask = mask_path(tmp_path, without.sha256)
    mask.write_bytes(encode(np.zeros((64, 96), dtype=np.uint8), "PNG"))
    found = inspect("photo", photo, None, scrutiny)
    assert isinstance(found, Facts)
    assert found.mask_from_folder
    mask.unlink()
    mask.mkdir()
    reason = "its mask cannot be read: a folder and not a file"
    assert inspect("photo", photo, None, scrutiny) == Reject("photo", reason, "read")


def test_real_photos_lie_where_their_exif_says(street_photos):
    for city, place in (("lund", (55.698, 13.195)), ("berlin", (52.519, 13.400))):
        for path in sorted((street_photos / city).iterdir()):
            gps = exif_gps(path.read_bytes())
            assert gps == pytest.approx(place, abs=0.005), path


def test_the_hash_reads_a_downscaled_photo_as_it_reads_the_photo():
    # The thumbnail goes through a reduced decode; the answer must not depend on that.
    image = pixels(3, 1600, 1200)
    small = np.asarray(Image.open(io.BytesIO(encode(Image.fromarray(image).resize((400, 300)), "PNG"))))
    assert np.abs(thumbnail(image, 16).astype(int) - thumbnail(small, 16)).max() <= 2


@pytest.mark.parametrize(
    ("minutes", "seconds", "expected"),
    [
        (46.5, IFDRational(0, 0), 39.775),
        (IFDRational(4650, 100), IFDRational(0, 0), 39.775),
        (46.5, IFDRational(5, 0), None),
        (IFDRational(0, 0), 0, None),
    ],
)
def test_seconds_of_nought_by_nought_are_nought(minutes, seconds, expected):
    data = with_gps((39, minutes, seconds), "N", (86, minutes, seconds), "W")
    assert exif_gps(data) == (None if expected is None else (expected, -86.775))


@pytest.mark.parametrize(
    "photo", [b"%!PS-Adobe-3.0 EPSF-3.0\n", encode(pixels(0), "GIF"), b"\0\0\0\x18ftypheic\0\0\0\0heic"]
)
def test_other_formats_are_rejects_that_say_what_to_do(tmp_path, photo):
    reject = look_at(tmp_path, photo)
    assert isinstance(reject, Reject)
    assert reject.reason == "not an image" or reject.reason.endswith("; convert it to JPEG")
    assert reject.kind == reject.reason


@pytest.mark.parametrize("what", ["FIFO", "device"])
def test_what_is_no_file_is_a_reject_as_a_photo_and_as_a_mask(tmp_path, what):
    place = tmp_path / what
    os.mkfifo(place) if what == "FIFO" else place.symlink_to("/dev/zero")
    (tmp_path / "photo").write_bytes(jpeg(0))
    odd, photo = Location(str(place)), Location(str(tmp_path / "photo"))
    assert inspect("photo", odd, None) == Reject("photo", f"a {what} and not a file", "read")
    reason = f"its mask cannot be read: a {what} and not a file"
    assert inspect("photo", photo, odd) == Reject("photo", reason, "read")


def test_a_file_over_the_limit_is_a_reject_wherever_its_bytes_come_from(tmp_path, monkeypatch):
    data = jpeg(0)
    (tmp_path / "photo").write_bytes(data)
    for module in (inspection, photo_files):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", len(data) - 1)
    for content in (Location(str(tmp_path / "photo")), Location(str(tmp_path / "photo"), 0, len(data)), data):
        reject = inspection.read_photo("photo", content)
        assert isinstance(reject, Reject)
        assert reject.reason.startswith("the file is larger than")


def test_looking_at_headers_decodes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("was decoded"))
    for kind in ("JPEG", "PNG", "WEBP"):
        (tmp_path / "photo").write_bytes(encode(pixels(0), kind))
        facts = inspect("photo", Location(str(tmp_path / "photo")), None, Scrutiny(decode=False))
        assert isinstance(facts, Facts)
        assert (facts.width, facts.height) == (96, 64)
