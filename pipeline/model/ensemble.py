"""Several heads on one backbone and one pruner: trained in one run, answering with the mean of their log-odds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipeline.model.encoder import Encoded
from pipeline.model.output import RoadworkOutput

MEANS = (
    "logits", "fused_logits", "evidence_logits", "evidence_map", "weather_logits", "mask_logits", "view_logits",
    "view_importance",
)  # fmt: skip
SHARED = ("view_scores", "view_indices", "view_boxes", "view_mask", "token_mask")


class Ensemble(nn.Module):
    """K heads of one kind, which see the same kept views (Lakshminarayanan et al. 2017, arXiv 1612.01474).

    They differ by their initial weights and by their draws of dropout.
    """

    def __init__(self, members: Sequence[nn.Module]):
        """Take the heads; their weights are named `members.0`, `members.1`, ..."""
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(
        self, encoded: Encoded, metadata: dict[str, torch.Tensor | None], null_metadata: bool | torch.Tensor
    ) -> RoadworkOutput:
        """The means of the heads' outputs, and the outputs themselves as `members`."""
        return average([member(encoded, metadata, null_metadata) for member in self.members])


def average(outputs: Sequence[RoadworkOutput]) -> RoadworkOutput:
    """The mean of several heads' outputs for the same kept views.

    A mean of logits is a mean of log-odds: with two classes the answer is the geometric mean of the heads' odds.
    """
    first = outputs[0]
    parts: dict[str, Any] = {name: getattr(first, name) for name in SHARED}
    parts |= {
        name: torch.stack([getattr(output, name) for output in outputs]).mean(dim=0)
        for name in MEANS
        if getattr(first, name) is not None
    }
    router_logits = tuple(logits for output in outputs for logits in output.router_logits or ())
    return RoadworkOutput(**parts, router_logits=router_logits or None, members=tuple(outputs))
