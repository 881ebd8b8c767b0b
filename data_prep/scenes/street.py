"""The street itself: sky, facades, road, trees and ordinary traffic, in a simple perspective."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from data_prep.scenes.brush import Colour, darker, rounded
from data_prep.scenes.plan import ADVANCE_M, CAMERA_M, FOCAL, STREET, Car, ScenePlan

NEAR_M = 1.2  # nothing is drawn closer to the camera
FAR_M = 400.0
CAR_COLOURS: tuple[Colour, ...] = (
    (204, 206, 208), (38, 40, 44), (120, 124, 130), (150, 32, 34), (42, 68, 128), (70, 96, 82), (226, 224, 216),
    (228, 112, 40), (232, 182, 52),
)  # fmt: skip
SKIES: dict[str, tuple[Colour, Colour]] = {
    "Sunny": ((84, 146, 214), (190, 214, 232)),
    "Partly Cloudy": ((112, 158, 206), (200, 214, 224)),
    "Icy": ((150, 176, 200), (214, 222, 230)),
    "Wet": ((142, 152, 164), (190, 196, 202)),
}
GREY_SKY: tuple[Colour, Colour] = ((150, 156, 164), (196, 200, 204))


class View:
    """A pinhole camera above the middle of the road, and a canvas to draw on, enlarged `factor` times."""

    def __init__(self, plan: ScenePlan, factor: int):
        width, height = plan.config.size
        self.plan, self.factor = plan, factor
        self.width, self.height = width * factor, height * factor
        self.focal = FOCAL * self.width
        self.centre = self.width / 2
        self.horizon = plan.horizon * self.height
        self.advance = plan.frame * ADVANCE_M
        self.image = Image.new("RGB", (self.width, self.height))
        self.pen = ImageDraw.Draw(self.image)

    def point(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Pixel of a point: metres right of the camera's way, above the road, in front of the first frame's camera."""
        depth = max(z - self.advance, NEAR_M)
        return self.centre + self.focal * x / depth, self.horizon - self.focal * (y - CAMERA_M) / depth

    def metres(self, z: float) -> float:
        """Pixels per metre at depth z."""
        return self.focal / max(z - self.advance, NEAR_M)

    def quad(self, colour: Colour, *corners: tuple[float, float, float]) -> None:
        """Fill a flat polygon given by its corners in metres."""
        self.pen.polygon([self.point(*corner) for corner in corners], fill=colour)

    def ground(self, colour: Colour, left: float, right: float, near: float, far: float) -> None:
        """Fill a rectangle that lies on the road."""
        self.quad(colour, (left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far))


def draw_street(plan: ScenePlan) -> Image.Image:
    """Paint the street of a plan without its slots: RGB, at the photo's size."""
    factor = 2 if plan.config.scale <= 1.25 else 1  # big photos are smooth enough as they are
    view = View(plan, factor)
    rng = plan.rng(STREET)
    _sky(view, rng)
    _ground(view, rng)
    _sides(view, rng)
    _road(view, rng)
    for car in plan.cars:
        _car(view, rng, car)
    return view.image.reduce(factor) if factor > 1 else view.image


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return rounded((1 - share) * np.array(a) + share * np.array(b))


def _vary(rng: np.random.Generator, colour: Colour, spread: float) -> Colour:
    return rounded(np.clip(np.array(colour) + rng.uniform(-spread, spread), 0, 255))


def _sky(view: View, rng: np.random.Generator) -> None:
    top, low = SKIES.get(view.plan.weather, GREY_SKY)
    warmth = view.plan.style.sky_warmth * 10
    if view.plan.light == "Twilight":
        top, low = _mix(top, (84, 84, 130), 0.6), _mix(low, (238, 164, 118), 0.7)
    elif view.plan.light == "Dark":
        top, low = _mix(top, (20, 26, 52), 0.85), _mix(low, (58, 58, 78), 0.8)
    colours = np.array([top, low], dtype=np.float32) + np.array([warmth, 0, -warmth], dtype=np.float32)
    gradient = Image.fromarray(np.clip(colours, 0, 255).round().astype(np.uint8)[:, None])
    view.image.paste(gradient.resize((view.width, int(view.horizon) + 2), Image.Resampling.BILINEAR))
    clouds = {"Sunny": 2, "Partly Cloudy": 9}.get(view.plan.weather, 5)
    colour = _mix(low, (252, 252, 252), 0.7 if view.plan.weather in SKIES and view.plan.light == "Light" else 0.15)
    for _ in range(clouds):
        x, y = rng.uniform(0, view.width), rng.uniform(0, 0.7) * view.horizon
        for _ in range(5):
            w = view.width * rng.uniform(0.03, 0.09)
            cx, cy = x + rng.uniform(-1, 1) * w, y + rng.uniform(-0.2, 0.2) * w
            view.pen.ellipse((cx - w, cy - w * 0.28, cx + w, cy + w * 0.28), fill=colour)


