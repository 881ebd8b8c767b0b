"""The product of a cross-validation: one model with the heads of all folds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.evaluation.calibration import Calibration
from pipeline.evaluation.exported import save
from pipeline.evaluation.inference import fingerprint, load_model
from pipeline.evaluation.model_card import LICENCES
from pipeline.files import render, replace_folder
from pipeline.model.roadwork import RoadworkModel

CARD = Path(__file__).with_name("model_card.md")


def save_ensemble(run: Path, folders: Sequence[Path], calibration: Calibration, about: dict[str, Any]) -> None:
    """Write the ensemble of all folds' heads to `RUN/model`, with a model card, and check that it loads alike.

    Args:
        run: Run folder.
        folders: Model folder of each fold.
        calibration: Cut and slope of its log-odds.
        about: What the card says: the scores, and `folds`, `seeds` and `place`.
    """
    models: list[RoadworkModel] = []
    for folder in folders:
        model = load_model(folder, torch.device("cpu"))
        models.append(model.attach(models[0].backbone) if models else model)  # not one large backbone per fold
    merged = RoadworkModel.merge(models)
    merged.config.decision_bias, merged.config.decision_slope = calibration.cut, calibration.slope

    def write(folder: Path) -> None:
        save(merged, folder, half=False)
        (folder / "README.md").write_text(card(run.resolve().name, merged, about))
        written = load_model(folder, torch.device("cpu"))
        assert fingerprint(written) == fingerprint(merged), "the written model is not the one in memory"

    replace_folder(run / "model", write)


def card(name: str, model: RoadworkModel, about: dict[str, Any]) -> str:
    """The README.md of the ensemble; see `save_ensemble`."""
    sizes = model.config.sizes
    return render(
        CARD, **about, name=name, heads=model.config.ensemble, head=sizes.head, backbone=sizes.backbone,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        cut=model.config.decision_bias, slope=model.config.decision_slope,
        licence=next(text for prefix, text in LICENCES.items() if sizes.backbone.startswith(prefix)),
    )  # fmt: skip
