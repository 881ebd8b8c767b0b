"""A first look at one photo: can it be decoded, where was it taken, what does it look like."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy.fft import dctn

from data_prep.metadata import check_gps
from data_prep.sources import Location
from pipeline.data.photo import PILLOW_ERRORS, BadPhoto, decode
from pipeline.data.vocabulary import MASK_CLASSES

THUMBNAIL_SIDE = 16
HASH_SIDE = 8
SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))
# Tags of EXIF and of its GPS block.
GPS_BLOCK = 0x8825
LATITUDE_REF, LATITUDE, LONGITUDE_REF, LONGITUDE = 1, 2, 3, 4


@dataclass(frozen=True)
class Reject:
    """An input that is not written, and why."""

    path: str
    reason: str
    stage: str
    """source, metadata, read or decode: what was tried last."""

    @property
    def kind(self) -> str:
        """The reason without what is particular to this photo, to count by."""
        return re.sub(r"^\d+x\d+, |:.*", "", self.reason)


@dataclass(frozen=True)
class Facts:
    """What a photo's bytes say."""

    sha256: str
    size_bytes: int
    extension: str
    """`jpg`, `png` or `webp`, by content and not by name."""
    width: int
    height: int
    gps: tuple[float, float] | None
    """From EXIF, in degrees."""
    phash: int
    """64 bits; near-duplicates differ in a few of them."""
    thumbnail: bytes
    """Grey levels of 16x16 cells."""
    mask_sha256: str | None


def inspect(name: str, photo: Location, mask: Location | None) -> Facts | Reject:
    """Read and decode one photo completely, since a file that ends early shows only then."""
    try:
        data = photo.read()
        mask_data = mask.read() if mask is not None else None
    except OSError as error:
        return Reject(name, f"cannot be read: {error.strerror}", "read")
    try:
        pixels = decode(data)
        extension = extension_of(data)
        if mask_data is not None:
            check_mask(mask_data)
    except BadPhoto as error:
        return Reject(name, str(error), "decode")
    small = thumbnail(pixels, 2 * THUMBNAIL_SIDE)
    return Facts(
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        extension=extension,
        width=pixels.shape[1],
        height=pixels.shape[0],
        gps=exif_gps(data),
        phash=perceptual_hash(small),
        thumbnail=thumbnail(small, THUMBNAIL_SIDE).tobytes(),
        mask_sha256=None if mask_data is None else hashlib.sha256(mask_data).hexdigest(),
    )


def extension_of(data: bytes) -> str:
    """`jpg`, `png` or `webp`, from the file's first bytes.

    Raises:
        BadPhoto: The image is of another format, which readers of shards do not expect.
    """
    for signature, extension in SIGNATURES:
        if data.startswith(signature):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise BadPhoto("neither JPEG, PNG nor WebP")


def check_mask(data: bytes) -> None:
    """A mask is a grey PNG whose values are 0 and the numbers of the classes.

    Raises:
        BadPhoto: It is not.
    """
    try:
        image = Image.open(io.BytesIO(data))
        values = np.asarray(image)
    except PILLOW_ERRORS as error:
        raise BadPhoto("the mask is not an image") from error
    if image.format != "PNG" or image.mode != "L":
        raise BadPhoto("the mask is not an 8-bit grey PNG")
    if values.max() > len(MASK_CLASSES):
        raise BadPhoto(f"the mask holds values above {len(MASK_CLASSES)}, the number of classes")


def exif_gps(data: bytes) -> tuple[float, float] | None:
    """Latitude and longitude in degrees from a photo's EXIF; None when absent or broken."""
    try:
        block = Image.open(io.BytesIO(data)).getexif().get_ifd(GPS_BLOCK)
        latitude = _degrees(block[LATITUDE], block[LATITUDE_REF], positive="N", negative="S")
        longitude = _degrees(block[LONGITUDE], block[LONGITUDE_REF], positive="E", negative="W")
    except (*PILLOW_ERRORS, KeyError, TypeError, ZeroDivisionError):
        return None
    return check_gps(round(latitude, 7), round(longitude, 7))[0]  # 1 cm


def thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """Mean grey level of each of side x side cells: uint8 [side, side], from uint8 [H, W] or [H, W, 3]."""
    image = Image.fromarray(pixels)
    image.thumbnail((8 * side, 8 * side), Image.Resampling.BOX)  # before the conversion: a fraction of the pixels
    return np.asarray(image.convert("L").resize((side, side), Image.Resampling.BOX))


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits, the signs of the lowest frequencies about their median.

    Coarse structure survives re-encoding and resizing (Zauner 2010, "Implementation and benchmarking of
    perceptual image hash functions", section 3.2). The median leaves out the constant term, the bits do not.

    Args:
        grey: uint8 [32, 32].
    """
    low = dctn(grey.astype(np.float64), norm="ortho")[:HASH_SIDE, :HASH_SIDE].ravel()
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")


def _degrees(parts: Any, hemisphere: Any, *, positive: str, negative: str) -> float:
    degrees, minutes, seconds = (float(part) for part in parts)
    sign = {positive: 1, negative: -1}[str(hemisphere).strip("\0 ").upper()]
    return sign * (degrees + minutes / 60 + seconds / 3600)
