"""What a feature cache depends on beside photos and masks; one made with anything else is stale, and says with what."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields

import torch

from pipeline.data.views import CANVAS_RATIO, TORCH_LANCZOS, canvas_boxes, useful_views
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.config import InputSpec

# Raise it when the pixels of a view change while boxes and resize kernel stay what they are.
PIXELS_VERSION = 1
STORED_DTYPE = torch.bfloat16
PROBED_SIZES = ((4032, 3024), (3024, 4032), (1920, 1080), (640, 640), (224, 224), (3000, 400))
# Of a transformers configuration, what says nothing about the computation.
BOOKKEEPING = frozenset({"transformers_version", "architectures", "dtype"})


@dataclass(frozen=True)
class FeatureKey:
    """Equal keys, photos and masks give equal rows."""

    backbone: str
    """Name, for people; `weights` is what counts."""
    weights: str
    """Fingerprint of the backbone's configuration and weights."""
    view_side: int
    num_views: int
    pool_grid: int
    mask_side: int
    """Cells per side of the mask targets that lie beside the tokens."""
    geometry: str
    """Fingerprint of the places of the views, and which of them are useful."""
    resize: str
    """Whose Lanczos kernel."""
    decode_scale: str
    dtype: str
    """Of the stored tokens."""

    def difference(self, wanted: FeatureKey) -> str | None:
        """Why tokens of this key are none of `wanted`, in a few words; None where they are.

        Fewer views are found among more: they are numbered alike.
        """
        for field in fields(self):
            mine, other = getattr(self, field.name), getattr(wanted, field.name)
            if field.name == "backbone" or mine == other or (field.name == "num_views" and mine > other):
                continue
            if field.name == "weights":
                return f"backbone {self.backbone} ({mine[:12]}), and not {wanted.backbone} ({other[:12]})"
            return f"{_NAMES[field.name]} {mine}, and not {other}"
        return None


_NAMES = {
    "view_side": "view side",
    "num_views": "number of views",
    "pool_grid": "pooled grid",
    "mask_side": "mask side",
    "geometry": "view geometry",
    "resize": "resize kernel",
    "decode_scale": "decode scale",
    "dtype": "dtype",
}


def feature_key(backbone: FrozenBackbone, spec: InputSpec, pool_grid: int) -> FeatureKey:
    """The key of the tokens that a model reads on this machine.

    Args:
        backbone: The loaded one.
        spec: The model's.
        pool_grid: The model's.
    """
    return FeatureKey(
        backbone=backbone.name,
        weights=weights_fingerprint(backbone),
        view_side=spec.view_side,
        num_views=spec.num_views,
        pool_grid=pool_grid,
        mask_side=spec.mask_side,
        geometry=geometry_fingerprint(spec.view_side),
        resize="torch lanczos" if TORCH_LANCZOS else "Pillow lanczos",
        decode_scale=spec.decode_scale,
        dtype=str(STORED_DTYPE).removeprefix("torch."),
    )


def weights_fingerprint(backbone: FrozenBackbone) -> str:
    """SHA-256 of the configuration and of all weights, rounded to bf16 so that every device finds the same.

    Weights that differ by less than that give tokens that differ by less than what is stored.
    """
    settings = {key: value for key, value in backbone.config.to_diff_dict().items() if key not in BOOKKEEPING}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in sorted(backbone.model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(memoryview(parameter.to(STORED_DTYPE).cpu().contiguous().view(torch.int16).numpy()).cast("B"))
    return digest.hexdigest()


def geometry_fingerprint(side: int) -> str:
    """SHA-256 of where the views lie, and which add something, in photos of several shapes."""
    places = [
        (canvas_boxes(width, height, side), useful_views(width, height, side).tolist())
        for width, height in PROBED_SIZES
    ]
    return hashlib.sha256(json.dumps([PIXELS_VERSION, CANVAS_RATIO, places]).encode()).hexdigest()[:16]
