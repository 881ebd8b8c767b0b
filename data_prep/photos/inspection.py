"""A first look at one photo: can it be decoded, where was it taken, what does it look like."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.sources.content import Content, Location
from data_prep.sources.coordinates import check_gps
from pipeline.data.exif import LATITUDE, LATITUDE_REF, LONGITUDE, LONGITUDE_REF, Value, gps_of
from pipeline.data.photo import BadPhoto, Header, decode, decode_mask, open_header
from pipeline.data.photo_files import MAX_FILE_BYTES
from pipeline.files import write_text
from pipeline.names import MASK_CLASSES

HASHED_SIDE = 32
THUMBNAIL_SIDE = 16
HASH_SIDE = 8
LIBRARIES = ("scipy.fft", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.WebPImagePlugin")  # imported at first use
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Reject:
    """An input that is not written, and why."""

    path: str
    reason: str
    stage: str
    """The stage that failed: source, metadata, read or decode."""

    @property
    def kind(self) -> str:
        """The reason without details of this photo, so that rejects can be counted by it."""
        return re.sub(r"^\d+x\d+, |:.*", "", self.reason)


def count_kinds(rejects: Sequence[Reject]) -> dict[str, int]:
    """Kind of reason to number of rejects, the most frequent first."""
    return dict(Counter(reject.kind for reject in rejects).most_common())


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """Write one line of JSON for each reject."""
    write_text(path, "".join(json.dumps(asdict(reject)) + "\n" for reject in rejects))


@dataclass(frozen=True)
class Facts:
    """Facts that follow from a photo's bytes."""

    sha256: str
    size_bytes: int
    extension: str
    """`jpg`, `png` or `webp`, by content and not by name."""
    width: int
    height: int
    gps: tuple[float, float] | None
    """Latitude and longitude from EXIF, in degrees."""
    phash: int | None
    """64 bits; near-duplicates differ in a few of them. None where only the header was read."""
    thumbnail: bytes
    """Grey levels of 16x16 cells; empty where only the header was read."""
    mask_sha256: str | None
    mask_from_folder: bool = False
    """Whether the mask comes from the folder of masks."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {**vars(self), "thumbnail": self.thumbnail.hex()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Facts:
        """The inverse of `to_json`."""
        gps = None if values["gps"] is None else (values["gps"][0], values["gps"][1])
        return cls(**{**values, "gps": gps, "thumbnail": bytes.fromhex(values["thumbnail"])})


@dataclass(frozen=True)
class Scrutiny:
    """How closely photos are looked at, and where further masks are."""

    decode: bool = True
    """Decode every pixel; otherwise only the header is read, which finds no truncation and no near-duplicates."""
    masks: str | None = None
    """Folder of masks named by the SHA-256 of their photo."""


@dataclass(frozen=True)
class Appearance:
    """What a photo looks like, to compare it with others."""

    phash: int
    """64 bits; near-duplicates differ in a few of them."""
    thumbnail: bytes
    """Grey levels of 16x16 cells."""


def appearance_of(data: bytes) -> Appearance:
    """Decode a photo and note what it looks like.

    Raises:
        BadPhoto: The photo cannot be decoded.
    """
    small = thumbnail(decode(data, at_least_px=8 * HASHED_SIDE), HASHED_SIDE)
    return Appearance(perceptual_hash(small), thumbnail(small, THUMBNAIL_SIDE).tobytes())


def mask_path(masks: Path | str, sha256: str) -> Path:
    """Path of a photo's mask in a folder of masks."""
    return Path(masks) / f"{sha256}.png"


def inspect(name: str, photo: Location, mask: Content | None, scrutiny: Scrutiny = Scrutiny()) -> Facts | Reject:
    """Read a photo once and note all that later stages need.

    Args:
        name: Name of the photo, for a reject.
        photo: Where the photo's bytes are.
        mask: The content of the photo's mask, if the source has one.
        scrutiny: How closely to look.
    """
    data = read_photo(name, photo)
    if isinstance(data, Reject):
        return data
    try:
        mask_data = _read_mask(mask)
        header = open_header(data)
        width, height = header.size
        digest = hashlib.sha256(data).hexdigest()
        look = appearance_of(data) if scrutiny.decode else None
        from_folder = mask_data is None and scrutiny.masks is not None
        if from_folder and (path := mask_path(scrutiny.masks or "", digest)).exists():
            mask_data = _read_mask(Location(str(path)))
        if mask_data is not None:
            check_mask(mask_data, (width, height))
    except OSError as error:
        return Reject(name, f"its mask cannot be read: {error.strerror or error}", "read")
    except BadPhoto as error:
        return Reject(name, str(error), "decode")
    return Facts(
        sha256=digest,
        size_bytes=len(data),
        extension=EXTENSIONS[header.parts.format],
        width=width,
        height=height,
        gps=exif_gps(header),
        phash=None if look is None else look.phash,
        thumbnail=b"" if look is None else look.thumbnail,
        mask_sha256=None if mask_data is None else hashlib.sha256(mask_data).hexdigest(),
        mask_from_folder=from_folder and mask_data is not None,
    )


