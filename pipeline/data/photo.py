"""Decode the bytes of a photo to RGB pixels, whatever the format."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.exif import orientation_of
from pipeline.data.photo_parts import BadPhoto, Parts, take_apart

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes JPEG too, at about half the speed
    simplejpeg = None

__all__ = ["BadPhoto", "Header", "Scratch", "decode", "decode_mask", "open_header", "open_picture", "probe", "turn"]

MIN_SIDE_PX = 32
MAX_PIXELS = 100_000_000
MAX_WEBP_PIXELS = 80_000_000  # its decoder holds each pixel four times, which is 1.3 GB; other formats stay under that
MAX_SCRATCH_BYTES = 100_000_000  # 33 million pixels; larger photos are rare, and not worth holding memory for
STRIP_PIXELS = 1 << 20  # converted at a time, which takes a hundredth of the memory of a large photo
QUARTER_TURN = 5  # EXIF orientations from here on swap width and height
# EXIF 2.32, section 4.6.4: orientation to what turns the stored picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Scratch(threading.local):
    """Memory of a thread, into which it decodes one JPEG after the other.

    A 12-megapixel photo is 36 MB, which the system would clear page by page for each photo and take back afterwards:
    a tenth of the time that decoding takes.
    """

    def __init__(self) -> None:
        """Start empty; the memory grows with the photos."""
        self._memory = np.empty(0, dtype=np.uint8)

    def take(self, size: int) -> np.ndarray | None:
        """Memory of `size` bytes, valid until the next call; None where the decoder should allocate its own."""
        if size > MAX_SCRATCH_BYTES:
            return None
        if size > len(self._memory):
            self._memory = np.empty(size, dtype=np.uint8)
        return self._memory


@dataclass(frozen=True)
class Header:
    """What is known of a photo without its pixels."""

    parts: Parts
    image: Image.Image
    """Pillow's image of the picture, not decoded yet."""
    orientation: int
    """EXIF orientation, 1 to 8; 1, upright, where it is not given or cannot be read."""

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height in pixels, before EXIF orientation."""
        return self.parts.width, self.parts.height

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the upright photo."""
        width, height = self.stored_size
        return (width, height) if self.orientation < QUARTER_TURN else (height, width)


def probe(data: bytes) -> tuple[int, int]:
    """Width and height in pixels after EXIF orientation, read from the header alone.

    Raises:
        BadPhoto: The bytes are no image, or its size is refused: a side under 32 px, or over 100 million pixels
            (WebP: 80).
    """
    return open_header(data).size


def decode(data: bytes, at_least_px: int | None = None, scratch: Scratch | None = None) -> np.ndarray:
    """Decode a photo to uint8 [H, W, 3], RGB, upright.

    Greyscale, palette, CMYK, alpha (dropped) and 16-bit images become 8-bit RGB; of an animation, the first frame is
    taken. The size is checked before decoding. Metadata change nothing but the orientation.

    Args:
        data: The photo's file.
        at_least_px: Size that both sides need at least: a JPEG is then decoded at a fraction of its size, in eighths,
            which is faster and finds the same damage. None for full size.
        scratch: Memory for a JPEG; the next photo that is decoded into it overwrites the pixels.

    Raises:
        BadPhoto: The bytes are no image, or it is truncated, too small or too large.
    """
    header = open_header(data)
    with _reading():
        pixels = _decode_quickly(header, at_least_px, scratch)
        return _decode_with_pillow(header, at_least_px) if pixels is None else pixels


def decode_mask(data: bytes, check: Callable[[Image.Image], None] = lambda image: None) -> np.ndarray:
    """The grey levels of a mask, a PNG, as uint8 [H, W].

    Args:
        data: The mask's file.
        check: Looks at the header before pixels are decoded, and raises `BadPhoto` where it shows something wrong.

    Raises:
        BadPhoto: The bytes are no PNG, or it is damaged.
    """
    try:
        image = open_picture(take_apart(data), ("PNG",))
    except BadPhoto as error:
        raise _of_mask(error) from error
    check(image)
    try:
        with _reading():
            return np.asarray(image.convert("L"))
    except BadPhoto as error:
        raise _of_mask(error) from error


def _of_mask(error: BadPhoto) -> BadPhoto:
    if str(error).startswith("not "):
        return BadPhoto(f"the mask is {error}")
    return BadPhoto(f"the mask cannot be decoded: {str(error).removeprefix('cannot be decoded: ')}")


def open_header(data: bytes) -> Header:
    """Read a photo's header, without pixels.

    Raises:
        BadPhoto: The image is refused, see `probe`.
    """
    parts = take_apart(data)
    if min(parts.width, parts.height) < MIN_SIDE_PX:
        raise BadPhoto(f"{parts.width}x{parts.height}, a side is under {MIN_SIDE_PX} px")
    return Header(parts, open_picture(parts), orientation_of(parts.exif, parts.xmp))


def open_picture(parts: Parts, formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP")) -> Image.Image:
    """Open a picture with Pillow, without its metadata and without decoding it.

    Args:
        parts: The picture.
        formats: Formats that are allowed.

    Raises:
        BadPhoto: It has another format, more than 100 million pixels (WebP: 80), or a damaged header.
    """
    if parts.format not in formats:
        raise BadPhoto(f"not {' or '.join(formats)}, but {parts.format}")
    most = MAX_WEBP_PIXELS if parts.format == "WEBP" else MAX_PIXELS
    if parts.width * parts.height > most:
        raise BadPhoto(f"{parts.width}x{parts.height}, more than {most // 10**6} million pixels")
    with _reading():
        image = Image.open(io.BytesIO(parts.picture), formats=(parts.format,))
    if image.size != (parts.width, parts.height):
        raise BadPhoto("cannot be decoded: its header gives two sizes")
    return image


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """A stored picture as it is upright, by its EXIF orientation from 1 to 8."""
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


@contextmanager
def _reading() -> Iterator[None]:
    """Turn whatever a decoder raises into a `BadPhoto`, and keep its warnings quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (BadPhoto, MemoryError):  # memory is not the photo's fault: sizes are checked
        raise
    except Exception as error:  # what broken input raises depends on the format, the version and the damage
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadPhoto(f"cannot be decoded: {reason}") from error


def _decode_quickly(header: Header, at_least_px: int | None, scratch: Scratch | None) -> np.ndarray | None:
    """Decode an upright JPEG with simplejpeg; None where Pillow has to do it."""
    image = header.image
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or header.orientation != 1 or simplejpeg is None:
        return None
    small = {} if at_least_px is None else {"min_height": at_least_px, "min_width": at_least_px}
    data = header.parts.picture
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (image.height, image.width):
            return None  # before anything of the other size is made
        buffer = scratch.take(3 * image.width * image.height) if scratch else None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, buffer=buffer, **small)
    except ValueError:
        return None  # strict refuses harmless warnings too; Pillow distinguishes them from a truncated file
    return pixels


def _decode_with_pillow(header: Header, at_least_px: int | None) -> np.ndarray:
    image = header.image
    if at_least_px is not None:
        image.draft(None, (at_least_px, at_least_px))
    image.load()
    return _to_rgb(turn(image, header.orientation))


def _to_rgb(image: Image.Image) -> np.ndarray:
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if strip.mode.startswith("I"):
            # 16-bit grey. Pillow's convert would clip at 255 instead of scaling.
            grey = (np.asarray(strip, dtype=np.uint32) + 128) // 257
            pixels[top : top + rows] = grey[..., None]
        else:
            pixels[top : top + rows] = np.asarray(strip.convert("RGB"))
    return pixels
