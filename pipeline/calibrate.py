"""Let a trained model look at no more views than it needs: `python -m pipeline.calibrate --run RUN`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from pipeline.calibration import Photos, RoundAnswers, answer_from, answer_rounds, best_order, fit_rule
from pipeline.cli import command
from pipeline.config import read_config
from pipeline.data.dataset import collate, photo_inputs
from pipeline.data.feature_dataset import open_split
from pipeline.data.index import read_index
from pipeline.data.memory import keep_freed_memory
from pipeline.errors import UserError, require
from pipeline.evaluate import find_cache
from pipeline.files import write_summary, write_text
from pipeline.inference import load_model, pick_device
from pipeline.metrics import best_threshold, has_both
from pipeline.model.encoder import CachedTokens, Tokens
from pipeline.model.roadwork import RoadworkModel
from pipeline.progress import say, track

MOST_FOR_ORDER = 512  # photos whose tokens are held at once to find the order of `fixed`

Loader = DataLoader[dict[str, torch.Tensor]]


def calibrate(
    run: Path,
    *,
    pruning: Literal["dynamic", "fixed"] = "dynamic",
    max_loss: float = 0.002,
    shards: str | None = None,
    features: str | None = None,
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
) -> Path:
    """Measure on the validation split how many views a model needs, and write the rule into its configuration.

    From then on the model in RUN/model prunes this way, wherever it is used. Evaluate it again afterwards: the cut of
    an earlier evaluation was chosen without the rule.

    Args:
        run: Run folder of a model with the head `roadwork`. One trained with `model.pruning` `dynamic` has learnt to
            answer from few views; another can be calibrated too, and stops later.
        pruning: `dynamic` stops each photo when its answer is certain; `fixed`, a control, takes the views that are
            best for all photos together.
        max_loss: Most that the validation MCC with `dynamic` may lie below the one with `keep_views` views of every
            photo; 0.002 is 0.2 points. Found on a finite split, it holds on other photos on average only.
        shards: Folder of shards, or its URL; by default the one that the run was trained on.
        features: Feature cache, see `evaluate`.
        batch_size: Photos in one forward pass.
        workers: Processes that read, decode and cut views; 0 does it in this one.
        device: cpu, cuda, cuda:1, or auto for a GPU where there is one.

    Returns:
        The path of summary.json in the run folder, which has what was found under `calibration`.
    """
    require(0 < max_loss < 1, "--max_loss", max_loss, "in (0, 1)")
    require(batch_size >= 1, "--batch_size", batch_size, "1 or more")
    require(workers >= 0, "--workers", workers, "0 or more")
    if not run.is_dir():
        raise UserError(f"no run at {run}; name the folder that training wrote")
    model = load_model(run / "model", pick_device(device))
    if model.encoder.pruner is None:
        raise UserError(f"the head {model.config.head!r} of {run} prunes no views, so there is nothing to calibrate")
    loader = open_validation(run, model, shards, features, batch_size, workers)
    found = calibrate_dynamic(model, loader, max_loss) if pruning == "dynamic" else calibrate_fixed(model, loader)
    model.config.pruning = pruning
    write_text(run / "model" / "config.json", model.config.to_json_string())
    path = run / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    summary["calibration"] = {"pruning": pruning, **found}
    return write_summary(run, summary)


def open_validation(
    run: Path, model: RoadworkModel, shards: str | None, features: str | None, batch_size: int, workers: int
) -> Loader:
    """The labelled photos of the validation split; see `calibrate` for the arguments.

    Raises:
        UserError: They are not of both classes.
    """
    config = read_config(run / "config.yaml")
    folder = shards or config.data.shards
    index = read_index(folder)
    labels = index.split("val").labels
    if not has_both(labels):
        raise UserError(f"the validation split of {folder} has not both classes among its labels; shard one that has")
    cache = find_cache(features, config.data, index, model)
    dataset = open_split(folder, index, "val", model.config.sizes, config.data.decode_scale, cache)
    labelled = Subset(dataset, np.flatnonzero(labels >= 0).tolist())
    return DataLoader(labelled, batch_size, num_workers=workers, collate_fn=collate, worker_init_fn=keep_freed_memory)


@torch.inference_mode()
def calibrate_dynamic(model: RoadworkModel, loader: Loader, max_loss: float) -> dict[str, Any]:
    """Set the model's stopping rule; returns it with what it does on the validation split."""
    parts = [(labels, *answer_rounds(model, photos)) for photos, labels in opened(model, loader, "answering")]
    answers = RoundAnswers(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    cut = best_threshold(answers.labels, answers.log_odds[:, -1])
    rule = fit_rule(answers, cut, max_loss)
    model.config.stopping = asdict(rule)
    log_odds, views = answers.stopped(rule)
    before, after = (answers.mcc(values, cut) for values in (answers.log_odds[:, -1], log_odds))
    say(
        f"{views.mean():.2f} of {model.config.num_views} views on average, and MCC {after:.3f} against {before:.3f} "
        f"with {model.config.keep_views} views of every photo (validation, n={len(views)})"
    )
    return {
        "max_loss": max_loss, "stopping": asdict(rule), "n": len(views), "views": float(views.mean()),
        "mcc": after, "mcc_without": before,
    }  # fmt: skip


@torch.inference_mode()
def calibrate_fixed(model: RoadworkModel, loader: Loader) -> dict[str, Any]:
    """Set the order of the mode `fixed`; returns it."""
    held: list[tuple[torch.Tensor, ...]] = []
    known: list[np.ndarray] = []
    for photos, labels in opened(model, loader, "encoding"):
        photos.source.take(photos.view_mask)
        held.append((*photos.source.tokens, photos.boxes, photos.view_mask))
        known.append(labels)
        if sum(map(len, known)) >= MOST_FOR_ORDER:
            break
    *tokens, boxes, view_mask = (torch.cat(part) for part in zip(*held, strict=True))
    photos, labels = Photos(CachedTokens(Tokens(*tokens)), boxes, view_mask), np.concatenate(known)

    def answer(views: Sequence[int]) -> np.ndarray:
        return answer_from(model, photos, torch.tensor(views, device=boxes.device).expand(len(boxes), -1))

    order = best_order(answer, labels, view_mask.shape[1])
    model.config.fixed_views = order
    say(f"the best views for all: 0, {', '.join(map(str, order))} (validation, n={len(labels)})")
    return {"fixed_views": order, "n": len(labels)}


def opened(model: RoadworkModel, loader: Loader, what: str) -> Iterator[tuple[Photos, np.ndarray]]:
    """The batches of a loader on the model's device, with their labels."""
    for batch in track(loader, len(loader), what, unit="batches"):
        inputs = {name: value.to(model.device) for name, value in photo_inputs(batch).items()}
        view_mask = inputs.pop("view_mask")
        yield Photos(model.source(**inputs), inputs["boxes"], view_mask), batch["labels"].numpy()


if __name__ == "__main__":
    raise SystemExit(command(calibrate))
