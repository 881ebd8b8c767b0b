"""One process of the measured side of `benchmarks.scaling`: the head on the engine that training uses, and noise."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.comm import comm

from benchmarks.loops import engine_step, make_trainer
from data_prep.scenes.pretraining import scenes_tiny_config
from pipeline.config import Config
from pipeline.data.batch import Batch
from pipeline.distributed.settings import find_deepspeed, read_deepspeed
from pipeline.distributed.startup import world_size
from pipeline.trainer import Trainer
from pipeline.training.memory import build_head, noise
from pipeline.training.plan import Schedule

WARM_UP, STEPS, REDUCTIONS = 2, 6, 5
SMALL, LARGE = 1, 4_000_000  # elements of the reductions that latency and bandwidth are found with
LOG = {"comms_logger": {"enabled": True, "prof_all": True, "verbose": False}}

Shape = tuple[int, int]
"""Photos of a micro-batch, and micro-batches of a step."""


@dataclass(frozen=True)
class Measured:
    """What rank 0 saw."""

    step_s: float
    """Median of the optimizer steps."""
    sent_bytes: float
    """Bytes through collectives in a step, counted once per collective and process."""
    collectives: float
    """Number of collectives in a step."""
    state_bytes: int
    """Bytes of trained weights, gradients, optimizer state and average."""
    latency_s: float
    """Seconds of the smallest all-reduce; 0 for a process alone."""
    bytes_per_s: float
    """Speed of a large all-reduce: bytes of the tensor over its time; infinite for a process alone."""


def measure(config: Config, shapes: Sequence[Shape]) -> dict[Shape, Measured]:
    """Time steps of several shapes under ZeRO-2. Collective."""
    backbone, found = scenes_tiny_config(), {}
    with tempfile.TemporaryDirectory(prefix="roadwork-scaling-") as place:
        file = Path(place) / "deepspeed.json"
        file.write_text(json.dumps({**read_deepspeed(find_deepspeed("ds_configs/zero2.json")), **LOG}))
        for photos, accumulation in shapes:
            config.train.micro_batch_size = photos
            config.train.batch_size = size = photos * accumulation * world_size()
            torch.manual_seed(0)
            trainer = make_trainer(config, build_head(config, backbone), file, Schedule(size, 1, frozenset()))
            found[photos, accumulation] = time_steps(trainer, [noise(config, backbone, photos)] * accumulation)
            trainer.engine.destroy()
    return found


def time_steps(trainer: Trainer, batches: list[Batch]) -> Measured:
    """Time steps of one shape, and collectives."""
    seconds = []
    for number in range(WARM_UP + STEPS):
        if number == WARM_UP:
            comm.comms_logger.reset_data()
        dist.barrier()
        start = time.perf_counter()
        engine_step(trainer, batches, keep_all=True)
        trainer.average.update(number)
        seconds.append(time.perf_counter() - start)
    logged = comm.comms_logger.comms_dict.values()
    sizes = [(size, len(rows[1])) for operation in logged for size, rows in operation.items() if size]
    latency_s, large_s = (reduction_s(elements) for elements in (SMALL, LARGE))
    link = latency_s, 4 * LARGE / max(large_s - latency_s, 1e-9)
    if trainer.world_size == 1:
        link = 0.0, float("inf")
    sent_bytes, collectives = sum(size * count for size, count in sizes), sum(count for _, count in sizes)
    step_s = statistics.median(seconds[WARM_UP:])
    return Measured(step_s, sent_bytes / STEPS, collectives / STEPS, held_bytes(trainer), *link)


def reduction_s(elements: int) -> float:
    """Seconds of the fastest of several all-reduces of fp32."""
    tensor, best = torch.zeros(elements), float("inf")
    for _ in range(REDUCTIONS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        best = min(best, time.perf_counter() - start)
    return best


def held_bytes(trainer: Trainer) -> int:
    """Bytes of all storages that training keeps for its parameters between two steps.

    For gradients, what a backward pass leaves is counted: at stage 2 one piece of W, and no whole gradients.
    """
    zero: Any = trainer.engine.optimizer
    pieces = zero.single_partition_of_fp32_groups
    tensors = [*trainer.engine.module.parameters(), *trainer.average.tensors.values(), *pieces]
    tensors += [value for state in zero.optimizer.state.values() for value in state.values() if value.numel() > 1]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + sum(piece.numel() * piece.element_size() for piece in pieces)
