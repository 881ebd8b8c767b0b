"""Heads that are trained and asked on procedural scenes, for `benchmarks.pruning`: from a plan to answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data_prep.scenes import Scene, SceneConfig, render
from pipeline.data.batch import collate
from pipeline.data.dataset import prepare_image
from pipeline.evaluation.early_exit import Photos, RoundAnswers, answer_from, answer_rounds, best_order, fit_rule
from pipeline.evaluation.metrics import best_threshold
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.config import LossConfig, ModelConfig
from pipeline.model.encoder import CachedTokens, Tokens, all_tokens
from pipeline.model.pruning import rank_views
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.build import build_optimizer
from pipeline.optim.config import OptimConfig
from pipeline.optim.ema import WeightAverage, copy_into
from pipeline.optim.schedule import lr_at
from pipeline.progress import track
from pipeline.vocabulary import MASK_CLASSES

KEPT = (1, 2, 3, 4, 6, 8, 12)
MAX_LOSSES = (0.0005, 0.002, 0.005, 0.01, 0.02, 0.05)
STATED_LOSS = 0.002
POLICIES = ("scored", "random", "fixed", "oracle")

# Narrow enough for a study of minutes. A coarse grid of cells, since tokens cost more than their number is worth here.
MODEL = ModelConfig(
    backbone="scenes-tiny", view_side=128, pruning="dynamic", keep_views=12, pool_grid=2, width=64, layers=2, heads=4,
    fusion_heads=4, expert_width=128, mask_side=16, metadata=(),
)  # fmt: skip
ALL_VIEWS = replace(MODEL, pruning="off")
# As in the recipe `demo`: a small set learns roadwork too late beside the other terms at their full weights.
LOSS = LossConfig(roadwork=2.0, consistency=0.0, weather=0.0, segmentation=0.5, label_smoothing=0.05)
OPTIM = OptimConfig(lr=3e-3)
BATCH = 32
DISTIL_EVERY = 4
PHOTOS_PER_PART = 50
PHOTOS_PER_ANSWER = 100
PHOTOS_FOR_ORDER = 200
DIFFICULTY = 0.2

Data = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """How much is drawn, trained and asked."""

    photos: dict[str, int]
    """Of train, val and test. Each shows a street of its own."""
    steps: int
    """Optimizer steps of 32 photos for each head."""
    seeds: int
    """Heads: weights, order of photos and exploration differ."""
    timed: int
    """Photos of the batch that is timed."""
    rounds: int
    """Of timing."""


@dataclass(frozen=True)
class SeedAnswers:
    """What one head says about the N photos of the test split, as log-odds above its cut."""

    policies: dict[str, np.ndarray]
    """For each of `POLICIES`, [N, len(KEPT)]."""
    dynamic: dict[float, tuple[np.ndarray, np.ndarray]]
    """For each of `MAX_LOSSES`, the answers [N] and the views that they took [N]."""
    twelve: np.ndarray
    """[N], a second head's that was trained and asked with all views."""


def scenes_of(split: str, seed: int) -> SceneConfig:
    """Scenes of a split: other seeds for each, so that they share cities and nothing else."""
    number = 10 * seed + ("train", "val", "test").index(split) + 1
    return SceneConfig(difficulty=DIFFICULTY, seed=number, video_lengths=(1,))


def photos_of(scenes: Sequence[Scene]) -> Data:
    """Model inputs of some scenes: views [B, V, 3, S, S], boxes and view_mask."""
    return collate([prepare_image(scene.image.copy(), MODEL.view_side, MODEL.num_views) for scene in scenes])


def mask_targets_of(scene: Scene) -> torch.Tensor:
    """Share of each cell that each class covers: [6, side, side]."""
    classes = torch.arange(1, len(MASK_CLASSES) + 1)[:, None, None]
    return F.adaptive_avg_pool2d((torch.from_numpy(scene.mask.copy()) == classes).float(), MODEL.mask_side)


def draw(folder: Path, seed: int, part: tuple[str, int, int]) -> None:
    """Draw some photos of a split, and write what the head needs of them: tokens in bf16 as the feature cache has them.

    Args:
        folder: For a file named after the part.
        seed: Of the study.
        part: Split, first photo and the one after the last.
    """
    torch.set_num_threads(1)
    split, start, stop = part
    scenes = [render(scenes_of(split, seed), number) for number in range(start, stop)]
    inputs = photos_of(scenes)
    tokens = all_tokens(FrozenBackbone(MODEL.backbone), **inputs, pool_grid=MODEL.pool_grid)
    values = {
        **{name: value.bfloat16() for name, value in tokens._asdict().items()},
        "boxes": inputs["boxes"],
        "view_mask": inputs["view_mask"],
        "labels": torch.tensor([scene.label for scene in scenes]),
        "mask_targets": torch.stack([mask_targets_of(scene) for scene in scenes]),
    }
    save_file({name: value.contiguous() for name, value in values.items()}, folder / f"{split}-{start:05d}.safetensors")


