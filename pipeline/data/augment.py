"""Altered copies of a photo: copies like those of the NATIX challenge in its older form, and mild ones for training.

The challenge stopped sending work in May 2026.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

CLIENT_SIDE = 224
"""Side of a `streetvision` copy in pixels."""
LEVELS = 4
"""Levels of `streetvision`; each of them is drawn equally often."""
MAX_ROTATION_DEG = 20.0
CROP_AREA = (0.2, 1.0)
SATURATION = (0.3, 1.0)
CONTRAST = (0.6, 1.0)
JPEG_QUALITY = (20, 80)
NOISE_SIGMA = (2.0, 12.0)
"""Standard deviation of the noise, in grey levels of 255."""
BLUR_SIGMA_PX = (0.5, 1.5)
# A mild copy must stay a photo that a camera could have taken, and keep what its label rests on.
COPY_AREA = (0.7, 1.0)
COPY_CHANGE = 0.2
"""Largest relative change of brightness, contrast and saturation in `augmented_copy`."""
# Pillow averages whole blocks of pixels first, down to three times the new size: a quarter of the time, and as good.
REDUCING_GAP = 3.0
# ITU-R BT.601, as in JPEG.
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Placement:
    """Which part of a photo a copy shows, and how it is turned and mirrored."""

    window: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the photo."""
    size: tuple[int, int]
    """Width and height of the copy in pixels."""
    angle_deg: float = 0.0
    """Counterclockwise turn of `frame` about its centre before the window is cut; corners that it leaves empty are
    black."""
    frame: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """The part of the photo that is turned, with the window in it; unused without a turn."""
    mirrored: bool = False
    upside_down: bool = False

    def photo(self, image: np.ndarray) -> np.ndarray:
        """Cut the copy out of a photo, antialiased: uint8 [H, W, 3] to [height, width, 3]."""
        return self._cut(image, Image.Resampling.LANCZOS)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Cut the same part out of a mask of class numbers: uint8 [H, W] to [height, width]; outside it is 0."""
        return self._cut(mask, Image.Resampling.NEAREST)

    def _cut(self, image: np.ndarray, resample: Image.Resampling) -> np.ndarray:
        source = Image.fromarray(image)
        if self.angle_deg:
            cut = self._turned(source, resample)
        elif self.size == (self.window[2] - self.window[0], self.window[3] - self.window[1]):
            cut = source.crop(self.window)
        else:
            cut = source.resize(self.size, resample, box=self.window, reducing_gap=REDUCING_GAP)
        if self.mirrored:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.upside_down:
            cut = cut.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return np.array(cut)

    def _turned(self, source: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Shrink the frame to the copy's scale with an antialiasing filter, then turn it at scale 1."""
        x0, y0, x1, y1 = self.window
        across, down = self.size[0] / (x1 - x0), self.size[1] / (y1 - y0)
        left, top, right, bottom = self.frame
        width, height = round((right - left) * across), round((bottom - top) * down)
        frame = source.resize((width, height), resample, box=self.frame, reducing_gap=REDUCING_GAP)
        cos, sin = math.cos(math.radians(self.angle_deg)), math.sin(math.radians(self.angle_deg))
        # Maps a point of the copy to its position in the frame before the turn, relative to the frame's centre.
        x, y = (x0 - left) * across - width / 2, (y0 - top) * down - height / 2
        matrix = (cos, -sin, cos * x - sin * y + width / 2, sin, cos, sin * x + cos * y + height / 2)
        smooth = Image.Resampling.NEAREST if resample == Image.Resampling.NEAREST else Image.Resampling.BICUBIC
        return frame.transform(self.size, Image.Transform.AFFINE, matrix, smooth)


def streetvision(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """A copy of a photo as the NATIX challenge sent it in its older form.

    Args:
        image: uint8 [H, W, 3], RGB.
        level: 0 is the centre square; 1 turns, crops and flips it; 2 also removes colour and compresses; 3 also adds
            noise and blurs. How strongly is this project's own choice.
        rng: Random generator whose state determines the copy.

    Returns:
        uint8 [224, 224, 3].
    """
    copy = streetvision_placement(image.shape[1], image.shape[0], level, rng).photo(image)
    if level >= 2:
        copy = recoloured(copy, contrast=rng.uniform(*CONTRAST), saturation=rng.uniform(*SATURATION))
        copy = compressed(copy, int(rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1], endpoint=True)))
    if level >= 3:
        copy = noisy(copy, rng.uniform(*NOISE_SIGMA), rng)
        copy = blurred(copy, rng.uniform(*BLUR_SIGMA_PX))
    return copy


