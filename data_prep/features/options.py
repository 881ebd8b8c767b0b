"""The choices for a feature cache: the part of the model that decides the tokens, and how they are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["auto", "cudnn", "flash", "efficient", "math"]
Precision = Literal["auto", "fp8"]


@dataclass
class ModelChoice:
    """The keys of a recipe's model that the tokens depend on; a key that is not given keeps the recipe's value."""

    backbone: str | None = None
    """A DINOv3 hub id, a local folder, or `scenes-tiny`."""
    view_side: int | None = None
    """Side of a view in pixels, a multiple of 16."""
    pool_grid: int | None = None
    """Cells per side that a view's patch tokens are pooled to."""


@dataclass(frozen=True)
class Options:
    """How the work is done; but for `precision`, the tokens do not depend on it beyond rounding."""

    device: str
    workers: int | None
    """Processes that read, decode and cut views, for each one that computes; None for one on each spare core."""
    batch_views: int | None
    """Views in one pass of the backbone; None for what suits the device."""
    compile: bool
    attention: Attention
    shard_mb: float
    precision: Precision = "auto"
    """auto is bf16 on a GPU and float32 on a CPU; fp8 changes the tokens by more than rounding."""
