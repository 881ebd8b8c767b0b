"""In bf16 the gradients of micro-batches and ranks are added in fp32, as `ds_configs` says."""

import copy
import json

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from benchmarks.processes import run_apart
from pipeline.config import ROOT

pytestmark = pytest.mark.dist
FILES = ("zero2", "zero3", "zero2_offload", "zero3_offload")
MICRO_BATCHES = 8
IN_FP32 = ("data_types", "communication_data_type")


def photos(rank, number):
    """A micro-batch."""
    generator = torch.Generator().manual_seed(100 * rank + number)
    return torch.randn(4, 32, generator=generator).bfloat16()


def loss(model, batch):
    return model(batch).float().square().mean()


def look():
    """How far one step with each file is from the mean of torch's own gradients, with its keys for fp32 and without."""
    dist.init_process_group("gloo")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    linear, found = nn.functional.linear, {}
    for name in FILES:
        settings = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        without = {key: settings[key] for key in settings if key not in IN_FP32}
        nn.functional.linear = linear  # ZeRO-3 leaves one of its own
        found[name] = difference(settings), difference(without)
    return found


def difference(settings):
    """The largest difference of any parameter's step, relative to that parameter's largest step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16))
    alone = copy.deepcopy(model).bfloat16()
    settings |= {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": MICRO_BATCHES}
    settings |= {"bf16": {"enabled": True}}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    before = [safe_get_full_fp32_param(p).clone() for p in model.parameters()]
    for number in range(MICRO_BATCHES):
        engine.backward(loss(engine, photos(dist.get_rank(), number)))
        engine.step()
    steps = [old - safe_get_full_fp32_param(p) for old, p in zip(before, model.parameters(), strict=True)]
    engine.destroy()

    weights = list(alone.parameters())
    batches = [photos(rank, number) for rank in range(dist.get_world_size()) for number in range(MICRO_BATCHES)]
    gradients = [[g.double() for g in torch.autograd.grad(loss(alone, batch), weights)] for batch in batches]
    expected = [torch.stack(parts).mean(dim=0) for parts in zip(*gradients, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(steps, expected, strict=True))


def test_a_step_is_the_mean_of_all_gradients_to_rounding_in_fp32():
    found = run_apart(look, 2)
    assert max(with_keys for with_keys, _ in found.values()) < 1e-5
    assert min(without for _, without in found.values()) > 1e-3