def _ground(view: View, rng: np.random.Generator) -> None:
    grass = _vary(rng, view.plan.style.grass, 10)
    snow = view.plan.weather == "Snowy"
    view.pen.rectangle((0, view.horizon, view.width, view.height), fill=(226, 230, 236) if snow else grass)


def _road(view: View, rng: np.random.Generator) -> None:
    plan, style = view.plan, view.plan.style
    half, walk = plan.road_half_m, plan.pavement_m
    wet = plan.weather in ("Wet", "Rainy")
    road = darker(style.road, 0.72) if wet else style.road
    pavement = darker(style.pavement, 0.8) if wet else style.pavement
    if plan.weather in ("Snowy", "Icy"):
        share = 0.5 if plan.weather == "Snowy" else 0.2
        road, pavement = _mix(road, (222, 228, 236), share), _mix(pavement, (232, 236, 242), share + 0.2)
    if plan.environment in ("Urban", "Suburban"):
        view.ground(pavement, -half - walk, half + walk, 0, FAR_M)
        for z in np.geomspace(3, 60, 22):
            line = darker(pavement, 0.9)
            view.ground(line, -half - walk, half + walk, z, z * 1.006)
        for side in (-1, 1):
            view.ground(darker(pavement, 0.8), side * half, side * (half + 0.22), 0, FAR_M)
    view.ground(road, -half, half, 0, FAR_M)
    for _ in range(int(rng.integers(2, 7))):  # repaired patches and manholes
        x, z, long = rng.uniform(-half, half - 1.5), rng.uniform(4, 30), rng.uniform(1, 6)
        view.ground(_vary(rng, darker(road, 0.88), 6), x, x + rng.uniform(0.6, 1.6), z, z + long)
    paint = _mix(road, (236, 236, 232), 0.85)
    middle = _mix(road, (230, 180, 60), 0.8) if style.lane_yellow else paint
    for side in (-1, 1):
        view.ground(paint, side * (half - 0.4), side * (half - 0.55), 0, FAR_M)
    for z in np.arange(2.0, 120.0, 6.0):
        view.ground(middle, -0.08, 0.08, z, z + 3)
        if plan.environment == "Highway":
            view.ground(paint, -half / 2 - 0.07, -half / 2 + 0.07, z, z + 3)
            view.ground(paint, half / 2 - 0.07, half / 2 + 0.07, z, z + 3)
    if rng.random() < 0.3 and plan.environment == "Urban":
        z = rng.uniform(9, 22)
        for x in np.arange(-half + 0.3, half - 0.5, 1.1):
            view.ground(paint, x, x + 0.55, z, z + 3)


def _sides(view: View, rng: np.random.Generator) -> None:
    """Facades, hedges and trees along both sides, far ones first."""
    plan, style = view.plan, view.plan.style
    edge = plan.road_half_m + plan.pavement_m
    gap = {"Urban": 0.0, "Suburban": 7.0, "Rural": 45.0, "Highway": 60.0}[plan.environment]
    tall = {"Urban": style.storeys, "Suburban": 2.0, "Rural": 1.5, "Highway": style.storeys}[plan.environment]
    setback = {"Urban": 0.5, "Suburban": 5.0, "Rural": 9.0, "Highway": 16.0}[plan.environment]
    _skyline(view, rng, tall)
    things: list[tuple[float, int, str, float]] = []
    for side in (-1, 1):
        z = rng.uniform(1.5, 6)
        while z < 140:
            length = rng.uniform(9, 20)
            things.append((z, side, "building", length))
            z += length + gap * rng.uniform(0.5, 1.5)
        density = style.trees * (0.5 if plan.environment == "Urban" else 1.0)
        for _ in range(rng.poisson(density * 10)):
            things.append((rng.uniform(9, 90), side, "tree", rng.uniform(3.5, 8)))
        for z in np.arange(rng.uniform(8, 20), 90, 26.0):
            things.append((float(z), side, "lamp", 7.0))
    for z, side, what, size in sorted(things, key=lambda thing: -thing[0]):
        if what == "building":
            _building(view, rng, side * (edge + setback), z, size, max(1, rng.poisson(tall)))
        elif what == "tree":
            _tree(view, rng, side * (edge - 0.6 + setback / 2), z, size)
        else:
            _lamp(view, side, side * (plan.road_half_m + 0.6), z, size)