def streetvision_placement(width: int, height: int, level: int, rng: np.random.Generator) -> Placement:
    """The geometry that `streetvision` draws from the same state of `rng`.

    Args:
        width: Width of the photo in pixels.
        height: Height of the photo in pixels.
        level: See `streetvision`.
        rng: Random generator, which is advanced.
    """
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    frame, size = (left, top, left + short, top + short), (CLIENT_SIDE, CLIENT_SIDE)
    if level == 0:
        return Placement(frame, size)
    angle_deg = rng.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG)
    window = random_window(frame, CROP_AREA, rng)
    mirrored, upside_down = rng.random(2) < 0.5
    return Placement(window, size, angle_deg, frame, bool(mirrored), bool(upside_down))


def augmented_copy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mild copy at the photo's own resolution: a part of it, perhaps mirrored, in other light.

    Args:
        image: uint8 [H, W, 3], RGB.
        rng: Random generator whose state determines the copy.

    Returns:
        uint8 [h, w, 3], with 70 to 100 % of the photo's pixels and its aspect.
    """
    copy = copy_placement(image.shape[1], image.shape[0], rng).photo(image)
    brightness, contrast, saturation = rng.uniform(1 - COPY_CHANGE, 1 + COPY_CHANGE, size=3)
    return recoloured(copy, contrast, saturation, brightness)


def copy_placement(width: int, height: int, rng: np.random.Generator) -> Placement:
    """The geometry of `augmented_copy`, in whole pixels so that none is resampled; see `streetvision_placement`."""
    x0, y0, x1, y1 = (round(edge) for edge in random_window((0, 0, width, height), COPY_AREA, rng))
    return Placement((x0, y0, x1, y1), (x1 - x0, y1 - y0), mirrored=bool(rng.random() < 0.5))


def random_window(
    frame: tuple[float, float, float, float], area: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A window anywhere in the frame, with its aspect and a share of its area drawn evenly from a range."""
    x0, y0, x1, y1 = frame
    share = math.sqrt(rng.uniform(*area))
    width, height = share * (x1 - x0), share * (y1 - y0)
    x, y = rng.uniform(x0, x1 - width), rng.uniform(y0, y1 - height)
    return x, y, x + width, y + height


def recoloured(image: np.ndarray, contrast: float, saturation: float, brightness: float = 1.0) -> np.ndarray:
    """Scale brightness, contrast (distance from the mean grey) and saturation (from each pixel's grey) in one pass.

    Args:
        image: uint8 [H, W, 3].
        contrast: 1 keeps the photo; 0 leaves its mean grey.
        saturation: 1 keeps the photo; 0 leaves greys.
        brightness: 1 keeps the photo.
    """
    # The mean of every 16th pixel in every 16th row is within a grey level of the photo's, a hundred times faster.
    mean = float(image[::16, ::16].reshape(-1, 3).mean(axis=0) @ LUMA)
    matrix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * LUMA)
    offset = brightness * (1 - contrast) * mean
    rows = np.column_stack([matrix, np.full(3, offset)])
    return np.array(Image.fromarray(image).convert("RGB", tuple(rows.ravel().tolist())))


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    """Encode uint8 [H, W, 3] as JPEG at this quality and decode it again."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.array(Image.open(stream, formats=("JPEG",)))


def noisy(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Add independent Gaussian noise to each channel of uint8 [H, W, 3], with this sigma in grey levels."""
    values = image + sigma * rng.standard_normal(image.shape, dtype=np.float32)
    return values.round().clip(0, 255).astype(np.uint8)


def blurred(image: np.ndarray, sigma_px: float) -> np.ndarray:
    """Blur uint8 [H, W, 3] with a Gaussian of this sigma in pixels."""
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma_px)))
