"""Cells of the parity matrix: short runs of DeepSpeed's engine in one of its forms, many in one start of processes.

The bare loop and the estimate of the Hessian here are the reference, and on purpose share nothing with
`benchmarks.loops`.

Every cell takes the trainer's own steps on the same few photos (as cached tokens, some without label, weather or mask,
some with views that do not exist), so that all its numbers can be compared with those of a bare loop in PyTorch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import loops
from benchmarks.processes import run_apart
from pipeline.config import ROOT, Config, OptimConfig, TrainConfig
from pipeline.data.batch import Batch, collate
from pipeline.data.dataset import mask_targets, metadata_tensors
from pipeline.data.record import Metadata
from pipeline.data.views import view_boxes
from pipeline.distributed.engine_tensors import gather_tensors, set_tensors
from pipeline.model.config import TERMS, ModelConfig
from pipeline.model.losses import Targets, count_targets
from pipeline.model.moe import SparseExperts
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.build import build_optimizer
from pipeline.optim.ema import WeightAverage, copy_into
from pipeline.optim.hessian import hutchinson, rademacher
from pipeline.optim.sampled_loss import draws_needed, sampled_loss, uniform
from pipeline.optim.schedule import lr_at
from pipeline.optim.sophia import Sophia
from pipeline.trainer import Trainer
from pipeline.training.plan import Schedule

STEPS = 5
BATCH = 8  # photos per optimizer step, whatever the processes
GRAD_CLIP = 0.3  # below the norms of all steps, so that a wrong norm shows
EXPERTS = 4
SMALL = 0.05  # of a loss term, below which differences are taken as absolute
HESSIAN_EVERY = 2
NOTHING = 1e-12  # of a diagonal that is zero: nothing depends on the parameter
SEED = 0


@dataclass(frozen=True)
class Cell:
    """One form of the engine."""

    stage: int
    """ZeRO stage."""
    sharding: int
    """Processes that share a layer's experts; 1 when all have them whole."""
    processes: int
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    clip: bool = True
    """Whether gradients are clipped."""
    idle: bool = False
    """Whether the routers send every token to one of the first two experts, so that the others get none."""
    resume: str = ""
    """Folder of tensors to resume from."""
    save: str = ""
    """Folder that tensors are saved to half-way."""
    again: bool = False
    """Whether the run goes back at its end to what it saved, and takes the second half once more."""
    export: str = ""
    """Folder that the averaged model is saved to at the end."""
    offload: bool = False
    """Whether the optimizer is on the CPU, as in `ds_configs/zero2_offload.json`."""
    optimizer: str = "adamw"
    """`optim.name`."""
    precision: str = "fp32"
    """Precision of the weights in the forward and backward pass."""
    heads: int = 1
    """`train.heads`."""

    def __str__(self) -> str:
        experts = f"experts over {self.sharding}" if self.sharding > 1 else "whole experts"
        optimizer = "" if self.optimizer == "adamw" else f"{self.optimizer}, "
        optimizer += "" if self.heads == 1 else f"{self.heads} heads, "
        return f"{optimizer}ZeRO-{self.stage}, {experts}, {self.processes} processes, accumulation {self.accumulation}"


