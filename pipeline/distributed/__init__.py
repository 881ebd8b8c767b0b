"""Start-up of the processes, what the engine gets, what ranks agree on, and how they stop or fail."""

from pipeline.distributed.agreement import Agreement, on_all_ranks, on_rank_zero
from pipeline.distributed.engine_tensors import EngineAverage, create_optimizer_state
from pipeline.distributed.experts import expert_parallel_size, watch_routers
from pipeline.distributed.signals import StopSignal
from pipeline.distributed.skipping import count_steps, skip_steps_that_are_not_finite, spoil_gradient
from pipeline.distributed.startup import start
from pipeline.distributed.watchdog import Watchdog

__all__ = [
    "Agreement",
    "EngineAverage",
    "StopSignal",
    "Watchdog",
    "count_steps",
    "create_optimizer_state",
    "expert_parallel_size",
    "on_all_ranks",
    "on_rank_zero",
    "skip_steps_that_are_not_finite",
    "spoil_gradient",
    "start",
    "watch_routers",
]
