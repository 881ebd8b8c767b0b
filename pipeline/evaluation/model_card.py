"""The README.md of an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.files import render
from pipeline.model.roadwork import RoadworkModel

CARD = Path(__file__).with_name("model_card.md")
# The licence of a backbone's weights by the start of its name.
LICENCES = {
    "scenes-tiny": "The backbone comes with the code, under the same licence.",
    "facebook/": "The backbone's weights are not in this folder: they are loaded by their name, under\n"
    "Meta's DINOv3 License (https://ai.meta.com/resources/models-and-libraries/dinov3-license/).",
    "": "The backbone's weights are not in this folder: they are loaded from the place named above.",
}


def model_card(name: str, model: RoadworkModel, summary: dict[str, Any], half: bool) -> str:
    """Describe a model and its scores.

    Args:
        name: The run's name.
        model: Its weights and configuration, with its calibration.
        summary: The run's summary, with or without an evaluation.
        half: Whether the weights are stored in 16 bits.
    """
    sizes = model.config.sizes
    prunes = sizes.head == "roadwork" and sizes.pruning != "off"
    kept = str(sizes.keep_views if prunes else sizes.num_views)
    if prunes and sizes.pruning == "dynamic":
        kept = f"as many as the answer needs, at most {kept}"
    return render(
        CARD, name=name, head=sizes.head, parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        backbone=sizes.backbone, kept=kept, views=sizes.num_views, cut=model.config.decision_bias,
        slope=model.config.decision_slope, bits=16 if half else 32,
        data=summary.get("evaluation", {}).get("data"),
        splits={split: summary[split] for split in ("val", "test") if split in summary and "evaluation" in summary},
        licence=next(text for prefix, text in LICENCES.items() if sizes.backbone.startswith(prefix)),
    )  # fmt: skip
