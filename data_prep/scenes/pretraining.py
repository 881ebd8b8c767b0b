"""Pretrain `scenes-tiny`, the small DINOv3 backbone of the project: `python -m data_prep.scenes.pretraining`.

The frozen backbone of the full model has 840 M parameters, whose weights are gated. Machines without them need a
stand-in for the same purpose: patch tokens that tell roadwork from its look-alikes, learned elsewhere. So this trains
the same architecture, some 1,250 times smaller, to name the object under every patch of procedural scenes, whose seed
and cities no data set shares.
"""

from __future__ import annotations

import math
import platform
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from data_prep.scenes import KINDS, PRETRAIN_CITIES, SceneConfig, render
from data_prep.scenes.plan import BASE_SIZE
from pipeline.cli import command
from pipeline.data.views import CANVAS_RATIO, resize
from pipeline.errors import require
from pipeline.files import sha256_of, write_json
from pipeline.model.backbone import IMAGENET_MEAN, IMAGENET_STD, SCENES_TINY
from pipeline.progress import say, track

VIEW_SIDE = 128
CANVAS = round(CANVAS_RATIO * VIEW_SIDE)
CROP = 64
PATCH = 16
GRID = CROP // PATCH
THREADS = 1  # sums in another order give other bits, so the number is fixed
VIDEO_LENGTHS = (1, 2, 3, 4)
SLOTS = (12, 18)  # objects per photo: more than data sets have, since drawing the street costs the most
BACKGROUND = len(KINDS)
NUM_CLASSES = len(KINDS) + 1
MIN_COVER_PX = 32  # of a patch's 256 pixels; a patch that shows less of an object has no target
IGNORE = -100
HELD_OUT_SHARE = 0.05
BATCH = 32
MEASURED = 1024  # crops that the accuracy is measured on


@dataclass(frozen=True)
class Canvases:
    """Photos as the views see them, with a kind for every pixel."""

    pixels: torch.Tensor
    """Pixels, uint8 [N, 3, 320, 320]."""
    kinds: torch.Tensor
    """uint8 [N, 320, 320]: index into `KINDS`, or `BACKGROUND`."""
    centres: torch.Tensor
    """int64 [M, 3]: photo, y and x of the centre of every object."""


class Tagger(nn.Module):
    """The backbone with the two linear classifiers that only pretraining needs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = DINOv3ViTModel(scenes_tiny_config())
        width = self.backbone.config.hidden_size
        self.patch_head = nn.Linear(width, NUM_CLASSES)
        self.cls_head = nn.Linear(width, NUM_CLASSES)

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the kind at the centre [B, C] and under every patch [B, patches, C] of uint8 [B, 3, S, S]."""
        mean, std = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
        tokens = self.backbone(pixel_values=(crops.float() / 255 - mean) / std).last_hidden_state
        prefix = 1 + self.backbone.config.num_register_tokens
        return self.cls_head(tokens[:, 0]), self.patch_head(tokens[:, prefix:])


def scenes_tiny_config() -> DINOv3ViTConfig:
    """DINOv3's ViT with SwiGLU and registers at 0.67 M parameters."""
    return DINOv3ViTConfig(
        image_size=VIEW_SIDE,
        patch_size=PATCH,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        use_gated_mlp=True,
        hidden_act="silu",
        num_register_tokens=4,
        layerscale_value=1.0,
    )


