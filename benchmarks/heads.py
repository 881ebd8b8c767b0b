"""The cost of several heads on one backbone: counted FLOPs with ViT-H/16+, and measured time with `scenes-tiny`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from benchmarks.form import Report, Row, compare, exact, interleave, machine, one_core, publish, timed, versions
from benchmarks.loops import BareLoop
from pipeline.cli import command
from pipeline.config import Config, find_recipe, read_config
from pipeline.data.batch import Batch, collate
from pipeline.data.stand_in import StandIn
from pipeline.model.backbone import vith16plus_config
from pipeline.model.encoder import all_tokens
from pipeline.model.roadwork import RoadworkModel
from pipeline.training.memory import build_head, noise

PACKAGES = ("torch", "transformers")
SEED = 0
HEADS = (3, 5)
PHOTOS = 8
ROUNDS = 8
COUNTED = (
    "operations of matrix products and attention, as PyTorch counts them; recipe pretrain_30ep, 512 px, eight views of "
    "twelve; the pruner is in both"
)
MEASURED = f"recipe demo, {PHOTOS} photos of noise, fp32, one thread, whose time on a core is counted"


def heads(quick: bool = False, out: Path | None = None) -> Path:
    """Count and time a photo's answer, and a training step from the feature cache, with several heads and with one.

    Args:
        quick: Two rounds.
        out: Folder for heads.json; benchmarks/results if not given, or runs/benchmarks with --quick.
    """
    rows = list(count_rows())
    with one_core():
        arms = {f"{what} {count}": arm for count in (1, *HEADS) for what, arm in make_arms(count).items()}
        for arm in arms.values():
            arm()
        found = interleave(arms, 2 if quick else ROUNDS, SEED)
    for what in ("an answer from the photo's views", "a training step from the cache"):
        for count in HEADS:
            times = found[f"{what} {count}"], found[f"{what} 1"]
            rows.append(compare(f"{what}, {count} heads", "one head", *times, "core s", note=MEASURED))
    return publish(Report("heads", machine(), versions(PACKAGES), SEED, tuple(rows)), out, quick)


def count_rows() -> list[Row]:
    """FLOPs of a photo's answer with ViT-H/16+."""
    config, backbone = read_config(find_recipe("pretrain_30ep")), vith16plus_config()
    views = config.model.keep_views * backbone_flops(backbone, config.model.view_side)
    totals = {count: (views + head_flops(config, backbone, count)) / 1e9 for count in (1, *HEADS)}
    return [
        exact(f"FLOPs of a photo, {count} heads", "one head", totals[count], totals[1], "GFLOP", None, COUNTED)
        for count in HEADS
    ]


def backbone_flops(config: DINOv3ViTConfig, side: int) -> int:
    """FLOPs of one view, counted without memory for weights or values."""
    with torch.device("meta"):
        model, view = DINOv3ViTModel(config), torch.empty(1, 3, side, side)
    return flops_of(lambda: model(pixel_values=view))


def head_flops(config: Config, backbone: DINOv3ViTConfig, heads: int) -> int:
    """FLOPs of pruner and heads for one photo, from cached tokens of noise."""
    several = replace(config, train=replace(config.train, heads=heads))
    model, batch = build_head(several, backbone).eval(), noise(config, backbone, photos=1)
    return flops_of(lambda: model(batch))


@torch.no_grad()
def flops_of(work: Callable[[], object]) -> int:
    """FLOPs of a forward pass, a multiplication and an addition counted as two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def make_arms(count: int) -> dict[str, Callable[[], float]]:
    """Functions that time an answer and a step with some number of heads, in core seconds."""
    config = read_config(find_recipe("demo"))
    torch.manual_seed(SEED)
    model = RoadworkModel.build(config.model, config.loss, heads=count)
    stand_in = StandIn(PHOTOS, config.input_spec, config.model.text_dim)
    batch = collate([stand_in[row] for row in range(PHOTOS)])
    loop, stored = BareLoop(model, config.optim, steps=1000), cached(model, batch)

    @torch.inference_mode()
    def answer() -> None:
        model.eval()(batch)

    def step() -> None:
        model.train()
        loop.step(500, [stored])

    return {
        "an answer from the photo's views": lambda: timed(answer).core_s,
        "a training step from the cache": lambda: timed(step).core_s,
    }


def cached(model: RoadworkModel, batch: Batch) -> Batch:
    """The batch with its views' tokens in their place, as a feature cache gives it."""
    tokens = all_tokens(model.backbone, batch["views"], batch["boxes"], batch["view_mask"], model.config.pool_grid)
    return {**{name: value for name, value in batch.items() if name != "views"}, **tokens._asdict()}


if __name__ == "__main__":
    raise SystemExit(command(heads))
