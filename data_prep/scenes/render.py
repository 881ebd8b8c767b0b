"""From a plan to a photo, its mask and its metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_prep.scenes.atmosphere import texture, weathered
from data_prep.scenes.kinds import Kind
from data_prep.scenes.metadata import raw_metadata
from data_prep.scenes.plan import ADVANCE_M, CAMERA_M, FOCAL, TEXTURE, SceneConfig, ScenePlan, Slot, plan_scene
from data_prep.scenes.street import draw_street


@dataclass(frozen=True)
class SceneObject:
    """One object that was drawn."""

    kind: Kind
    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 in pixels, the ends excluded."""


@dataclass(frozen=True)
class Scene:
    """One procedural photo with everything that is known about it."""

    image: np.ndarray
    """The photo, uint8 [H, W, 3], RGB."""
    mask: np.ndarray
    """uint8 [H, W]: 0 is background and look-alikes, c + 1 class c of `MASK_CLASSES`."""
    label: int
    """1 if and only if at least one object is roadwork."""
    objects: tuple[SceneObject, ...]
    metadata: dict[str, Any]
    """The columns of the NATIX set, as raw as in that set."""


def render(config: SceneConfig, index: int) -> Scene:
    """Draw photo `index`; the same bytes for the same (config, index), in any process and any order."""
    plan = plan_scene(config, index)
    image = texture(draw_street(plan), plan.rng(TEXTURE))
    mask = Image.new("L", image.size)
    objects = tuple(_place(slot, plan, image, mask) for slot in plan.slots)
    image = weathered(image, plan)
    return Scene(np.asarray(image), np.asarray(mask), plan.label, objects, raw_metadata(plan, index))


def _place(slot: Slot, plan: ScenePlan, image: Image.Image, mask: Image.Image) -> SceneObject:
    """Draw one object with its shadow into the photo, and its class into the mask."""
    width, height = plan.config.size
    z = slot.z_m - ADVANCE_M * plan.frame
    sprite = slot.kind.sprite(slot.size_px * slot.z_m / z, slot.seed)
    left = round(width / 2 + FOCAL * width * slot.x_m / z - sprite.width / 2)
    bottom = round(plan.horizon * height + FOCAL * width * CAMERA_M / z)
    top = bottom - sprite.height
    _shadow(image, left, bottom, sprite.width)
    image.paste(sprite, (left, top), sprite)
    solid = sprite.getchannel("A").point([0] * 128 + [255] * 128)
    value = slot.kind.family + 1 if slot.kind.is_roadwork else 0
    mask.paste(value, (left, top), solid)
    return SceneObject(slot.kind, (left, top, left + sprite.width, bottom))


def _shadow(image: Image.Image, left: int, bottom: int, width: int) -> None:
    """A soft dark ellipse where the object touches the ground."""
    tall = max(2, width // 5)
    shade = Image.new("L", (width + 8, tall + 8))
    ImageDraw.Draw(shade).ellipse((4, 4, width + 4, tall + 4), fill=110)
    shade = shade.filter(ImageFilter.BoxBlur(2))
    image.paste((24, 24, 28), (left - 4, bottom - tall // 2 - 4), shade)
