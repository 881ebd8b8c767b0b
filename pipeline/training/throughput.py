"""How fast a backbone could be: counted operations, and the rate at which this GPU multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedConfig

from pipeline.model.cpu_kernels import HAS_ONEDNN

MATMUL_SIDE = 8192  # large enough that an H100 reaches its plateau
MATMULS = 24
MATMUL_ROUNDS = 3


def flops_per_view(config: PreTrainedConfig, side: int) -> int:
    """Floating-point operations of one view, counted on tensors without content.

    Attention counts as its two matrix products, whichever kernel computes it.

    Args:
        config: The backbone's configuration.
        side: View side S in pixels.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="sdpa").eval()
        view = torch.empty(1, 3, side, side)
    with flop_counter() as counter, torch.no_grad():
        model(pixel_values=view)
    return int(counter.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """Torch's counter of FLOPs, which by itself does not know the products of experts and of layers on a CPU."""
    known: dict[Any, Callable[..., int]] = {torch.ops.aten._grouped_mm: _grouped_mm_flops}
    if HAS_ONEDNN:
        known[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    return FlopCounterMode(display=False, custom_mapping=known)


def _grouped_mm_flops(left: list[int], right: list[int], *args: Any, **kwargs: Any) -> int:
    """Groups are parts of the rows or of the inner dimension, which are whole in the shapes, or else whole matrices."""
    groups = left[0] if len(left) == len(right) == 3 else 1
    return 2 * groups * left[-2] * left[-1] * right[-1]


def _linear_flops(x: list[int], weight: list[int], *args: Any, **kwargs: Any) -> int:
    return 2 * prod(x) * weight[0]


def matmul_rate(device: torch.device) -> float:
    """Measured FLOP/s of bf16 matrix products, the best of a few rounds; takes about a second on a GPU.

    Measured, because peaks in data sheets hold for other clocks, power limits and cards.
    """
    left, right = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    best_s = float("inf")
    for _ in range(1 + MATMUL_ROUNDS):  # the first one warms up and is never the best
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(MATMULS):
            torch.mm(left, right, out=out)
        torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * MATMUL_SIDE**3 * MATMULS / best_s
