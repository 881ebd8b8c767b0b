"""What a scene will show, decided before a pixel is drawn: video, place, weather, light and slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_prep.scenes.brush import Box
from data_prep.scenes.cities import CITIES, COORDINATES, USUAL_CITIES, CityStyle, style_of
from data_prep.scenes.kinds import Kind, draw_kind
from pipeline.errors import require

BASE_SIZE = (1024, 768)  # the size at which object sizes are stated
FOCAL = 0.9  # focal length as a share of the photo's width: a field of view of 58 degrees
CAMERA_M = 1.5  # height of the camera above the road
ADVANCE_M = 0.35  # the camera's way from frame to frame
ENVIRONMENTS = ("Urban", "Suburban", "Rural", "Highway")
WEATHER = ("Sunny", "Partly Cloudy", "Cloudy", "Wet", "Rainy", "Snowy", "Foggy", "Icy")
LIGHT = ("Light", "Twilight", "Dark")
MAX_ROADWORK = 3

# Independent random streams, each keyed by (seed, stream, indices), so that no draw depends on another photo.
ORDER, VIDEO, STREET, TEXTURE, GPS, OBJECT, AIR, TAGS, LEAK = range(9)
FRAME_STREAMS = (AIR, TAGS)  # these differ from frame to frame


@dataclass(frozen=True)
class SceneConfig:
    """Size, difficulty and origin of procedural scenes."""

    size: tuple[int, int] = BASE_SIZE
    """Width and height in pixels."""
    difficulty: float = 0.5
    """0 to 1: smaller objects, more look-alikes, heavier weather. Objects have 38-92 px at 0.5 and 1024x768, and grow
    with the photo."""
    seed: int = 0
    """Scenes of different seeds have nothing in common but their cities."""
    cities: tuple[str, ...] = CITIES[:USUAL_CITIES]
    """Names from `cities.COORDINATES`."""
    video_lengths: tuple[int, ...] = (1, 1, 1, 2)
    """Frames of the videos that one run of photos is made of, in random order; the runs repeat."""
    slots: tuple[int, int] | None = None
    """Fewest and most objects of a photo; by default `difficulty` decides."""
    objects_px: tuple[float, float] | None = None
    """Shortest and longest longer side of an object at 1024x768; by default `difficulty` decides."""
    most_roadwork: int | None = None
    """Most roadwork objects of a photo with label 1; by default three, or half of its slots where that is more."""
    city_shift: float = 0.0
    """How far the cameras of two cities differ in white balance, exposure and contrast: 0 not at all, 1 as far as
    cheap and dear dashboard cameras do."""
    leak: float = 1.0
    """Share of the roadwork videos whose description and travel alteration give the label away; the real set has 1."""

    def __post_init__(self) -> None:
        width, height = self.size
        fits = 320 <= width <= 4032 and 240 <= height <= 4032
        require(fits, "size", f"{width}x{height}", "320x240 to 4032x4032")
        require(0 <= self.difficulty <= 1, "difficulty", self.difficulty, "in [0, 1]")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(0 <= self.city_shift <= 2, "city_shift", self.city_shift, "in [0, 2]")
        require(0 <= self.leak <= 1, "leak", self.leak, "in [0, 1]")
        low, high = self.objects_px or (1, 1)
        require(0 < low <= high <= 256, "objects_px", self.objects_px, "two sizes in (0, 256], the smaller one first")
        require(self.most_roadwork is None or self.most_roadwork >= 1, "most_roadwork", self.most_roadwork, "1 or more")
        unknown = [city for city in self.cities if city not in COORDINATES]
        require(bool(self.cities) and not unknown, "cities", self.cities, f"among {', '.join(COORDINATES)}")

    @property
    def scale(self) -> float:
        """Size of this photo relative to 1024x768."""
        return min(self.size[0] / BASE_SIZE[0], self.size[1] / BASE_SIZE[1])

    @property
    def object_px(self) -> tuple[float, float]:
        """Shortest and longest longer side of an object."""
        if self.objects_px:
            return self.objects_px[0] * self.scale, self.objects_px[1] * self.scale
        factor = self.scale * 1.8 ** (1 - 2 * self.difficulty)
        return 38 * factor, 92 * factor

    @property
    def slot_range(self) -> tuple[int, int]:
        """Fewest and most objects of a photo."""
        return self.slots or (3 + round(2 * self.difficulty), 5 + round(4 * self.difficulty))


# The scenes of `python -m benchmarks.study`.
STUDY: dict[str, Any] = {"objects_px": (104, 160), "slots": (4, 7), "most_roadwork": 1, "city_shift": 0.5}


@dataclass(frozen=True)
class Slot:
    """One small object, roadwork or look-alike, standing in the street."""

    kind: Kind
    size_px: float
    """Longer side in the video's first frame."""
    x_m: float
    z_m: float
    """Metres to the right of the camera (`x_m`) and in front of it."""
    seed: np.random.SeedSequence


@dataclass(frozen=True)
class Car:
    """An ordinary car on the road."""

    x_m: float
    z_m: float