@dataclass(frozen=True)
class Curve:
    """What a cell's steps gave."""

    losses: np.ndarray
    """[steps, 1 + terms]: the loss and each of its terms, over all ranks."""
    norms: np.ndarray
    """[steps]: norm of the global gradient before clipping; NaN where it is unknown (shared experts under ZeRO-0)."""
    hessian: dict[str, np.ndarray] = field(default_factory=dict)
    """With Sophia, the mean of the Hessian's diagonal after the first estimate, by parameter."""

    def difference(self, other: Curve) -> float:
        """Largest difference of any loss, term or norm of any step, relative to the other value or to 0.05.

        Small values are compared with 0.05, since some, such as the disagreement of views that nearly agree, are small
        differences of numbers around 1 in 32 bits.
        """
        ours, theirs = (np.column_stack([curve.losses, curve.norms]) for curve in (self, other))
        return float(np.nanmax(np.abs(ours - theirs) / np.maximum(np.abs(theirs), SMALL)))

    def hessian_difference(self, other: Curve, single: bool) -> float:
        """Largest difference in the Hessian's diagonal of any parameter, relative to that parameter's largest value.

        Args:
            other: The curve to compare with.
            single: Look at the parameters that are one number, or else at all others. The curvature of such a parameter
                is a sum over photos and views whose parts nearly cancel, and there is no larger value to compare with.
        """
        assert self.hessian.keys() == other.hessian.keys()
        found = [
            np.abs(self.hessian[name] - value).max() / max(np.abs(value).max(), NOTHING)
            for name, value in other.hessian.items()
            if (value.size == 1) == single
        ]
        return float(max(found, default=0.0))


def config(cell: Cell) -> Config:
    """The recipe of a cell; nothing in it is random, so that the number of processes changes nothing."""
    # A step so small that the idle experts stay idle.
    lr = 1e-5 if cell.idle else 3e-3
    return Config(
        train=TrainConfig(
            batch_size=BATCH, micro_batch_size=BATCH // cell.processes // cell.accumulation, distil_every=2, seed=SEED,
            expert_parallel=cell.sharding, heads=cell.heads, wandb=False,
        ),
        model=ModelConfig(
            backbone="scenes-tiny", view_side=32, keep_views=4, pool_grid=2, width=32, layers=2, heads=2,
            fusion_heads=2, experts=EXPERTS, experts_per_token=1 if cell.idle else 2, expert_width=16,
            mask_side=4, dropout=0.0, metadata_field_dropout=0.0, metadata_all_dropout=0.0, pruning="off",
        ),
        optim=OptimConfig(
            name=cell.optimizer, lr=lr, grad_clip=GRAD_CLIP if cell.clip else 0.0, hessian_every=HESSIAN_EVERY
        ),
    )  # fmt: skip


def build(cell: Cell) -> RoadworkModel:
    """The same model for every cell."""
    torch.manual_seed(SEED)
    settings = config(cell)
    model = RoadworkModel.build(settings.model, settings.loss, heads=settings.train.heads)
    if cell.idle:
        favour_two_experts(model)
    return model


@torch.no_grad()
def favour_two_experts(model: RoadworkModel) -> None:
    """Let no token reach the third and fourth expert: of logits t, -t, 0, 0 one of the first two is the largest."""
    for module in model.modules():
        if isinstance(module, SparseExperts):
            router = cast(torch.Tensor, module.block.gate.weight)
            router[0] *= 200  # so that t is far from 0 for every token
            router[1] = -router[0]
            router[2:] = 0.0


def photo(row: int, dim: int, sizes: ModelConfig) -> dict[str, torch.Tensor]:
    """A photo as the feature cache gives it, with something missing in two of three."""
    generator = torch.Generator().manual_seed(row)
    views, cells = sizes.num_views, sizes.pool_grid**2
    cover = torch.rand(6, sizes.mask_side, sizes.mask_side, generator=generator)
    known = Metadata(gps=(55.7, 13.2), weather=("sunny",) if row % 3 else None, daytime="light")
    return {
        "cls": torch.randn(views, dim, generator=generator),
        "cells": torch.randn(views, cells, 2 * dim, generator=generator),
        "regions": torch.randn(views, dim, generator=generator),
        "boxes": view_boxes(4032, 3024, sizes.view_side)[:views],
        "view_mask": torch.arange(views) < views - row % 4,
        **metadata_tensors(known, text_dim=sizes.text_dim),
        "labels": torch.tensor(row % 2 if row % 5 else -1),
        "mask_targets": cover if row % 3 == 1 else mask_targets(None, sizes.mask_side),
        "row": torch.tensor(row),
        "null_metadata": torch.tensor(False),
    }


