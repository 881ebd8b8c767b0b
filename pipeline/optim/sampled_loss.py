"""The loss for labels drawn from the model's own predictions, for the Gauss-Newton-Bartlett estimate."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.model.config import TERMS, LossConfig
from pipeline.model.losses import Targets
from pipeline.model.moe import at_least_float32
from pipeline.model.output import RoadworkOutput


def sampled_loss(
    output: RoadworkOutput, targets: Targets, counts: torch.Tensor, config: LossConfig, draws: torch.Tensor
) -> torch.Tensor:
    """A loss whose squared gradient, summed over the batch first, estimates the diagonal of the Gauss-Newton matrix.

    It covers the three heads with targets: roadwork and weather (cross entropy of a class) and segmentation (binary
    cross entropy of each cell and class). Labels are drawn from the predictions, so that gradients of different
    samples, heads and cells have mean zero and are independent: the mean of the square of their sum is the sum of the
    mean squares, which by Bartlett's identity is the diagonal (arXiv 2305.14342, section 2.3 and algorithm 2). A term
    with weight w that is averaged over n samples enters with sqrt(w / n), since its square must enter with w / n. With
    one head and w = 1 this is the paper's B times the square of the mean gradient.

    Cross entropy replaces the focal loss, and Dice is left out, since neither is the logarithm of a probability. Terms
    without targets (disagreement, routers, distillation) are left out too.

    Args:
        output: The model's output.
        targets: The batch's targets, for which samples have one in each head.
        counts: Counts of targets, as in `losses.combine`.
        config: The weights.
        draws: [B, N] in [0, 1), from `uniform`, with N from `draws_needed`.

    Returns:
        A scalar; where gradients are averaged over ranks and micro-batches, the caller multiplies as for `combine`.
    """
    assert output.logits is not None
    draws = draws.to(output.logits.device)
    losses = {"roadwork": _class_loss(output.logits, draws[:, 0]) * targets.has_label}
    if output.weather_logits is not None:
        losses["weather"] = _class_loss(output.weather_logits, draws[:, 1]) * targets.has_weather
    if output.mask_logits is not None:
        logits = at_least_float32(output.mask_logits).flatten(1)
        drawn = (draws[:, 2:] < logits.detach().sigmoid()).to(logits.dtype)
        entropy = F.binary_cross_entropy_with_logits(logits, drawn, reduction="none").sum(dim=1)
        losses["segmentation"] = entropy / sqrt(logits.shape[1]) * targets.has_mask
    counts = counts.clamp(min=1)
    parts = [
        sqrt(getattr(config, term)) * values.sum() / counts[TERMS.index(term)].sqrt() for term, values in losses.items()
    ]
    return torch.stack(parts).sum()


def _class_loss(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Cross entropy of a class that is drawn from the softmax itself: [B, C] and [B] to [B]."""
    logits = at_least_float32(logits)
    below = logits.detach().softmax(dim=-1).cumsum(dim=-1)[:, :-1]  # the last class takes the rest
    return F.cross_entropy(logits, (draws[:, None] >= below).sum(dim=-1), reduction="none")


def draws_needed(output: RoadworkOutput) -> int:
    """How many random numbers a sample needs: one for roadwork, one for weather, one for each cell of each class."""
    return 2 + (0 if output.mask_logits is None else output.mask_logits[0].numel())


def uniform(rows: Sequence[int], count: int, seed: int, step: int) -> torch.Tensor:
    """Random numbers that follow from the seed, the step and the sample: float32 [B, count] in [0, 1).

    Args:
        rows: Rows of the samples in the split.
        count: Random numbers per sample.
        seed: The run's seed.
        step: Optimizer step.
    """
    generators = (np.random.default_rng(np.random.SeedSequence((seed, step, row))) for row in rows)
    return torch.from_numpy(np.stack([generator.random(count, dtype=np.float32) for generator in generators]))