def read_photo(name: str, photo: Location | bytes) -> bytes | Reject:
    """The photo's bytes, or a reject if they cannot be read or are too many.

    Args:
        name: Name of the photo, for a reject.
        photo: Where the bytes are, or the bytes themselves.
    """
    try:
        data = photo if isinstance(photo, bytes) else photo.read()
        if len(data) > MAX_FILE_BYTES:
            raise BadPhoto(f"the file is larger than {MAX_FILE_BYTES >> 20} MB")
    except OSError as error:
        return Reject(name, f"cannot be read: {error.strerror or error}", "read")
    except BadPhoto as error:
        return Reject(name, str(error), "read")
    return data


def _read_mask(mask: Content | None) -> bytes | None:
    """The mask's bytes; raises OSError where its file cannot be read, and BadPhoto where it cannot be drawn."""
    if mask is None or isinstance(mask, bytes):
        return mask
    try:
        return mask.read()
    except BadPhoto as error:
        if isinstance(mask, Location):
            raise OSError(str(error)) from error
        raise


def check_mask(data: bytes, size: tuple[int, int] | None = None) -> None:
    """Check that a mask is a grey PNG of its photo's size whose values are 0 and the numbers of the classes.

    Args:
        data: The mask's file.
        size: Width and height of the upright photo in pixels; None where it is not known.

    Raises:
        BadPhoto: The mask is something else. Pixels are decoded only if the header shows nothing wrong.
    """

    def check(image: Image.Image) -> None:
        if image.mode != "L":
            raise BadPhoto("the mask is not an 8-bit grey PNG")
        if size is not None and image.size != size:
            sizes = f"{image.width}x{image.height}, the photo is {size[0]}x{size[1]}"
            raise BadPhoto(f"the mask is of another size: {sizes}")

    if decode_mask(data, check).max() > len(MASK_CLASSES):
        raise BadPhoto(f"the mask holds values above {len(MASK_CLASSES)}, the number of classes")


def exif_gps(header: Header) -> tuple[float, float] | None:
    """Latitude and longitude in degrees from a photo's EXIF; None when absent or broken."""
    block = gps_of(header.parts.exif)
    latitude = _degrees(block.get(LATITUDE), block.get(LATITUDE_REF), positive=b"N", negative=b"S")
    longitude = _degrees(block.get(LONGITUDE), block.get(LONGITUDE_REF), positive=b"E", negative=b"W")
    if latitude is None or longitude is None:
        return None
    return check_gps(round(latitude, 7), round(longitude, 7))[0]  # 1 cm


def thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """Mean grey level of each of side x side cells: uint8 [side, side], from uint8 [H, W] or [H, W, 3]."""
    image = Image.fromarray(pixels)
    # Before the conversion: a fraction of the pixels. In one step, since a rough first one would shift the cells.
    image.thumbnail((8 * side, 8 * side), Image.Resampling.BOX, reducing_gap=None)
    return np.asarray(image.convert("L").resize((side, side), Image.Resampling.BOX))


def perceptual_hash(grey: np.ndarray) -> int:
    """A perceptual hash of 64 bits: whether each of the lowest frequencies is above their median.

    Coarse structure survives re-encoding and resizing (Zauner 2010, "Implementation and benchmarking of
    perceptual image hash functions", section 3.2). The constant term has a bit too, but does not count for the median.

    Args:
        grey: uint8 [32, 32].
    """
    from scipy.fft import dctn  # a third of a second, and many imports of this module do without

    low = dctn(grey.astype(np.float64), norm="ortho")[:HASH_SIDE, :HASH_SIDE].ravel()
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")


def _degrees(parts: Value | None, hemisphere: Value | None, *, positive: bytes, negative: bytes) -> float | None:
    """Degrees with their sign; None where anything but the seconds is missing or no number."""
    if not isinstance(parts, tuple) or len(parts) != 3 or not isinstance(hemisphere, bytes):
        return None
    degrees, minutes, seconds = parts
    sign = {positive: 1, negative: -1}.get(hemisphere.strip(b"\0 ").upper())
    seconds = 0 if math.isnan(seconds) else seconds  # 0/0 is what cameras write that give minutes with a fraction
    value = degrees + minutes / 60 + seconds / 3600
    return sign * value if sign is not None and math.isfinite(value) else None
