"""Export a run's best weights as a folder that anyone can load: `python -m pipeline.export --run RUN`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pipeline.cli import command
from pipeline.errors import UserError


def export(run: Path, *, out: Path | None = None, half: bool = False, backbone: str | None = None) -> Path:
    """Write a run's best weights with a model card, and with the calibration of its probabilities.

    Evaluate first: the card then shows the results. If the model has changed since, by `early-exit` for one, export
    refuses. The written folder is loaded again and must give the same logits.

    Args:
        run: Run folder.
        out: Folder to write; by default the run's own `model`, in place; with --half, `model-half` beside it.
        half: Store the head's weights in 16 bits, at half the size; once loaded they compute in 32 bits.
        backbone: Where the backbone is now, if it has moved: a folder, a hub id or scenes-tiny. It must be the one of
            training.

    Returns:
        The path of summary.json in the written folder.
    """
    import torch

    from pipeline.evaluation.exported import save, verify
    from pipeline.evaluation.model_card import model_card
    from pipeline.evaluation.scoring import known_calibration
    from pipeline.files import sync, write_summary
    from pipeline.progress import say
    from pipeline.training.run_folder import RunFolder

    source, target = RunFolder.open(run), out or run / ("model-half" if half else "model")
    if target.exists() and not target.is_dir():
        raise UserError(f"--out is {str(target)!r}, which is a file; name a folder")
    summary, model = source.results(), source.load_model(torch.device("cpu"), backbone)
    calibration = known_calibration(run, summary, model)
    model.config.decision_bias, model.config.decision_slope = calibration.cut, calibration.slope
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        fresh = Path(folder)
        save(model, fresh, half)
        (fresh / "README.md").write_text(model_card(run.resolve().name, model, summary, half))
        difference = verify(model, fresh, half)
        target.mkdir(exist_ok=True)
        # The weights are moved before the configuration that describes them; other files in the folder stay.
        for file in sorted(fresh.iterdir(), key=lambda file: file.name == "config.json"):
            sync(file)
            os.replace(file, target / file.name)
    say(
        f"exported to {target}; a probability of 0.5 stands for log-odds of {calibration.cut:.4f}, the best cut on "
        "validation"
    )
    values = {
        "model": str(target.resolve()),
        "backbone": model.config.backbone,
        "decision_bias": calibration.cut,
        "decision_slope": calibration.slope,
        "weights": "float16" if half else "float32",
        "largest_logit_difference": difference,
        "bytes": sum(file.stat().st_size for file in target.glob("*.safetensors")),
    }
    return write_summary(target, values)


if __name__ == "__main__":
    raise SystemExit(command(export, "export"))
