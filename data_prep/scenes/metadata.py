"""The metadata of a scene as raw as the NATIX set has it: strings that hold lists, gaps, and a leak."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from data_prep.scenes.cities import COORDINATES
from data_prep.scenes.plan import GPS, LEAK, TAGS, ScenePlan

NULLS = ("", "nan", "None", None)
NULL_SHARE = 0.12
# At the equator. Distances elsewhere in `data_prep` are those of the mean sphere, 0.1 % shorter; but with another value
# here, the scenes of every seed would lie elsewhere.
METRES_PER_DEGREE = 111_320.0
CITY_RADIUS_M = 6_000.0
FLAWED_GPS = (None, "", "nan", "[0.0, 0.0]", "[91.5, 200.0]")
FLAWED_GPS_SHARE = 0.06
ALTERATIONS = (
    "['Partially Blocked']", "['Fully Blocked']", "['Lane Shift']", "['Partially Blocked', 'Lane Shift']",
)  # fmt: skip
COMPANIONS = {"Rainy": "Wet", "Snowy": "Icy", "Foggy": "Cloudy"}


def raw_metadata(plan: ScenePlan, index: int) -> dict[str, Any]:
    """Every column of the NATIX set except the image and the label, by its name in that set.

    Labels leak as in the real set: `scene_description` is non-empty exactly where the label is 1, and
    `travel_alteration` nearly so. With `leak` below 1, the other roadwork videos have both columns no more often than
    videos without roadwork. All other gaps are drawn without regard to the label.
    """
    rng = plan.rng(TAGS)
    leaks = bool(plan.label) and plan.rng(LEAK).random() < plan.config.leak
    video = hashlib.sha256(f"{plan.config.seed}/{plan.video}".encode()).hexdigest()[:32]
    weather = [plan.weather]
    if plan.weather in COMPANIONS and rng.random() < 0.4:
        weather.append(COMPANIONS[plan.weather])
    return {
        "id": index,
        **dict(zip(("width", "height"), plan.config.size, strict=True)),
        "license": 0,
        **dict.fromkeys(("flickr_url", "coco_url")),
        "date_captured": 0,
        "gps": _gps(plan, rng),
        # Never NULL: a photo with neither city nor GPS could not be kept apart from its city's others.
        "city_name": plan.city,
        "scene_description": _description(plan) if leaks else "",
        "video_info.frame_id": f"{30 * (plan.frame + 1):05d}.jpg",
        "video_info.seq_id": plan.video[1],
        "video_info.vid_id": video,
        "scene_level_tags.daytime": _or_null(rng, plan.light),
        "scene_level_tags.scene_environment": _or_null(rng, plan.environment),
        "scene_level_tags.weather": _or_null(rng, str(weather)),
        "scene_level_tags.travel_alteration": _alteration(leaks, rng),
    }


def _or_null(rng: np.random.Generator, value: str) -> str | None:
    choice = NULLS[rng.integers(len(NULLS))]
    return choice if rng.random() < NULL_SHARE else value


def _gps(plan: ScenePlan, rng: np.random.Generator) -> str | None:
    """A place around the city's centre; the frames of a video lie metres apart."""
    place = plan.rng(GPS)
    north, east = place.normal(0, CITY_RADIUS_M, 2) + rng.normal(0, 4, 2)
    latitude, longitude = COORDINATES[plan.city]
    latitude += north / METRES_PER_DEGREE
    longitude += east / (METRES_PER_DEGREE * np.cos(np.radians(latitude)))
    flaw = FLAWED_GPS[rng.integers(len(FLAWED_GPS))]
    return flaw if rng.random() < FLAWED_GPS_SHARE else f"[{latitude:.8f}, {longitude:.8f}]"


def _description(plan: ScenePlan) -> str:
    names = sorted({slot.kind.name for slot in plan.slots if slot.kind.is_roadwork})
    return f"Work zone on a {plan.environment.lower()} road with {' and '.join(names)}."


def _alteration(leaks: bool, rng: np.random.Generator) -> str | None:
    words, blank = str(rng.choice(ALTERATIONS)), NULLS[rng.integers(len(NULLS))]
    filled = rng.random() < (0.9 if leaks else 0.03)
    return words if filled else blank
