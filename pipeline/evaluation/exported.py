"""Write a model as a folder that anyone can load, and check that the copy answers alike."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from pipeline.data.batch import collate
from pipeline.data.stand_in import StandIn
from pipeline.errors import UserError
from pipeline.evaluation.inference import load_model
from pipeline.model.roadwork import RoadworkModel


def save(model: RoadworkModel, folder: Path, half: bool) -> None:
    """Write weights and configuration; halved weights keep the configuration's float32, in which they load."""
    weights = {name: value.half() if half else value for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)


@torch.inference_mode()
def verify(model: RoadworkModel, folder: Path, half: bool) -> float:
    """Load what was written and compare it with the model on one fixed photo of noise.

    Returns:
        The largest difference of a logit; with weights of full size anything but 0 means a broken export.

    Raises:
        UserError: The model's answer is not a number.
    """
    batch = collate([StandIn(1, model.config.input_spec, model.config.text_dim)[0]])
    expected = model(batch).logits
    found = load_model(folder, model.device, model.backbone.name)(batch).logits
    difference = float((found - expected).abs().max())
    if not math.isfinite(difference):
        raise UserError(
            "the model's answer is not a number: its weights hold NaN or infinity"
            + (", or overflow in 16 bits; export without --half, or train it again" if half else "; train it again")
        )
    assert half or difference == 0, f"the written model differs by {difference} from the one in memory"
    return difference
