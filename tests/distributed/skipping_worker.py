"""One rank: an engine of the ZeRO stage that is asked for, a gradient that is not finite on rank 1, then a good one."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # the project in the place of this folder
    sys.path[0] = str(Path(__file__).parents[2])

import deepspeed
import deepspeed.ops
import torch
from torch import nn

from pipeline.distributed.skipping import count_steps, skip_steps_that_are_not_finite, spoil_gradient
from pipeline.distributed.startup import end_process

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
rank = int(os.environ["RANK"])


def check(stage: int, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    skip_steps_that_are_not_finite(engine)

    def take(bad: bool) -> None:
        torch.manual_seed(10 + rank)
        loss = engine(torch.randn(4, 8)).square().mean()
        if bad and kind == "loss":
            loss = loss + torch.inf  # whose gradient is finite
        if bad and kind == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.nan)
        engine.backward(spoil_gradient(loss))
        engine.step()

    def everything() -> list[torch.Tensor]:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            weights = [p.detach().clone() for p in model.parameters()]
        moments = [v.clone() for s in engine.basic_optimizer.state.values() for k, v in s.items() if k != "step"]
        return weights + moments

    take(bad=False)
    assert engine.was_step_applied()
    before = everything()
    take(bad=rank == 1)
    assert not engine.was_step_applied()
    count_steps(engine, 2)
    assert all(was.equal(now) for was, now in zip(before, everything(), strict=True))
    take(bad=False)
    assert engine.was_step_applied()
    assert not all(was.equal(now) for was, now in zip(before, everything(), strict=True))
    assert {int(state["step"]) for state in engine.basic_optimizer.state.values()} == {3}


def check_experts() -> None:
    """ZeRO 0, where each rank has experts of its own and only one of them a bad gradient."""
    expert = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([expert], lr=0.1)
    engine = SimpleNamespace(
        optimizer=optimizer, basic_optimizer=optimizer, has_moe_layers=True, gradient_clipping=lambda: 0.0
    )
    skip_steps_that_are_not_finite(engine)
    for value, taken in ((torch.nan if rank == 1 else 1.0, False), (1.0, True)):
        expert.grad = torch.full((3,), value)
        optimizer.step()
        assert optimizer.overflow != taken
        assert expert.equal(torch.ones(3)) != taken


for stage in (0, 1, 2, 3):
    for kind in ("loss", "gradient"):
        check(stage, kind)
        if rank == 0:
            print(f"ZeRO {stage}, {kind}: skipped", flush=True)
check_experts()
if rank == 0:
    print("ZeRO 0, gradient of sharded experts: skipped", flush=True)
torch.distributed.destroy_process_group()
end_process(0)
