"""One training of the study, from cached tokens to the answers on the tested photos, in one thread."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loops import BareLoop
from benchmarks.study.folds import Fold, make_fold
from benchmarks.study.photos import Photos, load_photos
from benchmarks.study.sampling import training_weights
from benchmarks.study.views import ask_views
from data_prep.work.threads import one_thread
from pipeline.config import DataConfig
from pipeline.data.sampler import SystematicDraw
from pipeline.evaluation.calibration import cross_fit, fit
from pipeline.evaluation.metrics import binary_metrics
from pipeline.files import write_json
from pipeline.model.config import LossConfig, ModelConfig
from pipeline.model.losses import focal_loss
from pipeline.model.roadwork import RoadworkConfig, RoadworkModel
from pipeline.optim.config import OptimConfig
from pipeline.optim.ema import WeightAverage, copy_into
from pipeline.progress import silence_libraries

FORMAT = 2  # raise it when a training gives other answers than before
PHOTOS_PER_ANSWER = 32
PHOTOS_OF_CURVE = 256  # of the validation part, for the loss on the way
DIGITS = 6  # of a probability


@dataclass(frozen=True)
class Training:
    """All settings that decide the outcome of a training."""

    photos: str
    """Fingerprint of the photos."""
    parts: int
    fold: int
    seen_places: bool
    train_share: float
    sampling: str
    temper: float
    epoch_share: float
    model: ModelConfig
    loss: LossConfig
    optimizer: str
    optim: OptimConfig
    steps: int
    batch_size: int
    distil_every: int
    validations: int
    seed: int
    asks_metadata: bool
    """Whether the head is tested with metadata as well."""
    asks_views: bool
    """Whether the head is tested with fewer views as well."""

    @property
    def name(self) -> str:
        """Hash of all settings, which names the training."""
        text = json.dumps([FORMAT, asdict(self)], sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def cost(self) -> float:
        """Rough cost, in views that pass through the layers of a head, by which work is ordered."""
        model = self.model
        if model.head != "roadwork":
            return self.steps * self.batch_size * 0.5
        views = model.num_views if model.pruning == "off" else model.keep_views
        return self.steps * self.batch_size * (2.0 + views)  # a step costs as much as two views of the batch, besides


def run_training(tokens: Path, results: Path, training: Training) -> str:
    """Train, test and write the outcome in one file; returns its name, without folder and ending.

    Args:
        tokens: Folder of the study's arrays, see `load_photos`.
        results: Folder of outcomes.
        training: The training.
    """
    start = time.monotonic()
    silence_libraries()
    with one_thread():
        outcome = train(load_photos(tokens), training, results)
    outcome["wall_s"] = round(time.monotonic() - start, 3)
    write_json(results / f"{training.name}.json", outcome)
    return training.name


def train(photos: Photos, training: Training, results: Path) -> dict[str, Any]:
    """Train one head and test it.

    Args:
        photos: All photos.
        training: The training.
        results: Folder of outcomes; if answers from fewer views are asked for, the model is saved in a folder there.

    Returns:
        `diverged`, `parameters`; `curve`, pairs of step and validation loss; `null` and, if asked for, `metadata`, the
        answers without and with it, see `answers_of`; if asked for, `views`, see `ask_views`.
    """
    t = training
    fold, weights = fold_and_weights(photos, t.parts, t.fold, t.seen_places, t.train_share, t.sampling, t.temper)
    torch.manual_seed(training.seed)
    config = RoadworkConfig(**asdict(training.model), backbone_dim=photos.dim)
    model = RoadworkModel(config, training.loss).train()
    loop, average = BareLoop(model, training.optim, training.steps), WeightAverage(model)
    every = [max(1, round(training.steps * (n + 1) / training.validations)) for n in range(training.validations)]
    watched = fold.val[:: -(-len(fold.val) // PHOTOS_OF_CURVE)]
    curve: list[tuple[int, float]] = []
    outcome: dict[str, Any] = {"diverged": False, "parameters": sum(p.numel() for p in model.parameters())}
    for step, rows in enumerate(batch_rows(training, fold.train, weights)):
        batch = photos.batch(rows, training.model.num_views)
        keep_all = training.distil_every > 0 and step % training.distil_every == 0
        if not np.isfinite(loop.step(step, [batch], keep_all)):
            return {**outcome, "diverged": True}
        average.update(step)
        if step + 1 in every:
            curve.append((step + 1, predict(averaged(model, average), photos, watched, null_metadata=True)[1]))
    if not all(weight.isfinite().all() for weight in average.tensors.values()):
        return {**outcome, "diverged": True}
    model = averaged(model, average)
    outcome |= {"curve": curve, "null": answers_of(model, photos, fold, null_metadata=True)}
    if training.asks_metadata:
        outcome["metadata"] = answers_of(model, photos, fold, null_metadata=False)
    if training.asks_views:
        outcome["views"] = ask_views(model, photos, fold, training.seed)
        model.save_pretrained(results / training.name)
    return outcome


def averaged(model: RoadworkModel, average: WeightAverage) -> RoadworkModel:
    """A copy with the averaged weights, set to answer."""
    copy = deepcopy(model).eval()
    copy_into(dict(copy.named_parameters()), average.tensors)
    return copy


@lru_cache(maxsize=16)
def fold_and_weights(
    photos: Photos, parts: int, fold: int, seen: bool, share: float, sampling: str, temper: float
) -> tuple[Fold, np.ndarray]:
    """The photos of a fold, and the weights of its training photos; cached, since many trainings share them."""
    made = make_fold(photos, parts, fold, seen, share)
    rows = made.train
    weights = training_weights(sampling, photos.points[rows], photos.labels[rows], photos.groups[rows], temper, fold)
    return made, weights


def batch_rows(training: Training, rows: np.ndarray, weights: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of each step's photos, int64 [batch_size], in the order in which the trainer would draw them."""
    per_epoch = max(1, round(training.epoch_share * len(rows)))
    draw = SystematicDraw(weights, per_epoch, seed=training.seed, max_repeats=DataConfig().max_repeats)
    queue, epoch = np.empty(0, dtype=np.int64), 0
    for _ in range(training.steps):
        while len(queue) < training.batch_size:
            queue, epoch = np.concatenate([queue, rows[draw.order(epoch)]]), epoch + 1
        yield queue[: training.batch_size]
        queue = queue[training.batch_size :]


