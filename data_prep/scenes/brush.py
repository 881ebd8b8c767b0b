"""Drawing small objects at several times their size, so that their edges are smooth after shrinking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]

MAX_CANVAS_PX = 448  # side of the enlarged drawing; larger objects need less supersampling


@dataclass(frozen=True)
class Paint:
    """The colours of one object; roadwork and look-alikes draw them from the same distribution."""

    orange: Colour
    yellow: Colour
    white: Colour
    dark: Colour
    grey: Colour
    skin: Colour
    cloth: Colour

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Paint:
        """Draw the colours of one object."""
        light = rng.uniform(0.82, 1.06)
        return cls(
            orange=_jitter(rng, (236, 106, 34), light, (14, 20, 14)),
            yellow=_jitter(rng, (236, 178, 36), light, (14, 18, 16)),
            white=_jitter(rng, (236, 236, 230), light, (8, 8, 10)),
            dark=_jitter(rng, (40, 40, 44), light, (10, 10, 10)),
            grey=_jitter(rng, (122, 124, 128), light, (20, 20, 20)),
            skin=_jitter(rng, (188, 142, 112), light, (40, 36, 34)),
            cloth=_jitter(rng, (58, 66, 92), light, (26, 26, 34)),
        )


def _jitter(rng: np.random.Generator, colour: Colour, light: float, spread: Colour) -> Colour:
    return rounded(np.clip(light * (np.array(colour) + rng.uniform(-1, 1, 3) * spread), 0, 255))


def rounded(channels: Iterable[float]) -> Colour:
    """The colour nearest to red, green and blue as fractions."""
    red, green, blue = map(round, channels)
    return (red, green, blue)


def darker(colour: Colour, factor: float = 0.72) -> Colour:
    """The same hue in the shade."""
    return rounded(channel * factor for channel in colour)


class Brush:
    """A transparent canvas in units of the object's height: x runs over [0, w], y over [0, 1], downwards.

    Its middle is at x = m.
    """

    def __init__(self, width_px: int, height_px: int):
        self.size = (width_px, height_px)
        self.factor = int(np.clip(MAX_CANVAS_PX // max(self.size), 1, 4))
        self.image = Image.new("RGBA", (width_px * self.factor, height_px * self.factor))
        self.draw = ImageDraw.Draw(self.image)
        self.unit = height_px * self.factor
        self.w = width_px / height_px
        self.m = self.w / 2

    def polygon(self, colour: Colour, *points: Point) -> None:
        """Fill a polygon."""
        self.draw.polygon([(x * self.unit, y * self.unit) for x, y in points], fill=colour)

    def box(self, colour: Colour, box: Box, radius: float = 0.0) -> None:
        """Fill a rectangle, with rounded corners if `radius` is not 0."""
        self.draw.rounded_rectangle([v * self.unit for v in box], radius * self.unit, fill=colour)

    def ellipse(self, colour: Colour, box: Box) -> None:
        """Fill the ellipse that touches a box."""
        self.draw.ellipse([v * self.unit for v in box], fill=colour)

    def disc(self, colour: Colour, centre: Point, radius: float) -> None:
        """Fill a circle."""
        x, y = centre
        self.ellipse(colour, (x - radius, y - radius, x + radius, y + radius))

    def wheels(self, paint: Paint, y: float, radius: float, hub: float, *shares: float) -> None:
        """Draw dark wheels with grey hubs, at shares of the object's width."""
        for share in shares:
            self.disc(paint.dark, (self.w * share, y), radius)
            self.disc(paint.grey, (self.w * share, y), hub)

    def two_boxes(self, colour: Colour, box: Box, radius: float = 0.0) -> None:
        """Fill two mirrored rectangles; x counts from the middle of the object, to the right."""
        near, top, far, bottom = box
        self.box(colour, (self.m - far, top, self.m - near, bottom), radius)
        self.box(colour, (self.m + near, top, self.m + far, bottom), radius)

    def line(self, colour: Colour, width: float, *points: Point) -> None:
        """Draw a line of the given width with rounded joints."""
        thick = max(1, round(width * self.unit))
        self.draw.line([(x * self.unit, y * self.unit) for x, y in points], colour, thick, joint="curve")

    def stripes(self, box: Box, colours: Sequence[Colour], period: float, slant: float = 0.0) -> None:
        """Fill a rectangle with stripes of equal width.

        Args:
            box: The rectangle.
            colours: The stripes' colours, in turn.
            period: Width of one stripe along x.
            slant: How far a stripe shifts along x from the bottom to the top, as a share of the box's height.
        """
        x0, y0, x1, y1 = (round(v * self.unit) for v in box)
        panel = Image.new("RGB", (max(1, x1 - x0), max(1, y1 - y0)))
        pen, step, shift = ImageDraw.Draw(panel), period * self.unit, slant * (y1 - y0)
        for i in range(-int(abs(shift) / step) - 2, int(panel.width / step) + 2):
            left = i * step
            below, above = panel.height, 0
            corners = [(left, below), (left + step, below), (left + step + shift, above), (left + shift, above)]
            pen.polygon(corners, fill=colours[i % len(colours)])
        self.image.paste(panel, (x0, y0))

    def finish(self) -> Image.Image:
        """The drawing at the object's own size, RGBA."""
        return self.image.reduce(self.factor) if self.factor > 1 else self.image
