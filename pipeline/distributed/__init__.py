"""Start-up of the processes, the stop signal and checkpoints."""

from pipeline.distributed.checkpoint import Checkpoints
from pipeline.distributed.engine_tensors import EngineAverage, create_optimizer_state
from pipeline.distributed.experts import describe_experts, expert_parallel_size, watch_routers
from pipeline.distributed.signals import StopSignal
from pipeline.distributed.startup import on_all_ranks, on_rank_zero, resolve_precision, start

__all__ = [
    "Checkpoints",
    "EngineAverage",
    "StopSignal",
    "create_optimizer_state",
    "describe_experts",
    "expert_parallel_size",
    "on_all_ranks",
    "on_rank_zero",
    "resolve_precision",
    "start",
    "watch_routers",
]
