"""Shared by evaluation, prediction and export: loading a model, and its answers as plain values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from pipeline.data.batch import collate
from pipeline.model.evidence import stitch_map
from pipeline.model.output import RoadworkOutput
from pipeline.model.roadwork import RoadworkModel
from pipeline.names import VIEW_NAMES

ABSENT = -1  # in the place of a view's number
MAP_SIDE = 96  # points per side of a heat map, more than the cells of all views resolve
# What export sets, what is compared by itself, and what transformers notes about the folder that a model was read from.
NOT_OF_THE_ANSWER = {
    "decision_bias", "decision_slope", "architectures", "dtype", "id2label", "label2id", "transformers_version",
    "_name_or_path", "backbone_sha256",
}  # fmt: skip


def load_model(folder: Path, device: torch.device, backbone: str | None = None) -> RoadworkModel:
    """A trained or exported model in evaluation mode; see `RoadworkModel.from_pretrained`."""
    return RoadworkModel.from_pretrained(folder, device=device, backbone=backbone)


def is_calibrated(model: RoadworkModel) -> bool:
    """Whether `export` has set the slope of the model's probabilities."""
    return bool(model.config.decision_slope != 1.0)


def fingerprint(model: RoadworkModel) -> str:
    """SHA-256 of all that decides a model's log-odds: the head's weights and its configuration, but no calibration."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in NOT_OF_THE_ANSWER}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def kept_views(output: RoadworkOutput) -> list[list[str]]:
    """The names of the views that each photo's answer rests on."""
    assert output.view_indices is not None
    assert output.view_mask is not None
    numbers = output.view_indices.masked_fill(~output.view_mask, ABSENT).tolist()
    return [[VIEW_NAMES[view] for view in views if view != ABSENT] for views in numbers]


@torch.inference_mode()
def evidence_map(model: RoadworkModel, sample: dict[str, torch.Tensor]) -> np.ndarray | None:
    """The probability that each place of a photo shows roadwork, as the cells of the kept views judge it.

    Args:
        model: The model; it answers with metadata NULL.
        sample: One sample of a dataset, its views or its tokens.

    Returns:
        float32 [96, 96] over the whole photo; None for a model without cell evidence.
    """
    batch = collate([sample])
    output = model(batch, null_metadata=True)
    if output.evidence_map is None:
        return None
    found: np.ndarray = stitch_map(output, MAP_SIDE)[0].float().cpu().numpy()
    return found
