"""What of a cache can be chosen: the model's part that decides about tokens, and how they are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["auto", "cudnn", "flash", "efficient", "math"]


@dataclass
class ModelChoice:
    """What of a recipe's model the tokens depend on; what is not given is the recipe's."""

    backbone: str | None = None
    """A DINOv3 hub id, a local folder, or `scenes-tiny`."""
    view_side: int | None = None
    """Side of a view in pixels, a multiple of 16."""
    pool_grid: int | None = None
    """Cells per side that a view's patch tokens are pooled to."""


@dataclass(frozen=True)
class Options:
    """How the work is done; the tokens do not depend on it beyond rounding."""

    device: str
    workers: int | None
    """Processes that read, decode and cut views, for each one that computes; None for one on each spare core."""
    batch_views: int | None
    """Views in one pass of the backbone; None for what suits the device."""
    compile: bool
    attention: Attention
    shard_mb: float
