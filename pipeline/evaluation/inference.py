"""Shared by evaluation, prediction and export: loading a model, and its answers as plain values."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.model.output import RoadworkOutput
from pipeline.model.roadwork import RoadworkModel
from pipeline.names import VIEW_NAMES


def load_model(folder: Path, device: torch.device) -> RoadworkModel:
    """A trained or exported model in evaluation mode.

    Raises:
        UserError: The folder holds no model.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"no model in {folder}; training leaves one in RUN/model, `export` writes one anywhere")
    return RoadworkModel.from_pretrained(folder).to(device).eval()


def probability_of(model: RoadworkModel, output: RoadworkOutput, decision_bias: float | None = None) -> list[float]:
    """The probability of roadwork per photo; see `RoadworkModel.probability` for the bias."""
    assert output.logits is not None
    probabilities: list[float] = model.probability(output.logits, decision_bias).tolist()
    return probabilities


def kept_views(output: RoadworkOutput) -> list[list[str]]:
    """The names of the views that each photo's answer rests on."""
    assert output.view_indices is not None
    assert output.view_mask is not None
    numbers, present = output.view_indices.tolist(), output.view_mask.tolist()
    return [
        [VIEW_NAMES[view] for view, exists in zip(views, mask, strict=True) if exists]
        for views, mask in zip(numbers, present, strict=True)
    ]