def pretrain(
    out: Path = SCENES_TINY,
    *,
    seed: int = 20_000_003,
    images: int = 4800,
    steps: int = 9000,
    difficulty: float = 0.4,
    lr: float = 2e-3,
    muon_lr: float = 1e-2,
) -> Path:
    """Train `scenes-tiny` from random weights and write it with its provenance.

    Args:
        out: Folder for config.json, model.safetensors and provenance.json.
        seed: Seed of the scenes, the weights and the crops.
        images: Photos to draw; one in twenty is held out.
        steps: Optimizer steps of 32 crops.
        difficulty: Difficulty of the scenes, 0 to 1.
        lr: Peak learning rate of AdamW, for embeddings, norms, biases and heads.
        muon_lr: Peak learning rate of Muon, for the matrices of the layers.

    Returns:
        The path of provenance.json.
    """
    require(images >= 20, "images", images, "20 or more")
    require(steps >= 1, "steps", steps, "1 or more")
    rates = {"lr": lr, "muon_lr": muon_lr}
    for name, rate in rates.items():
        require(rate > 0, name, rate, "above 0")
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    scenes = SceneConfig(BASE_SIZE, difficulty, seed, PRETRAIN_CITIES, VIDEO_LENGTHS, SLOTS)
    canvases, trained = draw_canvases(scenes, images), images - max(1, round(HELD_OUT_SHARE * images))
    model = Tagger()
    fit(model, canvases, trained, steps, rates, np.random.default_rng([seed, 1]))
    accuracy = measure(model, canvases, trained, np.random.default_rng([seed, 2]))
    model.backbone.save_pretrained(out)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    provenance = {
        "command": shlex.join(["python", "-m", "data_prep.scenes.pretraining", *sys.argv[1:]]),
        "arguments": {"seed": seed, "images": images, "steps": steps, "difficulty": difficulty, **rates},
        "cities": list(PRETRAIN_CITIES),
        "slots": list(SLOTS),
        "held_out_accuracy": accuracy,
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "threads": THREADS,
        "versions": {"python": platform.python_version(), **versions},
        "machine": platform.machine(),
        "sha256": sha256_of(out / "model.safetensors"),
    }
    write_json(out / "provenance.json", provenance)
    say(f"held-out accuracy: {accuracy}")
    return (out / "provenance.json").resolve()


