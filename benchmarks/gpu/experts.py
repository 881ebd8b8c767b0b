"""A layer of experts, forward and backward: each expert in turn, beside all of them in one grouped product."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.parts import Bench
from pipeline.model.moe import SparseExperts, set_grouped_mm


def experts(bench: Bench) -> None:
    """Measure one layer in training's precision, on as many tokens as a batch of photos has."""
    config = bench.model_config()
    torch.manual_seed(0)  # weights that two runs share
    layer = SparseExperts(config).to(bench.device, torch.bfloat16)
    tokens = config.keep_views * (1 + config.pool_grid**2)
    shape = bench.sizes.batch_size, tokens, config.width
    x = torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    reference: list[torch.Tensor] = []

    def step() -> torch.Tensor:
        layer.zero_grad()
        update, _ = layer(x)
        (gradient,) = torch.autograd.grad(update.float().square().mean(), x)
        return gradient

    def measured(grouped: bool) -> dict[str, Any]:
        set_grouped_mm(layer, grouped)
        gradient = step().float()
        found = {"ms": 1e3 * bench.seconds(step), "peak_gb": bench.peak_gb(step)}
        if reference:
            found["difference"] = ((gradient - reference[0]).norm() / reference[0].norm()).item()
        else:
            reference.append(gradient)
        return found

    bench.attempt("experts in turn", measured, False)
    bench.attempt("experts in one grouped product", measured, True)
