"""How the look-alikes are drawn: harmless objects of the same sizes and colours, family by family."""

from __future__ import annotations

import numpy as np

from pipeline.scenes.brush import Brush, Paint, darker


def bollard(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A straight post with a round head and white collars."""
    m, r = b.aspect / 2, 0.17
    b.box(p.orange, (m - r, 0.0, m + r, 1.0), r)
    b.box(p.orange, (m - r, 0.5, m + r, 1.0))
    b.box(p.white, (m - r, 0.2, m + r, 0.34))
    b.box(p.white, (m - r, 0.48, m + r, 0.62))
    b.box(darker(p.orange), (m + r * 0.45, 0.7, m + r, 1.0))


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
    """A closed-in café parasol: an orange and white canopy over a thin pole."""
    m, w = b.aspect / 2, b.aspect
    b.line(p.grey, 0.04, (m, 0.3), (m, 0.98))
    b.box(p.dark, (m - 0.16, 0.95, m + 0.16, 1.0), 0.02)
    edges = np.linspace(0.0, w, 6)
    for i, (left, right) in enumerate(zip(edges, edges[1:], strict=False)):
        b.polygon(p.white if i % 2 else p.orange, (m, 0.0), (right, 0.5), (left, 0.5))


def bench(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A park bench with painted planks."""
    w = b.aspect
    b.box(p.orange, (0.0, 0.14, w, 0.27), 0.02)
    b.box(p.white, (0.0, 0.31, w, 0.42), 0.02)
    b.box(p.orange, (0.0, 0.56, w, 0.7), 0.02)
    b.box(p.white, (0.0, 0.7, w, 0.76))
    for x in (0.1, w - 0.1):
        b.line(p.dark, 0.06, (x, 0.1), (x, 1.0))


def picket_fence(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A low fence: pointed upright pickets, orange and white in turn, on two rails."""
    w = b.aspect
    b.box(p.grey, (0.0, 0.34, w, 0.42))
    b.box(p.grey, (0.0, 0.7, w, 0.78))
    pitch = w / 7
    for i in range(7):
        x = i * pitch + 0.02
        colour = p.white if i % 2 else p.orange
        top = (x + pitch / 2 - 0.02, 0.08)
        b.polygon(colour, (x, 0.2), top, (x + pitch - 0.05, 0.2), (x + pitch - 0.05, 1.0), (x, 1.0))


def market_stall(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A stall: a striped awning with scallops on posts, and a table."""
    w = b.aspect
    for x in (0.06, w - 0.06):
        b.line(p.grey, 0.04, (x, 0.3), (x, 1.0))
    b.stripes((0.0, 0.06, w, 0.38), (p.orange, p.white), w / 8)
    for i in range(8):
        b.disc(p.white if i % 2 else p.orange, ((i + 0.5) * w / 8, 0.38), w / 17)
    b.box(p.cloth, (0.08, 0.66, w - 0.08, 0.94))
    for x in np.linspace(0.2, w - 0.2, 5):
        b.disc(p.orange, (float(x), 0.64), 0.07)


def round_sign(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A round traffic sign with a dark rim and two digits, on a post."""
    m, r = b.aspect / 2, b.aspect / 2 * 0.86
    b.line(p.grey, 0.05, (m, 0.5), (m, 1.0))
    b.disc(p.dark, (m, r), r)
    b.disc(p.orange, (m, r), r * 0.88)
    for side in (-1, 1):
        x = m + side * 0.1
        b.box(p.dark, (x - 0.07, r - 0.14, x + 0.07, r + 0.14), 0.03)
        b.box(p.orange, (x - 0.025, r - 0.09, x + 0.025, r + 0.09))


def square_advert(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """An upright square advertisement with lines of text, on two posts."""
    w = b.aspect
    for x in (0.14, w - 0.14):
        b.line(p.grey, 0.045, (x, 0.5), (x, 1.0))
    b.box(p.dark, (0.04, 0.02, w - 0.04, 0.64))
    b.box(p.orange, (0.075, 0.055, w - 0.075, 0.605))
    for y in (0.14, 0.27, 0.4, 0.5):
        b.box(p.dark, (0.14, y, w - 0.14 - rng.uniform(0.0, 0.2), y + 0.05))


def shield_sign(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A route shield: a flat top, a pointed foot and a bold number, on a post."""
    m, w = b.aspect / 2, b.aspect
    b.line(p.grey, 0.05, (m, 0.5), (m, 1.0))

    def shield(rim: float) -> list[tuple[float, float]]:
        left, right, top = rim + 0.03, w - rim - 0.03, rim + 0.01
        return [(left, top), (right, top), (right, 0.42), (m, 0.68 - 1.4 * rim), (left, 0.42)]

    b.polygon(p.dark, *shield(0.0))
    b.polygon(p.orange, *shield(0.04))
    b.box(p.dark, (m - 0.05, 0.14, m + 0.05, 0.48))
    b.box(p.dark, (m - 0.14, 0.14, m + 0.05, 0.2))


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
    b.box(p.cloth, (m - 0.12, 0.56, m - 0.01, 0.97), 0.02)
    b.box(p.cloth, (m + 0.01, 0.56, m + 0.12, 0.97), 0.02)
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
    for x in (0.22, 0.78):
        b.disc(p.dark, (w * x, 0.84), 0.16)
        b.disc(p.grey, (w * x, 0.84), 0.07)


def school_bus(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A yellow or orange bus: a long box with a row of windows and a dark band."""
    w = b.aspect
    body = p.yellow if rng.random() < 0.7 else p.orange
    b.box(body, (0.0, 0.12, w, 0.88), 0.06)
    for i in range(5):
        x = 0.08 + i * (w - 0.14) / 5
        b.box((74, 86, 98), (x, 0.24, x + (w - 0.14) / 5 - 0.05, 0.48))
    b.box(p.dark, (0.0, 0.58, w, 0.63))
    for x in (0.22, 0.78):
        b.disc(p.dark, (w * x, 0.86), 0.14)
        b.disc(p.grey, (w * x, 0.86), 0.06)


def delivery_van(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A high van with a sloping windscreen and a white panel on its side."""
    w = b.aspect
    body = p.yellow if rng.random() < 0.5 else p.orange
    b.polygon(body, (0.0, 0.1), (w * 0.72, 0.1), (w * 0.86, 0.46), (w, 0.54), (w, 0.86), (0.0, 0.86))
    b.polygon(p.dark, (w * 0.66, 0.2), (w * 0.72, 0.2), (w * 0.82, 0.46), (w * 0.66, 0.46))
    b.box(p.white, (w * 0.1, 0.28, w * 0.5, 0.56))
    b.box(p.cloth, (w * 0.16, 0.36, w * 0.44, 0.46))
    for x in (0.2, 0.8):
        b.disc(p.dark, (w * x, 0.86), 0.14)
        b.disc(p.grey, (w * x, 0.86), 0.06)


def wheelie_bin(b: Brush, p: Paint, rng: np.random.Generator) -> None:
    """A rubbish bin with a lid, a white sticker and a wheel."""
    w = b.aspect
    b.polygon(p.orange, (0.04, 0.16), (w - 0.04, 0.16), (w - 0.1, 0.94), (0.1, 0.94))
    b.box(darker(p.orange, 0.6), (0.0, 0.06, w, 0.18), 0.05)
    b.box(p.white, (w / 2 - 0.16, 0.32, w / 2 + 0.16, 0.64))
    b.box(p.dark, (w / 2 - 0.08, 0.4, w / 2 + 0.08, 0.56))
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
    """A dark screen with amber writing on an orange pedestal."""
    w = b.aspect
    b.box(p.dark, (0.0, 0.0, w, 0.6), 0.02)
    for i, y in enumerate((0.08, 0.24, 0.4)):
        width = rng.uniform(0.45, 0.8) * w
        b.box(p.yellow, (w * 0.1, y, w * 0.1 + width * (0.7 if i == 2 else 1.0), y + 0.085))
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
    for x in (0.26, 0.64):
        b.disc(p.dark, (w * x, 0.86), 0.13)
        b.disc(p.grey, (w * x, 0.86), 0.05)


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
