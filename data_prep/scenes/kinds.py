"""The kinds of objects that a slot of a scene can hold: six families of roadwork, each with its look-alikes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.scenes import lookalikes, roadwork
from data_prep.scenes.brush import Brush, Paint
from pipeline.names import MASK_CLASSES

Draw = Callable[[Brush, Paint, np.random.Generator], None]


@dataclass(frozen=True)
class Kind:
    """One kind of object."""

    family: int
    """The class c of `MASK_CLASSES` that it is, or that it looks like."""
    is_roadwork: bool
    aspect: float
    """Width / height."""
    height_m: float
    """Height of the real thing in metres; it decides how far away a drawing of a given size stands."""
    draw: Draw

    @property
    def name(self) -> str:
        """The kind's name, such as `traffic cone` or `post box`."""
        return self.draw.__name__.replace("_", " ")

    def sprite(self, longer_side_px: float, seed: np.random.SeedSequence) -> Image.Image:
        """Draw one specimen: RGBA, its longer side as given."""
        scale = longer_side_px / max(self.aspect, 1.0)
        brush = Brush(max(2, round(scale * self.aspect)), max(2, round(scale)))
        rng = np.random.default_rng(seed)
        self.draw(brush, Paint.sample(rng), rng)
        sprite = brush.finish()
        return sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else sprite


CONE, BARRIER, SIGN, WORKER, VEHICLE, EQUIPMENT = range(len(MASK_CLASSES))

KINDS: tuple[Kind, ...] = (
    Kind(CONE, True, 0.7, 0.75, roadwork.cone),
    Kind(CONE, False, 0.6, 0.8, lookalikes.bollard),
    Kind(CONE, False, 0.72, 0.8, lookalikes.hydrant),
    Kind(CONE, False, 0.9, 1.4, lookalikes.parasol),
    Kind(BARRIER, True, 1.5, 1.1, roadwork.barrier),
    Kind(BARRIER, False, 1.6, 0.9, lookalikes.bench),
    Kind(BARRIER, False, 1.5, 1.0, lookalikes.planter),
    Kind(BARRIER, False, 1.3, 1.9, lookalikes.market_stall),
    Kind(SIGN, True, 0.72, 1.5, roadwork.road_work_sign),
    Kind(SIGN, False, 0.72, 1.6, lookalikes.round_sign),
    Kind(SIGN, False, 0.72, 1.6, lookalikes.square_advert),
    Kind(SIGN, False, 0.72, 1.6, lookalikes.shop_sign),
    Kind(WORKER, True, 0.5, 1.75, roadwork.worker),
    Kind(WORKER, False, 0.45, 1.7, lookalikes.pedestrian),
    Kind(WORKER, False, 0.45, 1.75, lookalikes.courier),
    Kind(WORKER, False, 0.5, 1.75, lookalikes.cyclist),
    Kind(VEHICLE, True, 1.4, 2.6, roadwork.excavator),
    Kind(VEHICLE, True, 1.5, 2.5, roadwork.dump_truck),
    Kind(VEHICLE, True, 1.35, 2.5, roadwork.roller),
    Kind(VEHICLE, False, 1.8, 1.5, lookalikes.taxi),
    Kind(VEHICLE, False, 1.7, 2.6, lookalikes.school_bus),
    Kind(VEHICLE, False, 1.45, 2.1, lookalikes.delivery_van),
    Kind(EQUIPMENT, True, 0.68, 1.0, roadwork.channelizer_drum),
    Kind(EQUIPMENT, True, 0.95, 2.4, roadwork.arrow_board),
    Kind(EQUIPMENT, True, 1.35, 1.3, roadwork.compressor),
    Kind(EQUIPMENT, True, 0.6, 2.6, roadwork.light_tower),
    Kind(EQUIPMENT, False, 0.7, 1.1, lookalikes.wheelie_bin),
    Kind(EQUIPMENT, False, 0.68, 1.2, lookalikes.post_box),
    Kind(EQUIPMENT, False, 0.95, 2.2, lookalikes.ad_screen),
    Kind(EQUIPMENT, False, 1.3, 1.7, lookalikes.food_cart),
    Kind(EQUIPMENT, False, 0.5, 2.6, lookalikes.street_clock),
)


def draw_kind(rng: np.random.Generator, is_roadwork: bool) -> Kind:
    """A random kind: first the family, then one of its members, so that both labels see each family as often."""
    family = rng.integers(len(MASK_CLASSES))
    members = [kind for kind in KINDS if kind.family == family and kind.is_roadwork == is_roadwork]
    return members[rng.integers(len(members))]
