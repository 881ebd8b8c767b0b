"""How the roadwork objects are drawn. Every function fills its brush: x in [0, w], y in [0, 1]."""

from __future__ import annotations

import numpy as np

from data_prep.scenes.brush import Brush, Paint, darker


def cone(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A traffic cone: a slim trunk on a square foot, with three white collars."""
    b.box(darker(p.orange, 0.6), (0.02, 0.9, b.w - 0.02, 1.0), 0.02)

    def trunk(top: float, bottom: float) -> list[tuple[float, float]]:
        high, low = 0.05 + 0.27 * top, 0.05 + 0.27 * bottom
        return [(b.m - high, top), (b.m + high, top), (b.m + low, bottom), (b.m - low, bottom)]

    b.polygon(p.orange, *trunk(0.0, 0.92))
    shift = rng.uniform(-0.03, 0.03)
    for y in (0.2, 0.44, 0.68):
        b.polygon(p.white, *trunk(y + shift, y + shift + 0.13))


def barrier(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A construction barrier: two boards with slanted orange and white stripes on trestle legs."""
    slant = 0.8 if rng.random() < 0.5 else -0.8
    for x in (0.16, b.w - 0.16):
        b.line(p.grey, 0.06, (x, 0.1), (x - 0.12, 1.0))
        b.line(p.grey, 0.06, (x, 0.1), (x + 0.12, 1.0))
    b.stripes((0.0, 0.14, b.w, 0.4), (p.orange, p.white), 0.2, slant)
    b.stripes((0.0, 0.5, b.w, 0.74), (p.orange, p.white), 0.2, slant)
    if rng.random() < 0.5:
        b.disc(p.yellow, (0.16, 0.07), 0.07)
        b.disc(p.yellow, (b.w - 0.16, 0.07), 0.07)


def road_work_sign(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """The orange diamond with a black rim and a digging figure, on a folding stand."""
    half = b.m
    b.line(p.grey, 0.05, (b.m, 0.6), (b.m, 0.97))
    b.line(p.dark, 0.04, (b.m, 0.82), (b.m - 0.24, 1.0))
    b.line(p.dark, 0.04, (b.m, 0.82), (b.m + 0.24, 1.0))

    def diamond(r: float) -> list[tuple[float, float]]:
        return [(b.m, half - r), (b.m + r, half), (b.m, half + r), (b.m - r, half)]

    b.polygon(p.dark, *diamond(half))
    b.polygon(p.orange, *diamond(half * 0.88))
    side = 1 if rng.random() < 0.5 else -1
    b.disc(p.dark, (b.m + side * 0.05, half - 0.14), 0.045)
    b.line(p.dark, 0.07, (b.m + side * 0.03, half - 0.08), (b.m - side * 0.05, half + 0.04))
    b.line(p.dark, 0.05, (b.m - side * 0.05, half + 0.03), (b.m - side * 0.11, half + 0.16))
    b.line(p.dark, 0.05, (b.m - side * 0.05, half + 0.03), (b.m + side * 0.03, half + 0.16))
    b.line(p.dark, 0.04, (b.m - side * 0.1, half - 0.04), (b.m + side * 0.15, half + 0.12))


def worker(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A worker: helmet, high-visibility vest with bright bands, dark trousers, often a shovel."""
    vest, helmet = (p.orange, p.yellow) if rng.random() < 0.6 else (p.yellow, p.orange)
    b.two_boxes(p.cloth, (0.015, 0.52, 0.13, 0.97), 0.02)
    b.two_boxes(p.dark, (0.01, 0.94, 0.16, 1.0), 0.02)
    lift = rng.uniform(-0.05, 0.12)
    b.line(vest, 0.075, (b.m - 0.13, 0.25), (b.m - 0.19, 0.42), (b.m - 0.1, 0.52 - lift))
    b.line(vest, 0.075, (b.m + 0.13, 0.25), (b.m + 0.19, 0.42), (b.m + 0.12, 0.52 - lift))
    b.box(vest, (b.m - 0.15, 0.2, b.m + 0.15, 0.56), 0.04)
    b.box(p.white, (b.m - 0.15, 0.45, b.m + 0.15, 0.5))
    b.two_boxes(p.white, (0.015, 0.66, 0.13, 0.7))
    b.two_boxes(p.white, (0.055, 0.2, 0.1, 0.45))
    b.disc(p.skin, (b.m, 0.135), 0.065)
    b.ellipse(helmet, (b.m - 0.085, 0.0, b.m + 0.085, 0.17))
    b.box(p.skin, (b.m - 0.055, 0.105, b.m + 0.055, 0.17), 0.03)
    b.box(helmet, (b.m - 0.11, 0.085, b.m + 0.11, 0.112))
    if rng.random() < 0.6:
        b.line(p.grey, 0.025, (b.m + 0.12, 0.35), (b.m + 0.2, 0.95))
        b.polygon(p.grey, (b.m + 0.16, 0.88), (b.m + 0.24, 0.88), (b.m + 0.22, 1.0), (b.m + 0.17, 1.0))


def excavator(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """An excavator: crawler tracks, hazard stripes on the counterweight, cab, and a bent boom with a bucket."""
    body = p.yellow if rng.random() < 0.7 else p.orange
    b.box(p.dark, (0.02, 0.8, b.w * 0.62, 1.0), 0.09)
    for i in range(4):
        b.disc(p.grey, (0.12 + i * (b.w * 0.62 - 0.22) / 3, 0.9), 0.05)
    b.box(darker(body), (0.02, 0.56, b.w * 0.6, 0.8), 0.04)
    b.box(body, (0.02, 0.52, b.w * 0.32, 0.74), 0.04)
    b.stripes((0.02, 0.6, b.w * 0.3, 0.76), (p.dark, body), 0.075, 0.8)
    b.box(body, (b.w * 0.3, 0.28, b.w * 0.56, 0.76), 0.03)
    b.box((150, 176, 190), (b.w * 0.35, 0.33, b.w * 0.53, 0.55), 0.02)
    elbow = (b.w * 0.78, rng.uniform(0.04, 0.16))
    wrist = (b.w * 0.92, rng.uniform(0.5, 0.62))
    b.line(body, 0.1, (b.w * 0.52, 0.66), elbow)
    b.line(darker(body, 0.85), 0.085, elbow, wrist)
    x, y = wrist
    b.polygon(p.dark, (x - 0.14, y), (x + 0.08, y - 0.03), (x + 0.1, y + 0.2), (x - 0.08, y + 0.24))


def dump_truck(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A dump truck: a cab, and a tipped or level body with hazard stripes, heaped with earth."""
    body = p.yellow if rng.random() < 0.7 else p.orange
    tip = rng.uniform(0.0, 0.16)
    earth = (112, 88, 66)
    b.polygon(earth, (b.w * 0.1, 0.3), (b.w * 0.28, 0.14 - tip / 2), (b.w * 0.56, 0.16 - tip), (b.w * 0.62, 0.3))
    b.polygon(body, (0.0, 0.26), (b.w * 0.66, 0.26 - tip), (b.w * 0.62, 0.68 - tip), (b.w * 0.1, 0.72))
    b.box(p.dark, (b.w * 0.06, 0.72, b.w * 0.97, 0.82))
    b.stripes((b.w * 0.1, 0.56, b.w * 0.62, 0.72), (p.dark, body), 0.09, 0.8)
    b.box(body, (b.w * 0.69, 0.3, b.w * 0.97, 0.8), 0.05)
    b.box((142, 168, 184), (b.w * 0.79, 0.36, b.w * 0.96, 0.54), 0.02)
    b.wheels(p, 0.86, 0.14, 0.06, 0.18, 0.36, 0.83)


def roller(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A road roller: a steel drum in front, a wheel behind, a roof on posts, hazard stripes on the side."""
    body = p.yellow if rng.random() < 0.7 else p.orange
    b.box(darker(body, 0.85), (b.w * 0.3, 0.12, b.w * 0.76, 0.19), 0.02)
    for x in (0.34, 0.7):
        b.line(p.dark, 0.035, (b.w * x, 0.17), (b.w * x, 0.5))
    b.box(body, (b.w * 0.12, 0.46, b.w * 0.8, 0.72), 0.05)
    b.stripes((b.w * 0.14, 0.5, b.w * 0.78, 0.64), (p.dark, body), 0.08, 0.8)
    b.wheels(p, 0.77, 0.23, 0.1, 0.22)
    b.disc((168, 170, 172), (b.w * 0.79, 0.73), 0.27)
    b.disc(darker(p.grey, 0.8), (b.w * 0.79, 0.73), 0.2 + rng.uniform(-0.03, 0.0))
    b.disc(p.yellow, (b.w * 0.79, 0.73), 0.06)


def channelizer_drum(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A channelizing drum: a fat barrel with three white collars and a rubber ring as its foot."""
    b.box(p.dark, (0.0, 0.91, b.w, 1.0), 0.04)
    b.polygon(p.orange, (0.08, 0.06), (b.w - 0.08, 0.06), (b.w - 0.03, 0.93), (0.03, 0.93))
    for y in (0.16, 0.4, 0.64):
        b.box(p.white, (0.06, y, b.w - 0.06, y + 0.12))
    b.box(darker(p.orange), (0.1, 0.02, b.w - 0.1, 0.09), 0.03)
    if rng.random() < 0.4:
        b.disc(p.yellow, (b.w / 2, 0.06), 0.06)


def arrow_board(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A trailer with a black panel on which amber lamps form an arrow."""
    b.box(p.dark, (0.0, 0.0, b.w, 0.56), 0.02)
    y, left, right = 0.28, b.w * 0.12, b.w * 0.88
    if rng.random() < 0.5:
        left, right = right, left
    back = 0.2 if left > right else -0.2
    b.line(p.yellow, 0.075, (left, y), (right, y))
    b.line(p.yellow, 0.075, (right + back, y - 0.19), (right, y), (right + back, y + 0.19))
    b.box(p.grey, (b.w / 2 - 0.04, 0.56, b.w / 2 + 0.04, 0.76))
    b.box(p.orange, (b.w * 0.12, 0.72, b.w * 0.88, 0.86), 0.02)
    b.disc(p.dark, (b.w * 0.3, 0.9), 0.1)
    b.disc(p.dark, (b.w * 0.7, 0.9), 0.1)


def compressor(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A towed compressor: a sloping hood with a grille and hazard stripes, one wheel and a drawbar."""
    hood = p.yellow if rng.random() < 0.6 else p.orange
    b.polygon(hood, (0.04, 0.3), (0.2, 0.06), (b.w * 0.62, 0.06), (b.w * 0.74, 0.3), (b.w * 0.74, 0.74), (0.04, 0.74))
    for i in range(4):
        b.box(p.dark, (0.16 + 0.12 * i, 0.2, 0.21 + 0.12 * i, 0.46))
    b.stripes((0.04, 0.56, b.w * 0.74, 0.74), (p.dark, hood), 0.085, 0.8)
    b.line(p.dark, 0.06, (b.w * 0.7, 0.72), (b.w - 0.03, 0.86))
    b.line(p.dark, 0.05, (b.w - 0.05, 0.84), (b.w - 0.05, 1.0))
    b.wheels(p, 0.82, 0.18, 0.08, 0.36)


def light_tower(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A mast with four floodlights on a small generator with hazard stripes."""
    body = p.orange if rng.random() < 0.5 else p.yellow
    b.line(p.grey, 0.05, (b.m, 0.12), (b.m, 0.72))
    b.box(p.dark, (0.02, 0.12, b.w - 0.02, 0.17))
    for y in (0.0, 0.16):
        for side in (-1, 1):
            x = b.m + side * (b.m - 0.13)
            b.box(p.dark, (x - 0.12, y, x + 0.12, y + 0.15), 0.02)
            b.box((255, 250, 224), (x - 0.085, y + 0.03, x + 0.085, y + 0.12))
    b.box(body, (0.03, 0.6, b.w - 0.03, 0.9), 0.03)
    b.stripes((0.03, 0.7, b.w - 0.03, 0.84), (p.dark, body), 0.07, 0.8)
    b.disc(p.dark, (b.m - 0.13, 0.92), 0.08)
    b.disc(p.dark, (b.m + 0.13, 0.92), 0.08)
