"""The loss for labels drawn from the model's own predictions, for the Gauss-Newton-Bartlett estimate."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.model.config import TERMS, LossConfig
from pipeline.model.evidence import as_logits
from pipeline.model.losses import Targets
from pipeline.model.moe import at_least_float32
from pipeline.model.output import RoadworkOutput

CLASSES = ("roadwork", "weather", "evidence")  # terms that predict one class of several


def sampled_loss(
    output: RoadworkOutput, targets: Targets, counts: torch.Tensor, config: LossConfig, draws: torch.Tensor
) -> torch.Tensor:
    """A loss whose squared gradient, summed over the batch first, estimates the diagonal of the Gauss-Newton matrix.

    It covers the heads with targets: roadwork, weather and the cell evidence's roadwork (cross entropy of a class), and
    segmentation and the evidence's cells (binary cross entropy of each cell). Labels are drawn from the predictions, so
    that gradients of different samples, heads and cells have mean zero and are independent: the mean of the square of
    their sum is the sum of the mean squares, which by Bartlett's identity is the diagonal (arXiv 2305.14342, section
    2.3 and algorithm 2). A term with weight w that is averaged over n samples enters with sqrt(w / n), since its square
    must enter with w / n. With one head and w = 1 this is the paper's B times the square of the mean gradient.

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
    if output.members:
        # The loss is the mean over K heads, so each one's Gauss-Newton matrix enters with 1 / K.
        of_heads = zip(output.members, draws.chunk(len(output.members), dim=1), strict=True)
        losses = [sampled_loss(member, targets, counts, config, own) for member, own in of_heads]
        return torch.stack(losses).sum() / sqrt(len(losses))
    parts, used = [], 0
    for term, logits in _predictions(output).items():
        own = draws[:, used : used + _draws_of(term, logits)].to(logits.device)
        used += own.shape[1]
        values = _class_loss(logits, own[:, 0]) if term in CLASSES else _cells_loss(logits, own)
        count = counts[TERMS.index(term)].clamp(min=1)
        parts.append(sqrt(getattr(config, term)) * (values * targets.known(term)).sum() / count.sqrt())
    return torch.stack(parts).sum()


def _predictions(output: RoadworkOutput) -> dict[str, torch.Tensor]:
    """The logits of one head by loss term: [B, C] for the terms in `CLASSES`, [B, ...] of single events for others.

    Events of views that do not exist are certain not to happen, so they have no gradient.
    """
    evidence = cells = None
    if output.evidence_logits is not None:
        evidence = as_logits(output.evidence_logits)
    if output.evidence_map is not None:
        assert output.view_mask is not None
        cells = output.evidence_map.masked_fill(~output.view_mask[..., None], -torch.inf)
    found = {
        "roadwork": output.trunk_logits, "weather": output.weather_logits, "evidence": evidence,
        "segmentation": output.mask_logits, "evidence_masks": cells,
    }  # fmt: skip
    return {term: logits for term, logits in found.items() if logits is not None}


def _draws_of(term: str, logits: torch.Tensor) -> int:
    return 1 if term in CLASSES else logits[0].numel()


def _class_loss(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Cross entropy of a class that is drawn from the softmax itself: [B, C] and [B] to [B]."""
    logits = at_least_float32(logits)
    below = logits.detach().softmax(dim=-1).cumsum(dim=-1)[:, :-1]  # the last class takes the rest
    return F.cross_entropy(logits, (draws[:, None] >= below).sum(dim=-1), reduction="none")


def _cells_loss(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of events drawn from the predictions: [B, ...] and [B, N] to [B].

    The root of their number divides it, since it stands for a mean. Logits of -inf are no events.
    """
    logits = at_least_float32(logits).flatten(1)
    possible = logits > -torch.inf
    drawn = (draws < logits.detach().sigmoid()).to(logits.dtype)
    finite = logits.masked_fill(~possible, 0.0)
    entropy = F.binary_cross_entropy_with_logits(finite, drawn, reduction="none") * possible
    return entropy.sum(dim=1) / possible.sum(dim=1).sqrt()


def draws_needed(output: RoadworkOutput) -> int:
    """How many random numbers a sample needs: one for each class that is predicted, one for each cell."""
    if output.members:
        return sum(draws_needed(member) for member in output.members)
    return sum(_draws_of(term, logits) for term, logits in _predictions(output).items())


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