def draw_canvases(config: SceneConfig, images: int) -> Canvases:
    """Draw photos on every core and shrink them to the canvas of the views."""
    pixels = torch.empty((images, 3, CANVAS, CANVAS), dtype=torch.uint8)
    kinds = torch.full((images, CANVAS, CANVAS), BACKGROUND, dtype=torch.uint8)
    centres = []
    with ProcessPoolExecutor(mp_context=get_context("forkserver")) as pool:
        drawn = pool.map(partial(draw_canvas, config), range(images), chunksize=8)
        for i, (canvas, boxes) in enumerate(track(drawn, images, "drawing scenes")):
            pixels[i] = torch.from_numpy(canvas)
            for kind, x0, y0, x1, y1 in boxes:
                kinds[i, y0:y1, x0:x1] = kind
                centres.append((i, (y0 + y1) // 2, (x0 + x1) // 2))
    return Canvases(pixels, kinds, torch.tensor(centres))


def draw_canvas(config: SceneConfig, index: int) -> tuple[np.ndarray, list[tuple[int, int, int, int, int]]]:
    """One photo as uint8 [3, 320, 320], and its objects as (kind, x0, y0, x1, y1) in canvas pixels."""
    torch.set_num_threads(1)  # every core already draws
    scene = render(config, index)
    width, height = config.size
    canvas = resize(torch.from_numpy(scene.image.copy()).permute(2, 0, 1), CANVAS, CANVAS)
    boxes = []
    for item in scene.objects:
        x0, y0, x1, y1 = (round(edge * CANVAS / side) for edge, side in zip(item.box, (width, height) * 2, strict=True))
        boxes.append((KINDS.index(item.kind), x0, y0, x1, y1))
    return canvas.numpy(), boxes


def fit(
    model: Tagger, canvases: Canvases, train_images: int, steps: int, rates: dict[str, float], rng: np.random.Generator
) -> None:
    """Train by the cross-entropy of the centre's kind and of every patch's kind.

    The matrices of the layers learn by Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), the rest by AdamW.
    """
    hidden = {name: p for name, p in model.backbone.named_parameters() if p.ndim == 2 and "layer" in name}
    others = [p for name, p in model.named_parameters() if name.removeprefix("backbone.") not in hidden]
    optimizers = (
        torch.optim.Muon(list(hidden.values()), rates["muon_lr"], weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, rates["lr"], betas=(0.9, 0.98), weight_decay=0.05),
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate_at(step, steps)) for o in optimizers]
    entropy = partial(F.cross_entropy, ignore_index=IGNORE)
    model.train()
    for _ in track(range(steps), steps, "pretraining", unit="steps"):
        crops, centre, patches = sample_crops(canvases, 0, train_images, BATCH, rng)
        cls_logits, patch_logits = model(jitter(crops, rng))
        loss = entropy(cls_logits, centre) + entropy(patch_logits.flatten(0, 1), patches.flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()


def rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up over a twentieth, times half a cosine down to 2 %."""
    return min(1.0, (step + 1) / (0.05 * steps)) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def sample_crops(
    canvases: Canvases, first: int, last: int, count: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut random crops, three in four around an object, of the photos first <= i < last.

    Returns:
        Crops uint8 [B, 3, 64, 64], the kind at each centre [B], and the kind under each patch [B, 16].
    """
    inside = canvases.centres[(canvases.centres[:, 0] >= first) & (canvases.centres[:, 0] < last)].numpy()
    picked = inside[rng.integers(len(inside), size=count)]
    shift = rng.integers(-PATCH, PATCH + 1, size=(count, 2))
    corners = np.clip(picked[:, 1:] + shift - CROP // 2, 0, CANVAS - CROP)
    anywhere = rng.random(count) < 0.25
    corners[anywhere] = rng.integers(0, CANVAS - CROP + 1, size=(int(anywhere.sum()), 2))
    flipped = rng.random(count) < 0.5
    crops = torch.empty((count, 3, CROP, CROP), dtype=torch.uint8)
    kinds = torch.empty((count, CROP, CROP), dtype=torch.uint8)
    for i, ((photo, _, _), (y, x), flip) in enumerate(zip(picked, corners, flipped, strict=True)):
        crop = canvases.pixels[photo, :, y : y + CROP, x : x + CROP]
        kind = canvases.kinds[photo, y : y + CROP, x : x + CROP]
        crops[i], kinds[i] = (crop.flip(-1), kind.flip(-1)) if flip else (crop, kind)
    centre = targets(kinds[:, GRID * 4 : -GRID * 4, GRID * 4 : -GRID * 4], 2 * PATCH)[:, 0]
    return crops, centre, targets(kinds, PATCH)


def targets(kinds: torch.Tensor, side: int) -> torch.Tensor:
    """The kind that covers most of every cell: int64 [B, cells].

    Args:
        kinds: uint8 [B, S, S], a kind per pixel.
        side: Side of a cell in pixels.

    Returns:
        The commonest kind where objects cover at least `MIN_COVER_PX` pixels, `BACKGROUND` where there is none, else
        `IGNORE`.
    """
    cells = kinds.unfold(1, side, side).unfold(2, side, side).flatten(3).flatten(1, 2).long()
    counts = F.one_hot(cells, NUM_CLASSES).sum(2)[..., :BACKGROUND]
    most, kind = counts.max(-1)
    kind[most < MIN_COVER_PX] = IGNORE
    kind[counts.sum(-1) == 0] = BACKGROUND
    return kind


def jitter(crops: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Vary contrast and brightness of each crop by up to 15 %."""
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (len(crops), 1, 1, 1))).float()
    lift = torch.from_numpy(rng.uniform(-20, 20, (len(crops), 1, 1, 1))).float()
    return (crops.float() * gain + lift).clamp(0, 255)


@torch.no_grad()
def measure(model: Tagger, canvases: Canvases, first: int, rng: np.random.Generator) -> dict[str, float]:
    """Accuracy on crops of the photos from `first` on, whose videos the training photos may share in part."""
    model.eval()
    crops, centre, patches = sample_crops(canvases, first, len(canvases.pixels), MEASURED, rng)
    cls_logits, patch_logits = model(crops)
    known = patches != IGNORE
    objects = known & (patches != BACKGROUND)
    right = patch_logits.argmax(-1) == patches
    is_roadwork = torch.tensor([kind.is_roadwork for kind in KINDS] + [False])
    same_side = is_roadwork[patch_logits.argmax(-1)] == is_roadwork[patches.clamp(min=0)]
    seen = centre != IGNORE
    return {
        "centre": round((cls_logits.argmax(-1) == centre)[seen].float().mean().item(), 4),
        "patch": round(right[known].float().mean().item(), 4),
        "object_patch": round(right[objects].float().mean().item(), 4),
        "object_patch_roadwork_or_not": round(same_side[objects].float().mean().item(), 4),
    }


if __name__ == "__main__":
    sys.exit(command(pretrain))