def batch(step: int, rows: Sequence[int], model: RoadworkModel) -> Batch:
    """Some photos of an optimizer step."""
    return collate([photo(step * BATCH + row, model.config.backbone_dim, model.config.sizes) for row in rows])


def bare_loop(cell: Cell) -> Curve:
    """One process, the whole batch at once, no DeepSpeed."""
    settings, model = config(cell), build(cell).train()
    optimizer, average = build_optimizer(model, settings.optim), WeightAverage(model, settings.train.ema_decay)
    hessian: dict[str, np.ndarray] = {}
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * lr_at(step, STEPS, settings.optim)
        photos = batch(step, range(BATCH), model)
        if isinstance(optimizer, Sophia) and step % HESSIAN_EVERY == 0:
            diagonal = bare_estimate(optimizer, model, photos, step)
            hessian = hessian or diagonal
        output = model(photos, with_loss=True, keep_all=step % 2 == 0)
        assert output.loss is not None
        optimizer.zero_grad()
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.grad_clip or float("inf"))
        optimizer.step()
        average.update(step)
        counts = {"roadwork": photos["labels"] >= 0, "weather": photos["weather"].sum(dim=-1) > 0}
        counts["segmentation"] = ~photos["mask_targets"].flatten(1).isnan().any(dim=1)
        counts |= {"evidence": counts["roadwork"], "evidence_masks": counts["segmentation"]}
        means = [
            float(output.loss_terms[term].detach().sum()) / max(1, int(counts[term].sum()) if term in counts else BATCH)
            if term in output.loss_terms else 0.0
            for term in TERMS
        ]  # fmt: skip
        losses.append([float(output.loss.detach()), *means])
        norms.append(float(norm))
    if cell.export:
        copy_into(dict(model.named_parameters()), average.tensors)
        model.save_pretrained(cell.export)
    return Curve(np.array(losses), np.array(norms), hessian)


def bare_estimate(optimizer: Sophia, model: RoadworkModel, photos: Batch, step: int) -> dict[str, np.ndarray]:
    """An estimate of the Hessian's diagonal by autograd alone, into the optimizer's mean; returns the mean."""
    weights, seed, targets = dict(model.named_parameters()), SEED, Targets.from_batch(photos)
    model.eval()
    with sdpa_kernel(SDPBackend.MATH):
        output = model(photos, with_loss=True, keep_all=step % 2 == 0)
    assert output.loss is not None
    assert model.loss_config is not None
    if optimizer.squared:
        draws = uniform(photos["row"].tolist(), draws_needed(output), seed, step)
        optimizer.zero_grad()
        sampled_loss(output, targets, count_targets(targets), model.loss_config, draws).backward()
    else:
        probes = rademacher({name: tuple(weight.shape) for name, weight in weights.items()}, seed, step)
        for name, product in hutchinson(output.loss, weights, probes).items():
            weights[name].grad = product
    with optimizer.estimating():
        optimizer.step()
    model.train()
    return {name: optimizer.state[weight]["hessian"].double().numpy() for name, weight in weights.items()}


def held_hessian(trainer: Trainer) -> dict[str, np.ndarray]:
    """The mean of the Hessian's diagonal by parameter, whole. Collective."""
    _, moments = gather_tensors(trainer.engine)
    return {n.removesuffix("/hessian"): t.double().numpy() for n, t in moments.items() if n.endswith("/hessian")}


def run(cells: Sequence[Cell]) -> list[Curve]:
    """The curves of cells that have the same number of processes, which are started once for all of them."""
    (processes,) = {cell.processes for cell in cells}
    return run_apart(train_all, processes, cells)


