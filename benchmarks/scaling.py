"""A model of training in several processes, checked against 1, 2 and 4 of them on this machine.

The time of a step has three parts: the micro-batches, each a fixed part and a part per photo; the optimizer, whose
state is divided among the processes; and the collectives, by their number and bytes. Steps of one process give the
first two parts, an all-reduce gives the third, and two and four processes check the sum. docs/scaling.md applies the
same arithmetic to GPUs, on which nothing was measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.form import Report, Row, compare, exact, interleave, machine, publish, versions
from benchmarks.processes import run_apart
from benchmarks.scaling_worker import Measured, Shape, measure
from data_prep.scenes.pretraining import scenes_tiny_config
from pipeline.cli import command
from pipeline.config import find_recipe, read_config
from pipeline.distributed.settings import Sharding
from pipeline.training.memory import count, state_bytes

PACKAGES = ("torch", "deepspeed", "accelerate")
CHECKED, CHECKED_QUICKLY = (1, 2, 4), (1, 2)
MICRO, SHARE = 4, 16  # photos of a micro-batch, and of a step over all processes
ALONE: tuple[Shape, ...] = ((MICRO, 1), (MICRO, 2), (2 * MICRO, 1))  # by which one process says what the parts cost
FP32 = 4
NOTES = {
    "step": "demo head, cached tokens, fp32, ZeRO-2 over gloo, one thread per process; the model knows the steps of "
    "one process in three shapes and the price of an all-reduce; where processes share a core, computing takes longer "
    "by as much",
    "state": "weights, gradients, fp32 master weights, moments and average; counted from the engine's storages",
}


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of the parts of a step."""

    fixed_s: float
    """Seconds of a micro-batch, whatever its size."""
    photo_s: float
    optimizer_s: float
    """Seconds of the optimizer in a process alone; each of W processes takes one W-th of it."""
    reduced_bytes: float
    """Bytes of the gradients that are reduced after each micro-batch."""
    gathered_bytes: float
    """Bytes of the weights that are gathered after the step."""
    collectives: float
    """Number of collectives in a step with one micro-batch."""


def predict(
    costs: Costs, photos: int, accumulation: int, processes: int, slowdown: float, bytes_per_s: float, latency_s: float
) -> float:
    """Seconds of a step under ZeRO-2 without overlap.

    Args:
        costs: Costs of the parts of a step.
        photos: Photos in a micro-batch.
        accumulation: Micro-batches of each process.
        processes: Number of processes W.
        slowdown: How much longer computing takes where processes share cores.
        bytes_per_s: Speed of an all-reduce, as the tensor's bytes over its time; a gather moves half of that.
        latency_s: Seconds of a collective that sends nothing.
    """
    compute_s = accumulation * (costs.fixed_s + photos * costs.photo_s) + costs.optimizer_s / processes
    if processes == 1:
        return slowdown * compute_s
    moved = accumulation * costs.reduced_bytes + costs.gathered_bytes / 2
    calls = costs.collectives * (1 + accumulation) / 2
    return slowdown * compute_s + moved / bytes_per_s + calls * latency_s


def parts_of(alone: Mapping[Shape, Measured], trained: int) -> Costs:
    """The parts of a step, from steps of one process in the shapes of `ALONE`."""
    one, two, wide = (alone[shape].step_s for shape in ALONE)
    micro_s = two - one
    photo_s = max(0.0, (wide - one) / MICRO)
    fixed_s, optimizer_s = max(0.0, micro_s - MICRO * photo_s), max(0.0, one - micro_s)
    reduced_bytes = alone[MICRO, 2].sent_bytes - alone[MICRO, 1].sent_bytes
    return Costs(fixed_s, photo_s, optimizer_s, reduced_bytes, FP32 * trained, alone[MICRO, 1].collectives)


def scaling(quick: bool = False, out: Path | None = None, seed: int = 0) -> Path:
    """Check a model of training in several processes against 1, 2 and 4 of them here.

    Args:
        quick: One and two processes, and two rounds instead of five.
        out: Folder for scaling.json; by default the committed results, or runs/benchmarks after a quick run.
        seed: Seed of the order of measuring.
    """
    here = CHECKED_QUICKLY if quick else CHECKED
    rows = checked(here, 2 if quick else 5, seed)
    return publish(Report("scaling", machine(max(here)), versions(PACKAGES), seed, tuple(rows)), out, quick)


def checked(processes_here: tuple[int, ...], rounds: int, seed: int) -> list[Row]:
    """Rows that compare steps on this machine with what the model predicts."""
    config = read_config(find_recipe("demo"))
    parameters = replace(count(config, scenes_tiny_config()), frozen=0)
    shapes = {processes: (MICRO, SHARE // (MICRO * processes)) for processes in processes_here}
    arms = {
        str(processes): partial(run_apart, measure, processes, config, [shape, *(ALONE if processes == 1 else ())])
        for processes, shape in shapes.items()
    }
    found = interleave(arms, rounds, seed)
    cores, rows = len(os.sched_getaffinity(0)), []
    for processes, shape in shapes.items():
        measured, says = [here[shape] for here in found[str(processes)]], []
        for alone, here in zip(found["1"], measured, strict=True):
            costs, slowdown = parts_of(alone, parameters.trained), max(1.0, processes / cores)
            says.append(predict(costs, *shape, processes, slowdown, here.bytes_per_s, here.latency_s))
        these = f"{processes} process{'es' * (processes > 1)}"
        what = f"step of {SHARE} photos, {these} on {cores} cores"
        rows.append(compare(what, "the model", [here.step_s for here in measured], says, "s", None, NOTES["step"]))
        held, _ = state_bytes(parameters, "fp32", Sharding(processes))
        sizes = measured[-1].state_bytes / 2**20, held / 2**20
        rows.append(exact(f"state of one of {these}", "the model", *sizes, "MiB", None, NOTES["state"]))
    return rows


if __name__ == "__main__":
    raise SystemExit(command(scaling))
