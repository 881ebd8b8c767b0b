"""Let a trained model use no more views than it needs: `python -m pipeline.early_exit --run RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.cli import command
from pipeline.errors import UserError, require


def early_exit(
    run: Path,
    *,
    pruning: Literal["dynamic", "fixed"] = "dynamic",
    max_loss: float = 0.002,
    shards: str | None = None,
    features: str | None = None,
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
    backbone: str | None = None,
) -> Path:
    """Measure on the validation split how many views a model needs, and write the rule into its configuration.

    From then on the model in RUN/model prunes by that rule wherever it is used. Evaluate it again afterwards: it is
    another model now, and `export` refuses the calibration of the one before. What this command reports is measured on
    the photos that the rule was fitted to; the evaluation's scores on `test` are not.

    Args:
        run: Run folder of a model with the head `roadwork`. A model trained with `model.pruning` `dynamic` has learnt
            to answer from few views; others work too, but stop later.
        pruning: `dynamic` stops each photo when its answer is certain; `fixed`, a control, takes the views that are
            best for all photos together.
        max_loss: Largest loss of validation MCC with `dynamic` against `keep_views` views of every photo; 0.002 is
            0.2 points. It is fitted to a finite split, so on other photos it holds on average only.
        shards: Folder of shards, or its URL; by default the one that the run was trained on.
        features: Feature cache, see `evaluate`.
        batch_size: Photos in one forward pass.
        workers: Processes that read, decode and cut views; 0 does it in this one.
        device: cpu, cuda, cuda:1, or auto for a GPU where there is one.
        backbone: Where the backbone is now, if it has moved: a folder, a hub id or scenes-tiny. It must be the one of
            training.

    Returns:
        The path of summary.json in the run folder, which has the results under `calibration`.
    """
    require(0 < max_loss < 1, "--max_loss", max_loss, "in (0, 1)")
    require(batch_size >= 1, "--batch_size", batch_size, "1 or more")
    require(workers >= 0, "--workers", workers, "0 or more")
    from pipeline.data.folds import read_dealt
    from pipeline.devices import pick_device
    from pipeline.evaluation.early_exit import fit_dynamic, fit_fixed, open_validation
    from pipeline.files import write_summary
    from pipeline.training.run_folder import RunFolder

    folder = RunFolder.open(run)
    model = folder.load_model(pick_device(device), backbone)
    if model.encoder.pruner is None:
        raise UserError(f"the head {model.config.head!r} of {run} prunes no views; name a run with the head 'roadwork'")
    config = folder.config()
    place = shards or config.data.shards
    index = read_dealt(place, "" if shards else config.data.folds, config.data.fold)
    loader = open_validation(model, index, place, features, config.data.features, batch_size, workers)
    found = fit_dynamic(model, loader, max_loss) if pruning == "dynamic" else fit_fixed(model, loader)
    model.config.pruning = pruning
    model.save_config(folder.model)
    return write_summary(run, {**folder.results(), "calibration": {"pruning": pruning, **found}})


if __name__ == "__main__":
    raise SystemExit(command(early_exit, "early-exit"))
