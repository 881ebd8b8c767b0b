"""Make a run's best weights a folder that anyone can load: `python -m pipeline.export --run RUN`."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.cli import command
from pipeline.data.dataset import collate, model_inputs
from pipeline.data.stand_in import StandIn
from pipeline.errors import UserError
from pipeline.evaluate import known_threshold
from pipeline.files import sync, write_summary
from pipeline.inference import load_model
from pipeline.model.roadwork import RoadworkModel
from pipeline.model_card import model_card
from pipeline.progress import say


def export(run: Path, *, out: Path | None = None, half: bool = False) -> Path:
    """Write a run's best weights with a model card, and with the best cut folded in so that 0.5 is right.

    Evaluate first: the card then shows the results. What was written is loaded again and must give the same
    logits.

    Args:
        run: Run folder.
        out: Folder to write; by default the run's own `model`, in place; with --half, `model-half` beside it.
        half: Store the head's weights in 16 bits, half the size; they compute in 32 bits once loaded.

    Returns:
        The path of summary.json in the written folder.
    """
    if not run.is_dir():
        raise UserError(f"no run at {run}; name the folder that training wrote")
    path, target = run / "summary.json", out or run / ("model-half" if half else "model")
    if target.exists() and not target.is_dir():
        raise UserError(f"--out is {str(target)!r}, which is a file; name a folder")
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    model = load_model(run / "model", torch.device("cpu"))
    threshold = known_threshold(run, summary)
    model.config.decision_bias = math.log(threshold / (1 - threshold))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        fresh = Path(folder)
        save(model, fresh, half)
        (fresh / "README.md").write_text(model_card(run.resolve().name, model, summary, threshold, half))
        difference = verify(model, fresh, half)
        target.mkdir(exist_ok=True)
        # The weights move before the configuration that describes them; files that others put here stay.
        for file in sorted(fresh.iterdir(), key=lambda file: file.name == "config.json"):
            sync(file)
            os.replace(file, target / file.name)
    say(f"exported to {target}; 0.5 now stands for a threshold of {threshold:.4f}")
    values = {
        "model": str(target.resolve()),
        "backbone": model.config.backbone,
        "threshold": threshold,
        "decision_bias": model.config.decision_bias,
        "weights": "float16" if half else "float32",
        "largest_logit_difference": difference,
        "bytes": sum(file.stat().st_size for file in target.glob("*.safetensors")),
    }
    return write_summary(target, values)


def save(model: RoadworkModel, folder: Path, half: bool) -> None:
    """Write weights and configuration; halved weights keep its float32, in which they load."""
    weights = {name: value.half() if half else value for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)


@torch.inference_mode()
def verify(model: RoadworkModel, folder: Path, half: bool) -> float:
    """Load what was written and compare it with the model on one fixed photo of noise.

    Returns:
        The largest difference of a logit; 0 for weights of full size, or the export is broken.
    """
    config = model.config
    noise = StandIn(1, config.view_side, config.num_views, config.mask_side, config.text_dim)
    inputs = model_inputs(collate([noise[0]]))
    expected = model(**inputs).logits
    found = load_model(folder, model.device)(**inputs).logits
    difference = float((found - expected).abs().max())
    assert half or difference == 0, f"the written model differs by {difference} from the one in memory"
    return difference


if __name__ == "__main__":
    raise SystemExit(command(export))
