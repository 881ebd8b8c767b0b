"""What a feature cache depends on beside photos and masks; a cache that differs is refused, with the reason."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Annotated

import msgspec
import torch

from pipeline.data.views import CANVAS_RATIO, TORCH_LANCZOS, canvas_boxes, useful_views
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.config import InputSpec

# Raise it when the pixels of a view change while boxes and resize kernel stay the same.
PIXELS_VERSION = 1
STORED_DTYPE = torch.bfloat16
Size = Annotated[int, msgspec.Meta(gt=0, le=1 << 16)]
"""A size of tokens or grids in a cache, which may come from elsewhere: far above any model's, and no product of them
overflows 64 bits."""
PROBED_SIZES = ((4032, 3024), (3024, 4032), (1920, 1080), (640, 640), (224, 224), (3000, 400))


@dataclass(frozen=True)
class FeatureKey:
    """What a row depends on: equal keys, photos and masks give equal rows."""

    backbone: str
    """Name of the backbone, for messages only; `weights` is compared."""
    weights: str
    """Fingerprint of the backbone's configuration and weights, see `FrozenBackbone.fingerprint`."""
    view_side: int
    num_views: Size
    pool_grid: Size
    mask_side: Size
    """Cells per side of the mask targets that are stored with the tokens."""
    geometry: str
    """Fingerprint of the views' boxes, and of which views are useful."""
    resize: str
    """Library whose Lanczos kernel resizes the views."""
    decode_scale: str
    dtype: str
    """Type of the stored tokens."""

    def difference(self, wanted: FeatureKey) -> str | None:
        """Why tokens with this key cannot be used where `wanted` is needed, in a few words; None if they can.

        A cache with more views also fits a model with fewer: the views have the same numbers.
        """
        for field in fields(self):
            mine, other = getattr(self, field.name), getattr(wanted, field.name)
            if field.name == "backbone" or mine == other or (field.name == "num_views" and mine > other):
                continue
            if field.name == "weights":
                return f"backbone {self.backbone} ({mine[:12]}), and not {wanted.backbone} ({other[:12]})"
            return f"{_NAMES.get(field.name, field.name.replace('_', ' '))} {mine}, and not {other}"
        return None


# What a field is called in a message, where its own name does not say it.
_NAMES = {
    "num_views": "number of views",
    "pool_grid": "pooled grid",
    "geometry": "view geometry",
    "resize": "resize kernel",
}


def feature_key(backbone: FrozenBackbone, spec: InputSpec, pool_grid: int) -> FeatureKey:
    """The key of the tokens that a model reads on this machine.

    Args:
        backbone: The loaded backbone.
        spec: The model's input spec.
        pool_grid: The model's cells per side.
    """
    return FeatureKey(
        backbone=backbone.name,
        weights=backbone.fingerprint,
        pool_grid=pool_grid,
        geometry=geometry_fingerprint(spec.view_side),
        resize="torch lanczos" if TORCH_LANCZOS else "Pillow lanczos",
        dtype=str(STORED_DTYPE).removeprefix("torch."),
        **vars(spec),
    )


def geometry_fingerprint(side: int) -> str:
    """SHA-256 of the views' boxes, and of which are useful, in photos of several shapes."""
    places = [
        (canvas_boxes(width, height, side), useful_views(width, height, side).tolist())
        for width, height in PROBED_SIZES
    ]
    return hashlib.sha256(json.dumps([PIXELS_VERSION, CANVAS_RATIO, places]).encode()).hexdigest()[:16]