def load_split(folder: Path, split: str) -> Data:
    """All photos of a split, in their order."""
    parts = [load_file(path) for path in sorted(folder.glob(f"{split}-*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def run_study(folder: Path, plan: Plan, seed: int) -> tuple[np.ndarray, list[SeedAnswers]]:
    """Draw, train and ask, a process to each core.

    Args:
        folder: Empty; gets the photos' tokens and the model of the first seed, in `model`.
        plan: How much.
        seed: Of the scenes; the heads' seeds follow from it.

    Returns:
        Labels of the test split [N], and each head's answers.
    """
    parts = [
        (split, start, min(start + PHOTOS_PER_PART, count))
        for split, count in plan.photos.items()
        for start in range(0, count, PHOTOS_PER_PART)
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("forkserver")) as pool:
        for _ in track(pool.map(partial(draw, folder, seed), parts), len(parts), "drawing", unit="parts"):
            pass
        heads = range(plan.seeds)
        asked = pool.map(partial(study_head, folder, plan.steps), heads)
        answers = list(track(asked, plan.seeds, "training and asking", unit="heads"))
    return load_split(folder, "test")["labels"].numpy(), answers


def study_head(folder: Path, steps: int, seed: int) -> SeedAnswers:
    """Train a head for all modes and one for all views, and ask both about the test split."""
    torch.set_num_threads(1)
    train, val, test = (load_split(folder, split) for split in ("train", "val", "test"))
    model, control = train_head(MODEL, train, steps, seed), train_head(ALL_VIEWS, train, steps, seed)
    with torch.inference_mode():
        cuts = [best_threshold(val["labels"].numpy(), ask_twelve(head, val)) for head in (model, control)]
        answers = SeedAnswers(
            policies=ask_policies(model, val, test, cuts[0], seed),
            dynamic=ask_dynamic(model, val, test, cuts[0]),
            twelve=ask_twelve(control, test) - cuts[1],
        )
    if seed == 0:
        model.save_pretrained(folder / "model")
    return answers


def train_head(config: ModelConfig, train: Data, steps: int, seed: int) -> RoadworkModel:
    """A head with its averaged weights, trained from tokens as the trainer does it, but for the engine."""
    torch.manual_seed(seed)
    model = RoadworkModel.build(config)
    model.loss_config = LOSS
    model.train()
    optimizer, average = build_optimizer(model, OPTIM), WeightAverage(model)
    rng = np.random.default_rng(seed)
    count = len(train["labels"])
    order = np.concatenate([rng.permutation(count) for _ in range(-(-steps * BATCH // count))])
    for step in range(steps):
        rows = torch.from_numpy(order[step * BATCH : (step + 1) * BATCH])
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, OPTIM)
        batch = {name: value[rows] for name, value in train.items()}
        loss = model(**batch, keep_all=step % DISTIL_EVERY == 0).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        average.update(step)
    copy_into(dict(model.named_parameters()), average.tensors)
    return model.eval()


def batches(data: Data, limit: int | None = None) -> Iterator[Photos]:
    """A split's photos, a hundred at a time, as far as the limit goes."""
    count = len(data["labels"]) if limit is None else min(limit, len(data["labels"]))
    for start in range(0, count, PHOTOS_PER_ANSWER):
        part = {name: value[start : min(start + PHOTOS_PER_ANSWER, count)] for name, value in data.items()}
        tokens = Tokens(part["cls"], part["cells"], part["regions"])
        yield Photos(CachedTokens(tokens), part["boxes"], part["view_mask"])


def ask_twelve(model: RoadworkModel, data: Data) -> np.ndarray:
    """Log-odds [N] from all views."""
    every = torch.arange(MODEL.num_views)
    return np.concatenate([answer_from(model, p, every.expand(len(p.boxes), -1)) for p in batches(data)])


def ask_policies(model: RoadworkModel, val: Data, test: Data, cut: float, seed: int) -> dict[str, np.ndarray]:
    """`SeedAnswers.policies`; the fixed views are chosen on the first photos of the validation split."""
    chosen = list(batches(val, PHOTOS_FOR_ORDER))

    def answer(views: Sequence[int]) -> np.ndarray:
        return np.concatenate([answer_from(model, p, torch.tensor(views).expand(len(p.boxes), -1)) for p in chosen])

    fixed = best_order(answer, val["labels"][:PHOTOS_FOR_ORDER].numpy(), MODEL.num_views)
    torch.manual_seed(seed)
    found: dict[str, list[np.ndarray]] = {policy: [] for policy in POLICIES}
    for photos in batches(test):
        scores = model.encoder.score(photos.source)
        assert scores is not None
        everything = model.encoder(photos.source, photos.boxes, photos.view_mask, keep_all=True)
        importance = model.answer(everything, null_metadata=True).view_importance
        assert importance is not None
        for policy in POLICIES:
            by = importance if policy == "oracle" else scores
            order = rank_views(by, photos.view_mask, policy, explore=False, fixed_views=fixed)
            found[policy].append(np.stack([answer_from(model, photos, order[:, :k]) for k in KEPT], axis=1) - cut)
    return {policy: np.concatenate(parts) for policy, parts in found.items()}


def ask_dynamic(model: RoadworkModel, val: Data, test: Data, cut: float) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """`SeedAnswers.dynamic`; the model is left with the rule of `STATED_LOSS`."""
    on_val, on_test = (
        RoundAnswers(
            data["labels"].numpy(),
            *(np.concatenate(part) for part in zip(*(answer_rounds(model, p) for p in batches(data)), strict=True)),
        )
        for data in (val, test)
    )
    rules = {max_loss: fit_rule(on_val, cut, max_loss) for max_loss in MAX_LOSSES}
    model.config.stopping = asdict(rules[STATED_LOSS])
    stopped = {max_loss: on_test.stopped(rule) for max_loss, rule in rules.items()}
    return {max_loss: (log_odds - cut, views) for max_loss, (log_odds, views) in stopped.items()}
