"""Weather, light and the camera's noise, laid over a finished street."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from data_prep.scenes.brush import Colour
from data_prep.scenes.plan import AIR, ScenePlan

GRAIN_SIDE = 512
# Standard deviations of the logarithms of red, blue, exposure and contrast among the cities' cameras, at a shift of 1.
CAMERA_SPREAD = (0.08, 0.08, 0.12, 0.1)


@cache
def _grain() -> np.ndarray:
    """Asphalt-and-plaster texture around 128: fine grain over soft blotches."""
    rng = np.random.default_rng(20_26)
    fine = rng.normal(0, 7, (GRAIN_SIDE, GRAIN_SIDE))
    blotches = np.pad(rng.normal(0, 6, (16, 16)), 2, mode="wrap").astype(np.float32)
    cell = GRAIN_SIDE // 16
    soft = np.asarray(Image.fromarray(blotches).resize((20 * cell, 20 * cell), Image.Resampling.BICUBIC))
    soft = soft[2 * cell : -2 * cell, 2 * cell : -2 * cell]  # the padding makes the tile's edges meet
    return np.clip(128 + fine + soft, 0, 255).astype(np.uint8)


def texture(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Lay the grain over a street, shifted by chance, so that no surface is flat."""
    dy, dx = rng.integers(0, GRAIN_SIDE, 2)
    layer = _tiled(np.roll(_grain(), (dy, dx), (0, 1)), image)
    return ImageChops.overlay(image, Image.merge("RGB", (layer, layer, layer)))


def _tiled(tile: np.ndarray, image: Image.Image) -> Image.Image:
    """A layer of an image's size, covered with copies of a square tile."""
    repeats = [-(-image.height // len(tile)), -(-image.width // len(tile)), 1][: tile.ndim]
    return Image.fromarray(np.tile(tile, repeats)[: image.height, : image.width])


def weathered(image: Image.Image, plan: ScenePlan) -> Image.Image:
    """Apply fog, rain or snow, then the time of day, then sensor noise."""
    rng = plan.rng(AIR)
    strength = 0.4 + 0.5 * plan.config.difficulty
    if plan.weather == "Foggy":
        image = _fog(image, plan, 0.62 * strength)
    elif plan.weather == "Rainy":
        image = _falling(_fog(image, plan, 0.25 * strength), rng, (196, 204, 214), 700, 0.020, 0.35 * strength)
    elif plan.weather == "Snowy":
        image = _falling(_fog(image, plan, 0.3 * strength), rng, (250, 250, 252), 900, 0.0022, 0.9 * strength)
    return _noise(_time_of_day(image, plan, rng), plan, rng)


def _fog(image: Image.Image, plan: ScenePlan, strength: float) -> Image.Image:
    """Blend towards grey: most at the horizon and above, least at the camera's feet."""
    rows = (np.arange(image.height) / image.height - plan.horizon) / (1 - plan.horizon)
    alpha = strength * (1 - 0.75 * np.clip(rows, 0, 1))
    mask = Image.fromarray((alpha * 255).round().astype(np.uint8)[:, None]).resize(image.size)
    return Image.composite(Image.new("RGB", image.size, (204, 208, 212)), image, mask)


def _falling(
    image: Image.Image, rng: np.random.Generator, colour: Colour, count: int, length: float, strength: float
) -> Image.Image:
    """Rain streaks or snowflakes: short slanted lines, their length a share of the photo's height."""
    width, height = image.size
    mask = Image.new("L", image.size)
    pen = ImageDraw.Draw(mask)
    thick = max(1, round(height / 640))
    slant = rng.uniform(-0.3, 0.3)
    drops = rng.uniform(0, width, count), rng.uniform(0, height, count), rng.uniform(0.5, 1.5, count)
    for x, y, scale in zip(*drops, strict=True):
        reach = length * height * scale
        pen.line((x, y, x + slant * reach, y + reach), fill=round(255 * strength), width=thick)
    return Image.composite(Image.new("RGB", image.size, colour), image, mask)


def _time_of_day(image: Image.Image, plan: ScenePlan, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and tint, as one look-up table per channel."""
    gain = {"Light": 1.0, "Twilight": 0.72, "Dark": 0.42}[plan.light]
    tint = {"Light": (1.0, 1.0, 1.0), "Twilight": (1.04, 0.97, 0.98), "Dark": (0.94, 0.98, 1.1)}[plan.light]
    sun = {"Sunny": 1.08, "Partly Cloudy": 1.03}.get(plan.weather, 0.96)
    contrast = rng.uniform(0.86, 1.08) - 0.1 * plan.config.difficulty
    exposure = rng.uniform(0.92, 1.08) * sun
    red, blue, brighter, harder = np.exp(np.array(CAMERA_SPREAD) * plan.config.city_shift * plan.style.camera)
    tint, exposure, contrast = (tint[0] * red, tint[1], tint[2] * blue), exposure * brighter, contrast * harder
    levels = np.arange(256)
    tables = [(128 + (levels - 128) * contrast) * exposure * gain * channel for channel in tint]
    table = np.clip(np.concatenate(tables), 0, 255).round().astype(int).tolist()
    return image.point(table)


def _noise(image: Image.Image, plan: ScenePlan, rng: np.random.Generator) -> Image.Image:
    """Sensor noise, stronger in the dark; one tile of it is enough at this amplitude."""
    sigma = {"Light": 1.5, "Twilight": 2.5, "Dark": 4.0}[plan.light]
    tile = rng.normal(128, sigma, (128, 128, 3)).round().astype(np.uint8)
    return ImageChops.add(image, _tiled(tile, image), offset=-128)
