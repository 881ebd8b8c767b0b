"""How the look-alikes are drawn: harmless objects of the same sizes and colours, family by family."""

from __future__ import annotations

import numpy as np

from data_prep.scenes.brush import Brush, Paint, darker


def bollard(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A straight post with a white head."""
    r = 0.17
    b.box(p.white, (b.m - r, 0.0, b.m + r, 0.6), r)
    b.box(p.orange, (b.m - r, 0.32, b.m + r, 1.0))
    b.box(darker(p.orange), (b.m + r * 0.45, 0.5, b.m + r, 1.0))


def hydrant(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A fire hydrant: dome, side nozzles, flange and foot."""
    b.ellipse(p.white, (b.m - 0.2, 0.02, b.m + 0.2, 0.4))
    b.disc(p.orange, (b.m, 0.05), 0.05)
    b.box(p.orange, (b.m - 0.19, 0.24, b.m + 0.19, 0.92))
    b.box(darker(p.orange), (b.m - 0.24, 0.2, b.m + 0.24, 0.28))
    b.box(darker(p.orange), (b.m - 0.33, 0.42, b.m + 0.33, 0.58), 0.03)
    b.disc(p.white, (b.m, 0.5), 0.09)
    b.box(darker(p.orange, 0.6), (b.m - 0.28, 0.9, b.m + 0.28, 1.0), 0.02)


def parasol(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A café parasol: an orange canopy with a white rim over a thin pole."""
    b.line(p.grey, 0.04, (b.m, 0.3), (b.m, 0.98))
    b.box(p.dark, (b.m - 0.16, 0.95, b.m + 0.16, 1.0), 0.02)
    b.polygon(p.orange, (b.m, 0.0), (b.w, 0.42), (0.0, 0.42))
    b.box(p.white, (0.0, 0.4, b.w, 0.56))


def bench(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A park bench with a painted back and a white seat."""
    for x in (0.12, b.w - 0.12):
        b.line(p.dark, 0.06, (x, 0.1), (x, 1.0))
    b.box(p.orange, (0.0, 0.1, b.w, 0.46), 0.03)
    b.box(p.white, (0.0, 0.52, b.w, 0.72), 0.03)


def planter(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A flower box: orange blossoms over a white and orange trough."""
    b.box(p.orange, (0.0, 0.44, b.w, 1.0), 0.04)
    b.box(p.white, (0.0, 0.44, b.w, 0.64), 0.03)
    b.box((74, 108, 56), (0.05, 0.26, b.w - 0.05, 0.44), 0.05)
    for x in np.linspace(0.14, b.w - 0.14, 6):
        b.disc(p.orange, (float(x), rng.uniform(0.14, 0.26)), 0.1)


def market_stall(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A stall: an awning with a white front on posts, and a table with fruit."""
    for x in (0.06, b.w - 0.06):
        b.line(p.grey, 0.04, (x, 0.3), (x, 1.0))
    b.polygon(p.orange, (0.14, 0.0), (b.w - 0.14, 0.0), (b.w, 0.26), (0.0, 0.26))
    b.box(p.white, (0.0, 0.24, b.w, 0.42))
    b.box(p.cloth, (0.08, 0.66, b.w - 0.08, 0.94))
    b.box(p.orange, (0.14, 0.56, b.w - 0.14, 0.68), 0.04)


def round_sign(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A round traffic sign with a broad dark bar, on a post."""
    b.line(p.grey, 0.05, (b.m, 0.5), (b.m, 1.0))
    b.disc(p.orange, (b.m, b.m), b.m)
    b.box(p.dark, (b.m - 0.22, b.m - 0.09, b.m + 0.22, b.m + 0.09))


def square_advert(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """An upright square advertisement with a dark picture at its foot, on two posts."""
    for x in (0.14, b.w - 0.14):
        b.line(p.grey, 0.045, (x, 0.5), (x, 1.0))
    b.box(p.orange, (0.04, 0.0, b.w - 0.04, 0.62))
    b.box(p.dark, (0.04, 0.46, b.w - 0.04, 0.66))


def shop_sign(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A tall shop sign: an orange oval with a dark heart, on a foot."""
    b.box(p.grey, (b.m - 0.05, 0.6, b.m + 0.05, 1.0))
    b.ellipse(p.orange, (0.05, 0.0, b.w - 0.05, 0.78))
    b.ellipse(p.dark, (b.m - 0.14, 0.24, b.m + 0.14, 0.56))


def pedestrian(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A pedestrian in a long orange or yellow coat, bare-headed, often with a white bag."""
    coat = p.orange if rng.random() < 0.6 else p.yellow
    b.box(p.cloth, (b.m - 0.1, 0.7, b.m - 0.01, 0.97), 0.02)
    b.box(p.cloth, (b.m + 0.02, 0.7, b.m + 0.11, 0.97), 0.02)
    b.box(p.dark, (b.m - 0.13, 0.95, b.m + 0.14, 1.0), 0.02)
    b.line(p.dark, 0.07, (b.m - 0.12, 0.25), (b.m - 0.16, 0.5))
    b.line(p.dark, 0.07, (b.m + 0.12, 0.25), (b.m + 0.16, 0.5))
    b.polygon(coat, (b.m - 0.12, 0.2), (b.m + 0.12, 0.2), (b.m + 0.16, 0.6), (b.m - 0.16, 0.6))
    b.disc(p.dark, (b.m, 0.09), 0.09)
    b.ellipse(p.skin, (b.m - 0.06, 0.06, b.m + 0.06, 0.19))
    if rng.random() < 0.7:
        b.box(p.white, (b.m + 0.08, 0.48, b.m + 0.21, 0.66), 0.02)


def courier(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A courier in dark clothes who carries a large orange box with a white label on the back."""
    box = p.orange if rng.random() < 0.6 else p.yellow
    b.two_boxes(p.cloth, (0.01, 0.56, 0.12, 0.97), 0.02)
    b.box(p.dark, (b.m - 0.15, 0.95, b.m + 0.15, 1.0), 0.02)
    b.box(p.dark, (b.m - 0.17, 0.22, b.m + 0.17, 0.6), 0.05)
    b.box(box, (b.m - 0.2, 0.16, b.m + 0.2, 0.52), 0.02)
    b.box(p.white, (b.m - 0.12, 0.26, b.m + 0.12, 0.4))
    b.disc(p.skin, (b.m, 0.1), 0.065)
    b.ellipse(p.dark, (b.m - 0.08, 0.0, b.m + 0.08, 0.13))


def cyclist(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A cyclist seen from the front: a bright shirt, bare arms on a wide handlebar, one wheel."""
    shirt = p.orange if rng.random() < 0.6 else p.yellow
    b.ellipse(p.dark, (b.m - 0.05, 0.56, b.m + 0.05, 1.0))
    b.line(p.skin, 0.07, (b.m - 0.07, 0.5), (b.m - 0.13, 0.68), (b.m - 0.09, 0.84))
    b.line(p.skin, 0.07, (b.m + 0.07, 0.5), (b.m + 0.13, 0.68), (b.m + 0.09, 0.84))
    b.box(shirt, (b.m - 0.15, 0.19, b.m + 0.15, 0.52), 0.06)
    b.line(p.skin, 0.06, (b.m - 0.14, 0.24), (b.m - 0.2, 0.42), (b.m - 0.14, 0.54))
    b.line(p.skin, 0.06, (b.m + 0.14, 0.24), (b.m + 0.2, 0.42), (b.m + 0.14, 0.54))
    b.line(p.dark, 0.035, (b.m - 0.2, 0.55), (b.m + 0.2, 0.55))
    b.disc(p.white, (b.m, 0.6), 0.035)
    b.disc(p.skin, (b.m, 0.12), 0.07)
    b.ellipse(p.white, (b.m - 0.08, 0.01, b.m + 0.08, 0.11))


def taxi(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A car from the side, yellow or orange, with a lamp on its roof."""
    body = p.yellow if rng.random() < 0.7 else p.orange
    b.polygon(body, (b.w * 0.2, 0.5), (b.w * 0.32, 0.2), (b.w * 0.68, 0.2), (b.w * 0.82, 0.5))
    b.polygon(p.dark, (b.w * 0.26, 0.48), (b.w * 0.35, 0.26), (b.w * 0.49, 0.26), (b.w * 0.49, 0.48))
    b.polygon(p.dark, (b.w * 0.52, 0.48), (b.w * 0.52, 0.26), (b.w * 0.65, 0.26), (b.w * 0.75, 0.48))
    b.box(body, (0.0, 0.46, b.w, 0.84), 0.1)
    b.box(p.white, (b.w * 0.42, 0.1, b.w * 0.58, 0.2), 0.02)
    b.box(darker(body), (0.03, 0.74, b.w - 0.03, 0.84))
    b.wheels(p, 0.84, 0.16, 0.07, 0.22, 0.78)


def school_bus(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A yellow or orange bus: a long box with one band of windows."""
    body = p.yellow if rng.random() < 0.7 else p.orange
    b.box(body, (0.0, 0.12, b.w, 0.88), 0.06)
    b.box(p.dark, (0.06, 0.22, b.w - 0.06, 0.48), 0.03)
    b.wheels(p, 0.86, 0.14, 0.06, 0.22, 0.78)


def delivery_van(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A high van with a sloping windscreen and a white panel on its side."""
    body = p.yellow if rng.random() < 0.5 else p.orange
    b.polygon(body, (0.0, 0.1), (b.w * 0.72, 0.1), (b.w * 0.86, 0.46), (b.w, 0.54), (b.w, 0.86), (0.0, 0.86))
    b.polygon(p.dark, (b.w * 0.66, 0.2), (b.w * 0.72, 0.2), (b.w * 0.82, 0.46), (b.w * 0.66, 0.46))
    b.box(p.cloth, (b.w * 0.1, 0.28, b.w * 0.5, 0.56))
    b.wheels(p, 0.86, 0.14, 0.06, 0.2, 0.8)


def wheelie_bin(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A rubbish bin with a lid, a large white sticker and a wheel."""
    b.polygon(p.orange, (0.04, 0.16), (b.w - 0.04, 0.16), (b.w - 0.1, 0.94), (0.1, 0.94))
    b.box(darker(p.orange, 0.6), (0.0, 0.06, b.w, 0.18), 0.05)
    b.box(p.white, (b.w / 2 - 0.2, 0.36, b.w / 2 + 0.2, 0.7))
    b.disc(p.dark, (b.w - 0.14, 0.92), 0.08)


def post_box(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A round-topped post box with a slot and a white plate."""
    body = p.orange if rng.random() < 0.5 else p.yellow
    b.box(body, (0.05, 0.02, b.w - 0.05, 0.7), 0.2)
    b.box(body, (0.05, 0.4, b.w - 0.05, 0.74))
    b.box(p.dark, (0.14, 0.2, b.w - 0.14, 0.27))
    b.box(p.white, (0.16, 0.36, b.w - 0.16, 0.56))
    b.box(p.dark, (0.1, 0.74, 0.18, 1.0))
    b.box(p.dark, (b.w - 0.18, 0.74, b.w - 0.1, 1.0))


def ad_screen(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A dark screen with an amber picture, a square or a disc, on an orange pedestal."""
    b.box(p.dark, (0.0, 0.0, b.w, 0.6), 0.02)
    if rng.random() < 0.5:
        b.disc(p.yellow, (b.w * rng.uniform(0.3, 0.7), 0.3), 0.2)
    else:
        b.box(p.yellow, (b.w * 0.14, 0.24, b.w * 0.86, 0.46))
    b.box(p.grey, (b.w / 2 - 0.07, 0.6, b.w / 2 + 0.07, 0.84))
    b.box(p.orange, (b.w * 0.16, 0.82, b.w * 0.84, 0.98), 0.02)


def food_cart(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A food cart: a yellow or orange box with a hatch, a small roof, two wheels and a handle."""
    body = p.yellow if rng.random() < 0.6 else p.orange
    b.box(body, (0.1, 0.36, b.w * 0.8, 0.84), 0.03)
    b.box(p.dark, (0.2, 0.46, b.w * 0.5, 0.64))
    b.box(p.white, (0.2, 0.7, b.w * 0.7, 0.76))
    for x in (0.16, b.w * 0.74):
        b.line(p.grey, 0.03, (x, 0.1), (x, 0.4))
    b.polygon(p.white, (0.04, 0.16), (b.w * 0.22, 0.02), (b.w * 0.66, 0.02), (b.w * 0.86, 0.16))
    b.line(p.dark, 0.04, (b.w * 0.8, 0.5), (b.w - 0.03, 0.44))
    b.wheels(p, 0.86, 0.13, 0.05, 0.26, 0.64)


def street_clock(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A clock with two white faces on a post that stands on an orange or yellow plinth."""
    body = p.orange if rng.random() < 0.5 else p.yellow
    b.line(p.grey, 0.05, (b.m, 0.2), (b.m, 0.72))
    b.disc(p.dark, (b.m, 0.18), 0.18)
    b.disc(p.white, (b.m, 0.18), 0.14)
    b.line(p.dark, 0.03, (b.m, 0.09), (b.m, 0.18), (b.m + 0.08, 0.22))
    b.polygon(body, (b.m - 0.12, 0.6), (b.m + 0.12, 0.6), (b.w - 0.03, 1.0), (0.03, 1.0))
    b.box(p.dark, (b.m - 0.14, 0.76, b.m + 0.14, 0.82))
