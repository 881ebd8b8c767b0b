"""One process of the measured side of `benchmarks.scaling`: the head on the engine that training uses, and noise."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from deepspeed.comm import comm

from data_prep.scenes.backbone import scenes_tiny_config
from pipeline.config import ACCELERATE_CONFIGS, read_config
from pipeline.distributed import EngineAverage, create_optimizer_state
from pipeline.launch.plan import resolve
from pipeline.optim.build import build_optimizer
from pipeline.training.memory import build_head, noise

WARM_UP, STEPS, REDUCTIONS = 2, 6, 5
SMALL, LARGE = 1, 4_000_000  # elements of the reductions that latency and bandwidth are found with


@dataclass(frozen=True)
class Measured:
    """What rank 0 saw."""

    step_s: float
    """Median of an optimizer step."""
    sent_bytes: float
    """Through collectives in a step, counted once per collective and process."""
    collectives: float
    """Of a step."""
    state_bytes: int
    """Trained weights, gradients, optimizer state and average."""
    latency_s: float
    """Of the smallest all-reduce; 0 for a process alone."""
    bytes_per_s: float
    """Of a large all-reduce: bytes of the tensor over its time; infinite for a process alone."""


def measure(recipe: Path, shapes: list[tuple[int, int]]) -> list[Measured]:
    """Time steps of several shapes: photos of a micro-batch, and micro-batches of a step. Collective."""
    torch.set_num_threads(1)
    world_size = int(os.environ["WORLD_SIZE"])
    config, backbone = read_config(recipe), scenes_tiny_config()
    config.train.micro_batch_size, config.train.batch_size = 1, world_size
    plan = resolve(config, ACCELERATE_CONFIGS / "cpu_2.yaml", 1, world_size, "fp32")
    settings = plan.settings | {"comms_logger": {"enabled": True, "prof_all": True, "verbose": False}}
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    torch.manual_seed(0)
    model = build_head(config, backbone).train()
    engine, _ = accelerator.prepare(model, build_optimizer(model, config.optim))
    create_optimizer_state(engine)
    average = EngineAverage(model)
    latency_s, large_s = (reduction_s(elements) for elements in (SMALL, LARGE))
    alone = world_size == 1
    found = []
    for photos, accumulation in shapes:
        engine.set_train_batch_size(accumulation * world_size)
        seconds, sent, collectives = time_steps(engine, average, noise(config, backbone, photos), accumulation)
        found.append(
            Measured(
                step_s=seconds,
                sent_bytes=sent,
                collectives=collectives,
                state_bytes=held_bytes(engine, average),
                latency_s=0.0 if alone else latency_s,
                bytes_per_s=float("inf") if alone else 4 * LARGE / max(large_s - latency_s, 1e-9),
            )
        )
    return found


def time_steps(
    engine: Any, average: EngineAverage, batch: dict[str, torch.Tensor], accumulation: int
) -> tuple[float, float, float]:
    """Median seconds of a step, and its bytes and number of collectives."""
    seconds = []
    for number in range(WARM_UP + STEPS):
        if number == WARM_UP:
            logger().reset_data()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(accumulation):
            engine.backward(engine(**batch, keep_all=True).loss)
            engine.step()
        average.update(number)
        seconds.append(time.perf_counter() - start)
    sizes = [(size, len(rows[1])) for op in logger().comms_dict.values() for size, rows in op.items() if size]
    sent, collectives = sum(size * count for size, count in sizes), sum(count for _, count in sizes)
    return statistics.median(seconds[WARM_UP:]), sent / STEPS, collectives / STEPS


def logger() -> Any:
    """DeepSpeed's account of its collectives."""
    return comm.comms_logger


def reduction_s(elements: int) -> float:
    """Fastest of several all-reduces of fp32."""
    tensor, best = torch.zeros(elements), float("inf")
    for _ in range(REDUCTIONS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        best = min(best, time.perf_counter() - start)
    return best


def held_bytes(engine: Any, average: EngineAverage) -> int:
    """Bytes of all storages that training keeps for its parameters between two steps.

    Gradients are counted by what a backward pass makes of them: stage 2 keeps one piece in W, whole ones are gone.
    """
    zero = engine.optimizer
    tensors = [*engine.module.parameters(), *average.tensors.values(), *zero.single_partition_of_fp32_groups]
    tensors += [value for state in zero.optimizer.state.values() for value in state.values() if value.numel() > 1]
    pieces = sum(piece.numel() * piece.element_size() for piece in zero.single_partition_of_fp32_groups)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + pieces


def main(recipe: str, shapes: str, out: str) -> None:
    """Measure, and let rank 0 write JSON."""
    found = measure(Path(recipe), json.loads(shapes))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps([asdict(each) for each in found]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