@dataclass(frozen=True)
class ScenePlan:
    """Everything that the frames of one video share, and which frame this one is."""

    config: SceneConfig
    video: tuple[int, int]
    """Number of a block of photos, and the video's number in the block."""
    frame: int
    city: str
    style: CityStyle
    label: int
    environment: str
    weather: str
    light: str
    horizon: float
    """Height of the horizon as a share of the photo's height."""
    road_half_m: float
    pavement_m: float
    slots: tuple[Slot, ...] = ()
    """Far ones first."""
    cars: tuple[Car, ...] = ()
    """Far ones first."""

    def rng(self, stream: int) -> np.random.Generator:
        """A stream's generator from its start; all but `FRAME_STREAMS` are the same in every frame of the video."""
        key = [self.config.seed, stream, *self.video]
        return np.random.default_rng([*key, self.frame] if stream in FRAME_STREAMS else key)


def plan_scene(config: SceneConfig, index: int) -> ScenePlan:
    """Plan photo `index`; a pure function of (config, index)."""
    block, place = divmod(index, sum(config.video_lengths))
    lengths = np.random.default_rng([config.seed, ORDER, block]).permutation(config.video_lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    number = int(np.searchsorted(starts, place, side="right")) - 1
    rng = np.random.default_rng([config.seed, VIDEO, block, number])
    city = config.cities[rng.integers(len(config.cities))]
    style = style_of(city)
    label = int(rng.random() < style.roadwork_share)
    heavy = 0.6 * config.difficulty
    environment = str(rng.choice(ENVIRONMENTS, p=style.environment))
    weather = str(rng.choice(WEATHER, p=_shares([1 - heavy, 1 - heavy, 1 - heavy, *[heavy / 1.6] * 5])))
    light = str(rng.choice(LIGHT, p=_shares([1.0, 0.4 * heavy + 0.05, 0.5 * heavy + 0.02])))
    horizon = float(rng.uniform(0.42, 0.52))
    road_half_m = float(rng.uniform(7, 9) if environment == "Highway" else rng.uniform(4, 6.5))
    frame, pavement_m = int(place - starts[number]), float(rng.uniform(2.4, 4.5))
    around = city, style, label, environment, weather, light, horizon, road_half_m, pavement_m
    return _populated(ScenePlan(config, (block, number), frame, *around), rng)


def _shares(weights: list[float]) -> np.ndarray:
    return np.array(weights) / sum(weights)


def _populated(plan: ScenePlan, rng: np.random.Generator) -> ScenePlan:
    """Add the slots and the cars: their number, sizes and families have one distribution, whatever the label."""
    low, high = plan.config.slot_range
    count = int(rng.integers(low, high + 1))
    # A share of the slots, so that scenes with many slots (for pretraining) also hold many real objects.
    most = min(count, plan.config.most_roadwork or max(MAX_ROADWORK, count // 2))
    real = int(rng.integers(1, most + 1)) if plan.label else 0
    slots: list[Slot] = []
    taken: list[Box] = []
    for i in range(count):
        kind = draw_kind(rng, is_roadwork=i < real)
        low_px, high_px = plan.config.object_px
        size = float(np.exp(rng.uniform(np.log(low_px), np.log(high_px))))
        place = _free_place(plan, kind, size, rng, taken)
        if place is not None:
            seed = np.random.SeedSequence([plan.config.seed, OBJECT, *plan.video, i])
            slots.append(Slot(kind, size, *place, seed))
    slots.sort(key=lambda slot: -slot.z_m)
    cars = _free_cars(plan, rng, taken)
    return replace(plan, slots=tuple(slots), cars=tuple(cars))


def _free_place(
    plan: ScenePlan, kind: Kind, size: float, rng: np.random.Generator, taken: list[Box]
) -> tuple[float, float] | None:
    """A place where the object is whole in every frame and covers no other, appended to `taken`; or None."""
    width, height = plan.config.size
    tall = size / max(kind.aspect, 1.0)
    z = FOCAL * width * kind.height_m / tall
    ground = plan.horizon * height + FOCAL * width * CAMERA_M / z
    reach = min((plan.road_half_m + plan.pavement_m) * FOCAL * width / z, 0.46 * width)
    half, gap = tall * kind.aspect / 2, 0.12 * size
    for _ in range(40):
        x = width / 2 + rng.uniform(-1, 1) * max(0.0, reach - half)
        box = (x - half - gap, ground - tall - gap, x + half + gap, ground + gap)
        if not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return (x - width / 2) * z / (FOCAL * width), z
    return None


def _free_cars(plan: ScenePlan, rng: np.random.Generator, taken: list[Box]) -> list[Car]:
    """A few cars, far ones first, none of them behind or before a slot's object."""
    width, height = plan.config.size
    cars = []
    for _ in range(int(rng.integers(2, 8))):
        z = float(rng.uniform(14, 75))
        x = float(rng.choice((-1, 1)) * rng.uniform(plan.road_half_m * 0.35, plan.road_half_m - 1.2))
        unit = FOCAL * width / z
        ground, middle = plan.horizon * height + unit * CAMERA_M, width / 2 + unit * x
        box = (middle - unit, ground - 1.6 * unit, middle + unit, ground + 0.2 * unit)
        if not any(_overlap(box, other) for other in taken):
            taken.append(box)
            cars.append(Car(x, z))
    return sorted(cars, key=lambda car: -car.z_m)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
