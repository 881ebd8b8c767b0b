"""A small model on the simulated GPU in the precision of training, and batches for it in pinned memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from pipeline.data.batch import Batch, collate
from pipeline.data.dataset import metadata_tensors
from pipeline.data.record import Metadata
from pipeline.data.stand_in import StandIn
from pipeline.model.config import METADATA_FIELDS, LossConfig, ModelConfig
from pipeline.model.output import RoadworkOutput
from pipeline.model.roadwork import RoadworkModel
from tests.gpu_simulation.device import CUDA, Wait

BATCH, LAYERS, EXPERTS, TEXT_DIM = 4, 2, 3, 8
# The most waits of one layer's experts in one pass of the head: for how many tokens each of them gets.
EXPERT_FILE, EXPERT_WAITS = "pipeline/model/moe.py", 1


def small_config(**changes: object) -> ModelConfig:
    """The complete head on the small backbone that comes with the project."""
    sizes = {
        "backbone": "scenes-tiny", "view_side": 64, "width": 64, "layers": LAYERS, "heads": 4, "fusion_heads": 4,
        "experts": EXPERTS, "expert_width": 64, "mask_side": 16, "metadata": METADATA_FIELDS, "text_dim": TEXT_DIM,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def model_in_training(config: ModelConfig, heads: int = 1, **loss: float) -> RoadworkModel:
    """A model on the simulated GPU, as DeepSpeed trains it in bf16: the head's weights are bf16, dropout is on."""
    torch.manual_seed(0)
    model = RoadworkModel.build(config, LossConfig(**loss), device=CUDA, heads=heads)
    return model.to(torch.bfloat16).train()


def photos(config: ModelConfig) -> Batch:
    """A batch as the training loader makes it: one photo lacks views, one a label, one a mask, one all metadata.

    It is in pinned memory, as is that of `cached`, where there is a GPU.
    """
    data = StandIn(BATCH, config.input_spec("full"), TEXT_DIM)
    batch = collate([data[row] for row in range(BATCH)])
    known = Metadata(gps=(55.7, 13.2), weather=("sunny",), daytime="light", scene="urban")
    fields = [metadata_tensors(known, text_dim=TEXT_DIM) for _ in range(BATCH - 1)]
    batch |= collate([*fields, metadata_tensors(Metadata(), text_dim=TEXT_DIM)])
    batch["text"] = torch.randn(BATCH, TEXT_DIM)
    batch["mask_targets"] = torch.rand(BATCH, 6, config.mask_side, config.mask_side)
    batch["mask_targets"][1] = torch.nan
    batch["labels"][3] = -1
    batch["view_mask"][0, 5:] = False
    batch["null_metadata"][2] = True
    return {name: pinned(value) for name, value in batch.items()}


def cached(batch: Batch, model: RoadworkModel) -> Batch:
    """The same photos from a feature cache, which holds bf16."""
    dim, grid = model.config.backbone_dim, model.config.pool_grid
    count, views = batch["view_mask"].shape
    shapes = {"cls": (views, dim), "cells": (views, grid * grid, 2 * dim), "regions": (views, dim)}
    tokens = {name: pinned(torch.randn(count, *shape).bfloat16()) for name, shape in shapes.items()}
    return {name: value for name, value in batch.items() if name != "views"} | tokens


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in pinned memory if there is a GPU."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def assert_waits(waits: Sequence[Wait], expected: Mapping[str, int], layers: int = LAYERS) -> None:
    """Check how many waits each file of the project led to, and that the experts led to no more than they may.

    Args:
        waits: The waits of a step, or of a pass.
        expected: The number by file, without the experts.
        layers: Layers of the head times its passes; 0 for a head without experts.
    """
    others = [wait for wait in waits if wait.place.partition(":")[0] != EXPERT_FILE]
    assert Counter(wait.place.partition(":")[0] for wait in others) == expected, others
    assert len(waits) - len(others) <= layers * EXPERT_WAITS


def tensors_in(output: RoadworkOutput) -> dict[str, torch.Tensor]:
    """All tensors of an output by name, those of its loss terms too."""
    found = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    return found | {f"loss of {term}": value for term, value in (output.loss_terms or {}).items()}


class Engine:
    """What the code asks of a DeepSpeed engine without ZeRO: a module, its optimizer, and steps that all count."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self.module, self.optimizer = module, optimizer
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        return self.module(*args, **kwargs)

    def was_step_applied(self) -> bool:
        """Always."""
        return True


class Accelerator:
    """What the code asks of Accelerate in one process; its engine takes a step after each backward pass."""

    num_processes = 1

    def __init__(self, engine: Engine, device: torch.device):
        self.engine, self.device = engine, device

    def accumulate(self, engine: Engine) -> AbstractContextManager[None]:
        """Nothing is accumulated."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass and step."""
        loss.backward()
        self.engine.optimizer.step()
        self.engine.optimizer.zero_grad()
