"""The cities of the procedural scenes, and the look that each of them has."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np

from data_prep.scenes.brush import Colour, rounded

# Approximate centres, degrees north and east.
USUAL: dict[str, tuple[float, float]] = {
    "boston": (42.36, -71.06), "charlotte": (35.23, -80.84), "chicago": (41.88, -87.63), "columbus": (39.96, -83.00),
    "denver": (39.74, -104.99), "detroit": (42.33, -83.05), "houston": (29.76, -95.37),
    "indianapolis": (39.77, -86.16), "los_angeles": (34.05, -118.24), "philadelphia": (39.95, -75.17),
    "phoenix": (33.45, -112.07), "pittsburgh": (40.44, -79.99),
}  # fmt: skip
PRETRAINED: dict[str, tuple[float, float]] = {
    "atlanta": (33.75, -84.39), "austin": (30.27, -97.74), "cincinnati": (39.10, -84.51), "dallas": (32.78, -96.80),
    "kansas_city": (39.10, -94.58), "miami": (25.76, -80.19), "minneapolis": (44.98, -93.27),
    "nashville": (36.16, -86.78), "portland": (45.52, -122.68), "salt_lake_city": (40.76, -111.89),
    "seattle": (47.61, -122.33), "tampa": (27.95, -82.46),
}  # fmt: skip
FURTHER: dict[str, tuple[float, float]] = {
    "albuquerque": (35.08, -106.65), "baltimore": (39.29, -76.61), "birmingham": (33.52, -86.80),
    "buffalo": (42.89, -78.88), "el_paso": (31.76, -106.49), "jacksonville": (30.33, -81.66),
    "las_vegas": (36.17, -115.14), "memphis": (35.15, -90.05), "new_orleans": (29.95, -90.07),
    "omaha": (41.26, -95.93), "richmond": (37.54, -77.44), "san_antonio": (29.42, -98.49),
}  # fmt: skip
COORDINATES = {**USUAL, **PRETRAINED, **FURTHER}

CITIES = (*USUAL, *FURTHER)
"""The cities of data sets: demos and tests take the first twelve, studies may take all."""
USUAL_CITIES = len(USUAL)
PRETRAIN_CITIES = tuple(PRETRAINED)
"""The cities that `scenes-tiny` was pretrained on; no data set has one of them."""

WALLS: tuple[Colour, ...] = (
    (150, 86, 66), (172, 120, 92), (196, 180, 152), (122, 126, 134), (206, 202, 194),
    (160, 146, 128), (98, 106, 120), (184, 152, 116), (132, 98, 88), (176, 184, 188),
)  # fmt: skip


@dataclass(frozen=True)
class CityStyle:
    """How a city looks and how often its roads are under work; a pure function of its name."""

    walls: tuple[Colour, ...]
    road: Colour
    pavement: Colour
    leaves: Colour
    grass: Colour
    sky_warmth: float
    """-1 is a cold sky, 1 a warm one."""
    lane_yellow: bool
    """Whether the centre line is yellow instead of white."""
    window_share: float
    """Width of a window as a share of its bay."""
    storeys: float
    """Mean number of storeys in the centre."""
    trees: float
    """Trees per 10 m of pavement."""
    roadwork_share: float
    """Share of the videos with label 1."""
    environment: tuple[float, float, float, float]
    """Probabilities of urban, suburban, rural, highway."""
    camera: tuple[float, float, float, float]
    """How its cameras deviate in red, blue, exposure and contrast, in standard deviations of all cities' cameras."""


@cache
def style_of(city: str) -> CityStyle:
    """The look of a city, drawn from a hash of its name: the same in every process and for every seed."""
    digest = hashlib.sha256(city.encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    asphalt, slab, hue = rng.uniform(72, 112), rng.uniform(128, 172), rng.uniform(-14, 14)
    green, dry = rng.uniform(84, 122), rng.uniform(0, 40)
    return CityStyle(
        walls=tuple(WALLS[i] for i in rng.choice(len(WALLS), 4, replace=False)),
        road=rounded((asphalt + hue / 3, asphalt, asphalt - hue / 3)),
        pavement=rounded((slab + hue, slab, slab - hue)),
        leaves=rounded((green * 0.55 + dry, green, green * 0.42)),
        grass=rounded((green * 0.75 + dry, green + 16, green * 0.5)),
        sky_warmth=float(rng.uniform(-1, 1)),
        lane_yellow=bool(rng.random() < 0.5),
        window_share=float(rng.uniform(0.38, 0.7)),
        storeys=float(rng.uniform(2.5, 7)),
        trees=float(rng.uniform(0.1, 0.8)),
        roadwork_share=float(rng.uniform(0.42, 0.58)),
        environment=tuple(rng.dirichlet((6, 4, 1.5, 2))),
        camera=tuple(np.clip(rng.normal(size=4), -2, 2)),
    )
