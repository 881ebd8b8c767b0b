"""A small model on the simulated GPU in the precision of training, and batches for it in pinned memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from pipeline.data.batch import Batch, collate
from pipeline.data.dataset import metadata_tensors
from pipeline.data.record import Metadata
from pipeline.data.stand_in import StandIn
from pipeline.model.config import METADATA_FIELDS, LossConfig, ModelConfig
from pipeline.model.output import RoadworkOutput
from pipeline.model.roadwork import RoadworkModel
from tests.gpu_simulation.device import CUDA, Wait

BATCH, LAYERS, EXPERTS, TEXT_DIM = 4, 2, 3, 8


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
    """A batch as the training loader makes it: one photo lacks views, one a label, one a mask, one all metadata."""
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
    return {name: value.pin_memory() for name, value in batch.items()}


def cached(batch: Batch, model: RoadworkModel) -> Batch:
    """The same photos from a feature cache, which holds bf16."""
    dim, grid = model.config.backbone_dim, model.config.pool_grid
    count, views = batch["view_mask"].shape
    shapes = {"cls": (views, dim), "cells": (views, grid * grid, 2 * dim), "regions": (views, dim)}
    tokens = {name: torch.randn(count, *shape).bfloat16().pin_memory() for name, shape in shapes.items()}
    return {name: value for name, value in batch.items() if name != "views"} | tokens


def by_file(waits: Sequence[Wait]) -> Counter[str]:
    """How many waits each file of the project led to."""
    return Counter(wait.place.partition(":")[0] for wait in waits)


def tensors_in(output: RoadworkOutput) -> dict[str, torch.Tensor]:
    """All tensors of an output by name, those of its loss terms too."""
    found = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    return found | {f"loss of {term}": value for term, value in (output.loss_terms or {}).items()}
