"""Experts in one grouped product on a GPU: nothing waits, and everything has its device and precision."""

import pytest
import torch

from pipeline.model.moe import SparseExperts, set_grouped_mm
from tests.gpu_simulation.device import CUDA
from tests.gpu_simulation.examples import small_config


@pytest.mark.parametrize("grouped_mm", [False, True])
def test_waits_of_a_layer_of_experts(gpu, grouped_mm):
    layer = SparseExperts(small_config()).to(CUDA, torch.bfloat16)
    set_grouped_mm(layer, grouped_mm)
    x = torch.randn(2, 10, 64).to(CUDA, torch.bfloat16).requires_grad_()
    with gpu.watch() as waits:
        update, _ = layer(x)
        update.sum().backward()
    assert len(waits) == (0 if grouped_mm else 1), waits
    for name, weight in {"x": x, **dict(layer.named_parameters())}.items():
        assert (weight.grad.device, weight.grad.dtype) == (CUDA, torch.bfloat16), name
        assert weight.grad.isfinite().all(), name
