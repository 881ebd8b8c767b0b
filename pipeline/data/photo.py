"""Decode the bytes of a photo to RGB pixels, whatever the format."""

from __future__ import annotations

import io
import struct
import threading
import warnings

import numpy as np
from PIL import Image, ImageOps

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes JPEG too, at about half the speed
    simplejpeg = None

MIN_SIDE_PX = 32
MAX_PIXELS = 100_000_000
MAX_SCRATCH_BYTES = 100_000_000  # 33 million pixels; larger photos are rare, and not worth holding memory for
ORIENTATION_TAG = 274
# Exceptions of Pillow on broken input; they depend on the format and on the position of the damage.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


class BadPhoto(ValueError):
    """The bytes are no photo that can be used; the message says why, in a few words."""


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


def probe(data: bytes) -> tuple[int, int]:
    """Width and height in pixels after EXIF orientation, read from the header alone.

    Raises:
        BadPhoto: The bytes are no image, or its size is refused: a side under 32 px, or over 100 million pixels.
    """
    return upright_size(open_header(data))


def decode(data: bytes, at_least_px: int | None = None, scratch: Scratch | None = None) -> np.ndarray:
    """Decode a photo to uint8 [H, W, 3], RGB, upright.

    Greyscale, palette, CMYK, alpha (dropped) and 16-bit images become 8-bit RGB. The size is checked before decoding.

    Args:
        data: The photo's file.
        at_least_px: Size that both sides need at least: a JPEG is then decoded at a fraction of its size, in eighths,
            which is faster and finds the same damage. None for full size.
        scratch: Memory for a JPEG; the next photo that is decoded into it overwrites the pixels.

    Raises:
        BadPhoto: The bytes are no image, or it is truncated, too small or too large.
    """
    image = open_header(data)
    orientation = orientation_of(image)
    if image.format == "JPEG" and image.mode in ("RGB", "L") and orientation == 1 and simplejpeg is not None:
        try:
            small = {} if at_least_px is None else {"min_height": at_least_px, "min_width": at_least_px}
            buffer = scratch.take(3 * image.width * image.height) if scratch else None
            return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, buffer=buffer, **small)
        except ValueError:
            pass  # strict refuses harmless warnings too; Pillow distinguishes them from a truncated file
    try:
        if at_least_px is not None:
            image.draft(None, (at_least_px, at_least_px))
        image.load()
        upright = ImageOps.exif_transpose(image) if orientation != 1 else image
        return _to_rgb(upright)
    except PILLOW_ERRORS as error:
        raise BadPhoto(f"cannot be decoded: {error}") from error


def open_header(data: bytes) -> Image.Image:
    """Read an image's header, without pixels.

    Raises:
        BadPhoto: The image is refused, see `probe`.
    """
    if not data:
        raise BadPhoto("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on; the check below refuses from 100 million on.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadPhoto(f"more than {MAX_PIXELS // 10**6} million pixels") from error
    except PILLOW_ERRORS as error:
        raise BadPhoto("not an image") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadPhoto(f"{width}x{height}, more than {MAX_PIXELS // 10**6} million pixels")
    if min(width, height) < MIN_SIDE_PX:
        raise BadPhoto(f"{width}x{height}, a side is under {MIN_SIDE_PX} px")
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels after EXIF orientation."""
    return image.size if orientation_of(image) < 5 else (image.height, image.width)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; broken EXIF counts as upright."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Pillow's "Corrupt EXIF data"
            value = image.getexif().get(ORIENTATION_TAG, 1)
    except PILLOW_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey. Pillow's convert would clip at 255 instead of scaling.
        grey = np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may have transparency, of which convert("RGB") warns
    return np.array(image.convert("RGB"))
