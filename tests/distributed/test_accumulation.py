"""In bf16 the gradients of micro-batches and ranks are added in fp32, as `ds_configs` says."""

import copy
import json
import os
from unittest.mock import patch

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from benchmarks.loops import make_trainer
from benchmarks.parity_cells import BATCH, Cell, bare_loop, build, config, held_hessian, micro_batches
from benchmarks.processes import run_apart
from pipeline.config import ROOT
from pipeline.distributed import settings
from pipeline.training.plan import Schedule

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
    """How far one step with each file is from the mean of torch's own gradients: as it is, and without either key."""
    dist.init_process_group("gloo")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    linear, found = nn.functional.linear, {}
    for name in FILES:
        values = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        for left_out in (None, *IN_FP32):
            nn.functional.linear = linear  # ZeRO-3 leaves one of its own
            found[name, left_out] = difference({key: values[key] for key in values if key != left_out})
    return found


def difference(values):
    """The largest difference of any parameter's step, relative to that parameter's largest step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16))
    alone = copy.deepcopy(model).bfloat16()
    values |= {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": MICRO_BATCHES}
    values |= {"bf16": {"enabled": True}}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=values)
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


def test_a_step_is_the_mean_of_all_gradients_to_rounding_in_fp32_and_needs_both_keys_for_it():
    for (_, left_out), found in run_apart(look, 2).items():
        assert found < 1e-5 if left_out is None else found > 1e-3


def estimates(folder):
    """The median error of sophia_h's estimate at ZeRO-1 in bf16, relative to each parameter: as is, with fp32 sums."""
    cell, found = Cell(1, 1, 2, 2, optimizer="sophia_h", precision="bf16"), []
    expected = bare_loop(cell).hessian
    usual = json.loads((ROOT / "ds_configs" / "zero1.json").read_text())
    for more in ({}, {"data_types": {"grad_accum_dtype": "fp32"}}):
        file = folder / f"rank-{os.environ['RANK']}.json"
        file.write_text(json.dumps(usual | more))
        with patch.object(settings, "check_accumulation"):
            trainer = make_trainer(
                config(cell), build(cell), file, Schedule(BATCH, 1, frozenset()), precision="bf16"
            )  # fmt: skip
        parts = micro_batches(cell, trainer, 0)
        counts, _, _ = trainer._agree(parts, None)
        trainer.hessian.take(0, parts, counts, True)
        ours = held_hessian(trainer)
        trainer.engine.destroy()
        errors = [np.abs(ours[n] - value).max() / np.abs(value).max() for n, value in expected.items() if value.any()]
        found.append(float(np.median(errors)))
    return found


def test_fp32_sums_at_stage_1_are_refused_because_deepspeeds_optimizer_for_them_gets_estimates_wrong(tmp_path):
    usual, in_fp32 = run_apart(estimates, 2, tmp_path)
    assert usual < 0.02
    assert in_fp32 > 0.2