def _skyline(view: View, rng: np.random.Generator, tall: float) -> None:
    """Distant silhouettes on the horizon."""
    base = view.horizon + 2
    haze = _mix(view.plan.style.leaves, SKIES.get(view.plan.weather, GREY_SKY)[1], 0.6)
    for x in np.linspace(-0.05, 1.0, 24):
        w, h = view.width * rng.uniform(0.04, 0.08), view.height * rng.uniform(0.01, 0.014 * tall + 0.02)
        view.pen.rectangle((x * view.width, base - h, x * view.width + w, base), fill=_vary(rng, haze, 10))


def _building(view: View, rng: np.random.Generator, x: float, z: float, length: float, storeys: int) -> None:
    """One building: the facade along the street with its windows, and the wall that faces the camera."""
    wall = _vary(rng, view.plan.style.walls[rng.integers(4)], 14)
    height, depth, share = storeys * 3.3 + 1, 9.0, view.plan.style.window_share
    dark, lit = (58, 68, 80), (250, 214, 140)
    lit_share = {"Light": 0.03, "Twilight": 0.35, "Dark": 0.45}[view.plan.light]
    outer = x + np.sign(x) * depth
    view.quad(darker(wall, 0.82), (x, 0, z), (outer, 0, z), (outer, height, z), (x, height, z))
    view.quad(wall, (x, 0, z), (x, 0, z + length), (x, height, z + length), (x, height, z))
    eaves, end = height - 0.5, z + length
    view.quad(darker(wall, 0.6), (x, eaves, z), (x, eaves, end), (x, height, end), (x, height, z))
    bays = max(2, int(length / 3.2))
    bay = length / bays
    is_lit = rng.random((storeys, bays)) < lit_share
    for floor in range(storeys):
        low = floor * 3.3 + (0.7 if floor else 0.4)
        high = low + (1.7 if floor else 2.1)
        for i in range(bays):
            a = z + (i + (1 - share) / 2) * bay
            c = a + share * bay
            colour = lit if is_lit[floor, i] else dark
            view.quad(colour, (x, low, a), (x, low, c), (x, high, c), (x, high, a))


def _tree(view: View, rng: np.random.Generator, x: float, z: float, size: float) -> None:
    leaves = _vary(rng, view.plan.style.leaves, 16)
    if view.plan.weather == "Snowy":
        leaves = _mix(leaves, (220, 226, 232), 0.45)
    foot, unit = view.point(x, 0, z), view.metres(z)
    view.pen.line((foot, view.point(x, size * 0.6, z)), (84, 66, 50), max(1, round(0.28 * unit)))
    for _ in range(9):
        cx = foot[0] + rng.uniform(-0.28, 0.28) * size * unit
        cy = foot[1] - rng.uniform(0.5, 0.95) * size * unit
        r = rng.uniform(0.12, 0.22) * size * unit
        view.pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=_vary(rng, leaves, 12))


def _lamp(view: View, side: int, x: float, z: float, size: float) -> None:
    unit = view.metres(z)
    thick = max(1, round(0.12 * unit))
    top, arm = view.point(x, size, z), view.point(x - side * 1.6, size + 0.2, z)
    view.pen.line((view.point(x, 0, z), top, arm), (82, 86, 90), thick)
    r = 0.16 * unit
    colour = (255, 244, 204) if view.plan.light != "Light" else (180, 180, 176)
    view.pen.ellipse((arm[0] - r, arm[1] - r, arm[0] + r, arm[1] + r), fill=colour)


def _car(view: View, rng: np.random.Generator, car: Car) -> None:
    """A car from behind (red lamps) on the right-hand side, from the front (white lamps) on the left."""
    x, z, ahead = car.x_m, car.z_m, car.x_m > 0
    body = _vary(rng, CAR_COLOURS[rng.integers(len(CAR_COLOURS))], 12)
    lamp = (206, 36, 34) if ahead else (250, 246, 226)

    def part(colour: Colour, left: float, low: float, right: float, high: float) -> None:
        (x0, y0), (x1, y1) = view.point(x + left, high, z), view.point(x + right, low, z)
        view.pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), fill=colour)

    part(darker(view.plan.style.road, 0.55), -0.95, -0.05, 0.95, 0.1)
    part((26, 26, 28), -0.85, 0.0, -0.5, 0.5)
    part((26, 26, 28), 0.5, 0.0, 0.85, 0.5)
    part(body, -0.9, 0.28, 0.9, 0.95)
    view.quad(body, (x - 0.85, 0.95, z), (x + 0.85, 0.95, z), (x + 0.62, 1.48, z), (x - 0.62, 1.48, z))
    view.quad((52, 60, 70), (x - 0.72, 0.98, z), (x + 0.72, 0.98, z), (x + 0.54, 1.4, z), (x - 0.54, 1.4, z))
    for side in (-0.72, 0.72):
        part(lamp, side - 0.13, 0.62, side + 0.13, 0.78)
    part((224, 224, 218), -0.22, 0.42, 0.22, 0.54)
