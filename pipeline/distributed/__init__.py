"""Start-up of the processes, what they agree on, how they stop or fail, and checkpoints."""

from pipeline.distributed.agreement import Agreement
from pipeline.distributed.checkpoint import Checkpoints
from pipeline.distributed.engine_tensors import EngineAverage, create_optimizer_state
from pipeline.distributed.experts import describe_experts, expert_parallel_size, watch_routers
from pipeline.distributed.hessian_step import HessianStep
from pipeline.distributed.signals import StopSignal
from pipeline.distributed.skipping import count_steps, skip_steps_that_are_not_finite, spoil_gradient
from pipeline.distributed.startup import on_all_ranks, on_rank_zero, resolve_precision, start
from pipeline.distributed.watchdog import Watchdog

__all__ = [
    "Agreement",
    "Checkpoints",
    "EngineAverage",
    "HessianStep",
    "StopSignal",
    "Watchdog",
    "count_steps",
    "create_optimizer_state",
    "describe_experts",
    "expert_parallel_size",
    "on_all_ranks",
    "on_rank_zero",
    "resolve_precision",
    "skip_steps_that_are_not_finite",
    "spoil_gradient",
    "start",
    "watch_routers",
]
