"""How the look-alikes are drawn: harmless objects of the same sizes and colours, family by family."""

from __future__ import annotations

import numpy as np

from data_prep.scenes.brush import Brush, Paint, darker


def bollard(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A straight post with a white head."""
    m, r = b.aspect / 2, 0.17
    b.box(p.white, (m - r, 0.0, m + r, 0.6), r)
    b.box(p.orange, (m - r, 0.32, m + r, 1.0))
    b.box(darker(p.orange), (m + r * 0.45, 0.5, m + r, 1.0))


def hydrant(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A fire hydrant: dome, side nozzles, flange and foot."""
    m = b.aspect / 2
    b.ellipse(p.white, (m - 0.2, 0.02, m + 0.2, 0.4))
    b.disc(p.orange, (m, 0.05), 0.05)
    b.box(p.orange, (m - 0.19, 0.24, m + 0.19, 0.92))
    b.box(darker(p.orange), (m - 0.24, 0.2, m + 0.24, 0.28))
    b.box(darker(p.orange), (m - 0.33, 0.42, m + 0.33, 0.58), 0.03)
    b.disc(p.white, (m, 0.5), 0.09)
    b.box(darker(p.orange, 0.6), (m - 0.28, 0.9, m + 0.28, 1.0), 0.02)


def parasol(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A café parasol: an orange canopy with a white rim over a thin pole."""
    m, w = b.aspect / 2, b.aspect
    b.line(p.grey, 0.04, (m, 0.3), (m, 0.98))
    b.box(p.dark, (m - 0.16, 0.95, m + 0.16, 1.0), 0.02)
    b.polygon(p.orange, (m, 0.0), (w, 0.42), (0.0, 0.42))
    b.box(p.white, (0.0, 0.4, w, 0.56))


def bench(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A park bench with a painted back and a white seat."""
    w = b.aspect
    for x in (0.12, w - 0.12):
        b.line(p.dark, 0.06, (x, 0.1), (x, 1.0))
    b.box(p.orange, (0.0, 0.1, w, 0.46), 0.03)
    b.box(p.white, (0.0, 0.52, w, 0.72), 0.03)


def planter(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A flower box: orange blossoms over a white and orange trough."""
    w = b.aspect
    b.box(p.orange, (0.0, 0.44, w, 1.0), 0.04)
    b.box(p.white, (0.0, 0.44, w, 0.64), 0.03)
    b.box((74, 108, 56), (0.05, 0.26, w - 0.05, 0.44), 0.05)
    for x in np.linspace(0.14, w - 0.14, 6):
        b.disc(p.orange, (float(x), rng.uniform(0.14, 0.26)), 0.1)


def market_stall(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A stall: an awning with a white front on posts, and a table with fruit."""
    w = b.aspect
    for x in (0.06, w - 0.06):
        b.line(p.grey, 0.04, (x, 0.3), (x, 1.0))
    b.polygon(p.orange, (0.14, 0.0), (w - 0.14, 0.0), (w, 0.26), (0.0, 0.26))
    b.box(p.white, (0.0, 0.24, w, 0.42))
    b.box(p.cloth, (0.08, 0.66, w - 0.08, 0.94))
    b.box(p.orange, (0.14, 0.56, w - 0.14, 0.68), 0.04)


def round_sign(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A round traffic sign with a broad dark bar, on a post."""
    m, r = b.aspect / 2, b.aspect / 2
    b.line(p.grey, 0.05, (m, 0.5), (m, 1.0))
    b.disc(p.orange, (m, r), r)
    b.box(p.dark, (m - 0.22, r - 0.09, m + 0.22, r + 0.09))


def square_advert(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """An upright square advertisement with a dark picture at its foot, on two posts."""
    w = b.aspect
    for x in (0.14, w - 0.14):
        b.line(p.grey, 0.045, (x, 0.5), (x, 1.0))
    b.box(p.orange, (0.04, 0.0, w - 0.04, 0.62))
    b.box(p.dark, (0.04, 0.46, w - 0.04, 0.66))


def shop_sign(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A tall shop sign: an orange oval with a dark heart, on a foot."""
    m, w = b.aspect / 2, b.aspect
    b.box(p.grey, (m - 0.05, 0.6, m + 0.05, 1.0))
    b.ellipse(p.orange, (0.05, 0.0, w - 0.05, 0.78))
    b.ellipse(p.dark, (m - 0.14, 0.24, m + 0.14, 0.56))


def pedestrian(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A pedestrian in a long orange or yellow coat, bare-headed, often with a white bag."""
    m = b.aspect / 2
    coat = p.orange if rng.random() < 0.6 else p.yellow
    b.box(p.cloth, (m - 0.1, 0.7, m - 0.01, 0.97), 0.02)
    b.box(p.cloth, (m + 0.02, 0.7, m + 0.11, 0.97), 0.02)
    b.box(p.dark, (m - 0.13, 0.95, m + 0.14, 1.0), 0.02)
    b.line(p.dark, 0.07, (m - 0.12, 0.25), (m - 0.16, 0.5))
    b.line(p.dark, 0.07, (m + 0.12, 0.25), (m + 0.16, 0.5))
    b.polygon(coat, (m - 0.12, 0.2), (m + 0.12, 0.2), (m + 0.16, 0.6), (m - 0.16, 0.6))
    b.disc(p.dark, (m, 0.09), 0.09)
    b.ellipse(p.skin, (m - 0.06, 0.06, m + 0.06, 0.19))
    if rng.random() < 0.7:
        b.box(p.white, (m + 0.08, 0.48, m + 0.21, 0.66), 0.02)


def courier(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A courier in dark clothes who carries a large orange box with a white label on the back."""
    m = b.aspect / 2
    box = p.orange if rng.random() < 0.6 else p.yellow
    b.two_boxes(p.cloth, (0.01, 0.56, 0.12, 0.97), 0.02)
    b.box(p.dark, (m - 0.15, 0.95, m + 0.15, 1.0), 0.02)
    b.box(p.dark, (m - 0.17, 0.22, m + 0.17, 0.6), 0.05)
    b.box(box, (m - 0.2, 0.16, m + 0.2, 0.52), 0.02)
    b.box(p.white, (m - 0.12, 0.26, m + 0.12, 0.4))
    b.disc(p.skin, (m, 0.1), 0.065)
    b.ellipse(p.dark, (m - 0.08, 0.0, m + 0.08, 0.13))


def cyclist(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A cyclist seen from the front: a bright shirt, bare arms on a wide handlebar, one wheel."""
    m = b.aspect / 2
    shirt = p.orange if rng.random() < 0.6 else p.yellow
    b.ellipse(p.dark, (m - 0.05, 0.56, m + 0.05, 1.0))
    b.line(p.skin, 0.07, (m - 0.07, 0.5), (m - 0.13, 0.68), (m - 0.09, 0.84))
    b.line(p.skin, 0.07, (m + 0.07, 0.5), (m + 0.13, 0.68), (m + 0.09, 0.84))
    b.box(shirt, (m - 0.15, 0.19, m + 0.15, 0.52), 0.06)
    b.line(p.skin, 0.06, (m - 0.14, 0.24), (m - 0.2, 0.42), (m - 0.14, 0.54))
    b.line(p.skin, 0.06, (m + 0.14, 0.24), (m + 0.2, 0.42), (m + 0.14, 0.54))
    b.line(p.dark, 0.035, (m - 0.2, 0.55), (m + 0.2, 0.55))
    b.disc(p.white, (m, 0.6), 0.035)
    b.disc(p.skin, (m, 0.12), 0.07)
    b.ellipse(p.white, (m - 0.08, 0.01, m + 0.08, 0.11))


def taxi(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A car from the side, yellow or orange, with a lamp on its roof."""
    w = b.aspect
    body = p.yellow if rng.random() < 0.7 else p.orange
    b.polygon(body, (w * 0.2, 0.5), (w * 0.32, 0.2), (w * 0.68, 0.2), (w * 0.82, 0.5))
    b.polygon(p.dark, (w * 0.26, 0.48), (w * 0.35, 0.26), (w * 0.49, 0.26), (w * 0.49, 0.48))
    b.polygon(p.dark, (w * 0.52, 0.48), (w * 0.52, 0.26), (w * 0.65, 0.26), (w * 0.75, 0.48))
    b.box(body, (0.0, 0.46, w, 0.84), 0.1)
    b.box(p.white, (w * 0.42, 0.1, w * 0.58, 0.2), 0.02)
    b.box(darker(body), (0.03, 0.74, w - 0.03, 0.84))
    b.wheels(p, 0.84, 0.16, 0.07, 0.22, 0.78)


def school_bus(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A yellow or orange bus: a long box with one band of windows."""
    w = b.aspect
    body = p.yellow if rng.random() < 0.7 else p.orange
    b.box(body, (0.0, 0.12, w, 0.88), 0.06)
    b.box(p.dark, (0.06, 0.22, w - 0.06, 0.48), 0.03)
    b.wheels(p, 0.86, 0.14, 0.06, 0.22, 0.78)


def delivery_van(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A high van with a sloping windscreen and a white panel on its side."""
    w = b.aspect
    body = p.yellow if rng.random() < 0.5 else p.orange
    b.polygon(body, (0.0, 0.1), (w * 0.72, 0.1), (w * 0.86, 0.46), (w, 0.54), (w, 0.86), (0.0, 0.86))
    b.polygon(p.dark, (w * 0.66, 0.2), (w * 0.72, 0.2), (w * 0.82, 0.46), (w * 0.66, 0.46))
    b.box(p.cloth, (w * 0.1, 0.28, w * 0.5, 0.56))
    b.wheels(p, 0.86, 0.14, 0.06, 0.2, 0.8)


def wheelie_bin(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A rubbish bin with a lid, a large white sticker and a wheel."""
    w = b.aspect
    b.polygon(p.orange, (0.04, 0.16), (w - 0.04, 0.16), (w - 0.1, 0.94), (0.1, 0.94))
    b.box(darker(p.orange, 0.6), (0.0, 0.06, w, 0.18), 0.05)
    b.box(p.white, (w / 2 - 0.2, 0.36, w / 2 + 0.2, 0.7))
    b.disc(p.dark, (w - 0.14, 0.92), 0.08)


def post_box(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A round-topped post box with a slot and a white plate."""
    w = b.aspect
    body = p.orange if rng.random() < 0.5 else p.yellow
    b.box(body, (0.05, 0.02, w - 0.05, 0.7), 0.2)
    b.box(body, (0.05, 0.4, w - 0.05, 0.74))
    b.box(p.dark, (0.14, 0.2, w - 0.14, 0.27))
    b.box(p.white, (0.16, 0.36, w - 0.16, 0.56))
    b.box(p.dark, (0.1, 0.74, 0.18, 1.0))
    b.box(p.dark, (w - 0.18, 0.74, w - 0.1, 1.0))


def ad_screen(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A dark screen with an amber picture, a square or a disc, on an orange pedestal."""
    w = b.aspect
    b.box(p.dark, (0.0, 0.0, w, 0.6), 0.02)
    if rng.random() < 0.5:
        b.disc(p.yellow, (w * rng.uniform(0.3, 0.7), 0.3), 0.2)
    else:
        b.box(p.yellow, (w * 0.14, 0.24, w * 0.86, 0.46))
    b.box(p.grey, (w / 2 - 0.07, 0.6, w / 2 + 0.07, 0.84))
    b.box(p.orange, (w * 0.16, 0.82, w * 0.84, 0.98), 0.02)


def food_cart(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A food cart: a yellow or orange box with a hatch, a small roof, two wheels and a handle."""
    w = b.aspect
    body = p.yellow if rng.random() < 0.6 else p.orange
    b.box(body, (0.1, 0.36, w * 0.8, 0.84), 0.03)
    b.box(p.dark, (0.2, 0.46, w * 0.5, 0.64))
    b.box(p.white, (0.2, 0.7, w * 0.7, 0.76))
    for x in (0.16, w * 0.74):
        b.line(p.grey, 0.03, (x, 0.1), (x, 0.4))
    b.polygon(p.white, (0.04, 0.16), (w * 0.22, 0.02), (w * 0.66, 0.02), (w * 0.86, 0.16))
    b.line(p.dark, 0.04, (w * 0.8, 0.5), (w - 0.03, 0.44))
    b.wheels(p, 0.86, 0.13, 0.05, 0.26, 0.64)


def street_clock(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A clock with two white faces on a post that stands on an orange or yellow plinth."""
    m = b.aspect / 2
    body = p.orange if rng.random() < 0.5 else p.yellow
    b.line(p.grey, 0.05, (m, 0.2), (m, 0.72))
    b.disc(p.dark, (m, 0.18), 0.18)
    b.disc(p.white, (m, 0.18), 0.14)
    b.line(p.dark, 0.03, (m, 0.09), (m, 0.18), (m + 0.08, 0.22))
    b.polygon(body, (m - 0.12, 0.6), (m + 0.12, 0.6), (b.aspect - 0.03, 1.0), (0.03, 1.0))
    b.box(p.dark, (m - 0.14, 0.76, m + 0.14, 0.82))