def train_all(cells: Sequence[Cell]) -> list[Curve]:
    """All cells in turn, each with an engine of its own."""
    linear, curves = torch.nn.functional.linear, []
    for cell in cells:
        torch.nn.functional.linear = linear  # ZeRO-3 leaves its own function there, whose last digits differ
        with tempfile.TemporaryDirectory(prefix="roadwork-parity-") as place:
            curves.append(train(cell, Path(place) / "deepspeed.json"))
    return curves


def train(cell: Cell, settings_file: Path) -> Curve:
    """The cell's steps, by the trainer."""
    trainer = make_trainer(cell, settings_file)
    if cell.resume:
        load(trainer, Path(cell.resume))
    curve = take_steps(cell, trainer)
    if cell.again:
        load(trainer, Path(cell.save))
        curve = take_steps(cell, trainer)
    if cell.export:
        averaged = trainer.best_model.averaged()
        if trainer.rank == 0:
            averaged.save_pretrained(cell.export)
    trainer.engine.destroy()
    return curve


def make_trainer(cell: Cell, settings_file: Path) -> Trainer:
    """The trainer on the cell's form of the engine, whose DeepSpeed configuration is written to a file."""
    settings_file.write_text(json.dumps(ds_settings(cell)))
    schedule = Schedule(BATCH, STEPS, frozenset())
    return loops.make_trainer(config(cell), build(cell), settings_file, schedule, precision=cell.precision)


def take_steps(cell: Cell, trainer: Trainer) -> Curve:
    """Take the steps from the trainer's present one to the last."""
    hessian: dict[str, np.ndarray] = {}
    losses, norms = [], []
    for step in range(trainer.state.step, STEPS):
        if cell.save and step == STEPS // 2:
            save(trainer, Path(cell.save))
        parts = micro_batches(cell, trainer, step)
        counts, _, _ = trainer._agree(parts, None)
        sums, _ = trainer._take_step(parts, counts)
        trainer.state.step += 1
        if cell.optimizer != "adamw" and step == 0:
            hessian = held_hessian(trainer)
        dist.all_reduce(sums)
        losses.append(sums.tolist())
        norm = trainer.engine.get_global_grad_norm()
        norms.append(float("nan") if norm is None else float(norm))
    return Curve(np.array(losses), np.array(norms), hessian)


def micro_batches(cell: Cell, trainer: Trainer, step: int) -> list[Batch]:
    """This rank's micro-batches of an optimizer step."""
    micro, mine = trainer.batching.micro_batch_size, range(trainer.rank, BATCH, cell.processes)
    return [batch(step, mine[i * micro : (i + 1) * micro], trainer.model) for i in range(cell.accumulation)]


def ds_settings(cell: Cell) -> dict[str, Any]:
    """The settings of the project's own DeepSpeed file for the cell's stage.

    Under ZeRO-3 every parameter of this model is below the size from which one is cut into pieces. So all are cut here,
    except in a run that goes back: parameters that stay whole between the steps have to go back too.
    """
    name = f"zero{cell.stage}{'_offload' if cell.offload else ''}.json"
    settings: dict[str, Any] = json.loads((ROOT / "ds_configs" / name).read_text())
    if cell.stage == 3 and not cell.again:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def save(trainer: Trainer, folder: Path) -> None:
    """Write an engine's state as a checkpoint does."""
    weights, moments = gather_tensors(trainer.engine)
    average = trainer.average.gathered()
    if trainer.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in (("weights", weights), ("moments", moments), ("average", average)):
            save_file(tensors, folder / f"{name}.safetensors")
        (folder / "step").write_text(str(trainer.state.step))
    dist.barrier()


def load(trainer: Trainer, folder: Path) -> None:
    """Resume from what `save` wrote."""
    trainer.state.step = int((folder / "step").read_text())
    weights, moments = (load_file(folder / f"{name}.safetensors") for name in ("weights", "moments"))
    set_tensors(trainer.engine, weights, moments, trainer.state.step)
    trainer.average.load(load_file(folder / "average.safetensors"))