def answers_of(model: RoadworkModel, photos: Photos, fold: Fold, null_metadata: bool) -> dict[str, Any]:
    """The scores on validation, and the probabilities of roadwork on the tested photos, calibrated by validation.

    Returns:
        `val_mcc`, cross-fitted; `val_loss`, the focal loss; and `test`, in the order of the fold's rows. A probability
        above 0.5 is above the cut.
    """
    on_val, val_loss = predict(model, photos, fold.val, null_metadata)
    labels, groups = photos.labels[fold.val], photos.groups[fold.val]
    on_test, _ = predict(model, photos, fold.test, null_metadata)
    return {
        "val_mcc": binary_metrics(labels, cross_fit(labels, on_val, groups))["mcc"],
        "val_loss": val_loss,
        "test": fit(labels, on_val).probability(on_test).round(DIGITS).tolist(),
    }


@torch.inference_mode()
def predict(model: RoadworkModel, photos: Photos, rows: np.ndarray, null_metadata: bool) -> tuple[np.ndarray, float]:
    """Log-odds of roadwork of some photos, float64 [M], and the mean of the answer's focal loss."""
    assert model.loss_config is not None
    log_odds, loss = [], 0.0
    for start in range(0, len(rows), PHOTOS_PER_ANSWER):
        batch = photos.batch(rows[start : start + PHOTOS_PER_ANSWER], model.config.input_spec.num_views)
        output = model(batch, null_metadata=null_metadata)
        assert output.logits is not None
        log_odds.append(model.log_odds(output).double().numpy())
        loss += float(focal_loss(output.logits, batch["labels"], model.loss_config).sum())
    return np.concatenate(log_odds), loss / len(rows)
