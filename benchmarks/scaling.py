"""A model of training on 1 to 512 GPUs, from counted operations, bytes and collectives, checked against processes here.

A step is its micro-batches, each a fixed part and a part per photo, then the optimizer, whose state is shared by the
processes, and the collectives, by their bytes and number. On this machine one process says how long each part takes, an
all-reduce what bytes cost, and two and four processes whether the sum is right. For GPUs, which are not here, bytes,
operations and kernels are counted, and speeds are assumed: every assumption is printed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from benchmarks.form import Report, Row, compare, interleave, machine, publish, versions
from benchmarks.scaling_worker import Measured
from data_prep.scenes.backbone import scenes_tiny_config
from pipeline.cli import command
from pipeline.config import Config, find_recipe, read_config, to_yaml
from pipeline.distributed.settings import Sharding
from pipeline.model.backbone import vith16plus_config
from pipeline.progress import say
from pipeline.training.memory import Parameters, build_head, count, need, noise, state_bytes

PACKAGES = ("torch", "deepspeed", "accelerate")
PHOTOS = 8549  # of an epoch
GPUS = (1, 8, 32, 128, 512)
CHECKED, CHECKED_QUICKLY = (1, 2, 4), (1, 2)
MICRO, SHARE = 4, 16  # photos of a micro-batch, and of a step over all processes, where processes are measured
FP32, BF16 = 4, 2
BUCKET = 50_000_000  # of ds_configs/zero2.json
NOTES = {
    "step": "demo head, cached tokens, fp32, ZeRO-2 over gloo, one thread per process; the model knows the steps of "
    "one process in three shapes and the price of an all-reduce; where processes share a core, computing takes longer "
    "by as much",
    "state": "weights, gradients, fp32 master weights, moments and average; counted from the engine's storages",
}
NOT_COUNTED = "nothing overlaps, data are never waited for, and the head sees all views in every step"


@dataclass(frozen=True)
class Assumptions:
    """Of an H100 cluster. None of it was measured here."""

    matmul_flops: float = 600e12
    """FLOP/s of large bf16 matrix products."""
    backbone_mfu: float = 0.5
    """Share of it that the frozen backbone reaches."""
    head_mfu: float = 0.1
    """Share of it that the small head reaches."""
    launch_s: float = 6e-6
    """Of one kernel; the head's kernels are so small that this bounds it."""
    memory_bytes_per_s: float = 2.5e12
    """Of a GPU's memory, for the optimizer."""
    node_bytes_per_s: float = 300e9
    """Of one GPU's links inside a node of eight."""
    fabric_bytes_per_s: float = 40e9
    """Of one GPU's share of the network between nodes."""
    node_latency_s: float = 10e-6
    """Of a collective inside a node, for each doubling of the GPUs."""
    fabric_latency_s: float = 20e-6
    """The same between nodes."""
    gpu_per_node: int = 8


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of the parts of a step."""

    fixed_s: float
    """Of a micro-batch, whatever its size."""
    photo_s: float
    optimizer_s: float
    """Of a process alone; W processes take one W-th each."""
    reduced_bytes: float
    """Of a micro-batch's gradients."""
    gathered_bytes: float
    """Of the weights after the step."""
    collectives: float
    """Of a step with one micro-batch."""


def predict(
    costs: Costs,
    photos: int,
    accumulation: int,
    processes: int,
    *,
    slowdown: float,
    bytes_per_s: float,
    latency_s: float,
) -> float:
    """Seconds of a step under ZeRO-2 without overlap.

    Args:
        costs: Of its parts.
        photos: Of a micro-batch.
        accumulation: Micro-batches of a process.
        processes: W.
        slowdown: Of computing, where processes share cores.
        bytes_per_s: Of an all-reduce, as the tensor's bytes over its time; a gather moves half of that.
        latency_s: Of a collective.
    """
    compute_s = accumulation * (costs.fixed_s + photos * costs.photo_s) + costs.optimizer_s / processes
    if processes == 1:
        return slowdown * compute_s
    moved = accumulation * costs.reduced_bytes + costs.gathered_bytes / 2
    calls = costs.collectives * (1 + accumulation) / 2
    return slowdown * compute_s + moved / bytes_per_s + calls * latency_s


def calibrate(alone: dict[tuple[int, int], Measured], trained: int) -> Costs:
    """The parts of a step, from steps of one process with (photos, micro-batches) of three shapes."""
    one, two, wide = (alone[shape].step_s for shape in ((MICRO, 1), (MICRO, 2), (2 * MICRO, 1)))
    micro_s = two - one
    photo_s = max(0.0, (wide - one) / MICRO)
    return Costs(
        fixed_s=max(0.0, micro_s - MICRO * photo_s),
        photo_s=photo_s,
        optimizer_s=max(0.0, one - micro_s),
        reduced_bytes=alone[MICRO, 2].sent_bytes - alone[MICRO, 1].sent_bytes,
        gathered_bytes=FP32 * trained,
        collectives=alone[MICRO, 1].collectives,
    )


def scaling(quick: bool = False, out: Path | None = None, seed: int = 0, gpu_hour_usd: float = 3.0) -> Path:
    """Predict training on 1 to 512 GPUs, and check the model against 1, 2 and 4 processes here.

    Args:
        quick: One and two processes, and two rounds in the place of five.
        out: Folder for scaling.json; by default the committed results, or runs/benchmarks after a quick run.
        seed: Of the order of measuring.
        gpu_hour_usd: Price of one GPU for an hour.
    """
    here = CHECKED_QUICKLY if quick else CHECKED
    rows = (*checked(here, 2 if quick else 5, seed), *predicted(Assumptions(), gpu_hour_usd))
    say("assumed, not measured: " + ", ".join(f"{name} {value:g}" for name, value in vars(Assumptions()).items()))
    say(f"and: {NOT_COUNTED}")
    return publish(Report("scaling", machine(max(here)), versions(PACKAGES), seed, rows), out, quick)


def checked(processes_here: tuple[int, ...], rounds: int, seed: int) -> list[Row]:
    """Steps of processes here beside what the model says of them."""
    config = read_config(find_recipe("demo"))
    parameters = replace(count(config, scenes_tiny_config()), frozen=0)
    with tempfile.TemporaryDirectory(prefix="roadwork-scaling-") as place:
        recipe = Path(place) / "recipe.yaml"
        recipe.write_text(to_yaml(config))
        arms = {str(processes): _arm(recipe, processes) for processes in processes_here}
        found = interleave(arms, rounds, seed)
    cores, rows = len(os.sched_getaffinity(0)), []
    for processes in processes_here:
        accumulation = SHARE // (MICRO * processes)
        ours, theirs = [], []
        for alone, here in zip(found["1"], found[str(processes)], strict=True):
            measured = here[MICRO, accumulation]
            ours.append(measured.step_s)
            theirs.append(
                predict(
                    calibrate(alone, parameters.trained), MICRO, accumulation, processes,
                    slowdown=max(1.0, processes / cores),
                    bytes_per_s=measured.bytes_per_s, latency_s=measured.latency_s,
                )
            )  # fmt: skip
        these = f"{processes} process{'es' * (processes > 1)}"
        what = f"step of {SHARE} photos, {these} on {cores} cores"
        rows.append(compare(what, "the model", ours, theirs, "s", None, NOTES["step"]))
        held, _ = state_bytes(parameters, "fp32", Sharding(processes))
        last = found[str(processes)][-1][MICRO, accumulation]
        sizes = [last.state_bytes / 2**20] * 2, [held / 2**20] * 2  # exact, so twice the same
        rows.append(compare(f"state of one of {these}", "the model", *sizes, "MiB", None, NOTES["state"]))
    return rows


def _arm(recipe: Path, processes: int) -> Any:
    """Measures all shapes in one start of so many processes."""
    shapes = [(MICRO, SHARE // (MICRO * processes))]
    if processes == 1:
        shapes += [(MICRO, 1), (MICRO, 2), (2 * MICRO, 1)]

    def run() -> dict[tuple[int, int], Measured]:
        with tempfile.TemporaryDirectory() as place:
            answer = Path(place) / "measured.json"
            words = [str(recipe), json.dumps(shapes), str(answer)]
            subprocess.run(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                    "-m", "benchmarks.scaling_worker", *words,
                ],
                env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, capture_output=True, check=True,
            )  # fmt: skip
            found = [Measured(**values) for values in json.loads(answer.read_text())]
        return dict(zip(shapes, found, strict=True))

    return run


def predicted(assumed: Assumptions, gpu_hour_usd: float) -> list[Row]:
    """Photos per second on many GPUs, beside as many times those of one."""
    rows = []
    for recipe, photos in (("cached_30ep", 64), ("pretrain_30ep", 16)):
        config, backbone = read_config(find_recipe(recipe)), vith16plus_config()
        parameters, head = count(config, backbone), count_head(config)
        alone = need(config, backbone, "bf16", Sharding(1, bucket=BUCKET), photos)
        alone_s = gpu_step_s(config, parameters, head, photos, 1, assumed)
        for gpus in GPUS:
            step_s = gpu_step_s(config, parameters, head, photos, gpus, assumed)
            sharding = Sharding(gpus, expert_parallel=min(gpus, config.train.expert_parallel))
            gib = (alone.device - alone.states + state_bytes(parameters, "bf16", sharding)[0]) / 2**30
            epoch_s = PHOTOS / (photos * gpus) * step_s
            note = (
                f"predicted, not measured; {photos} photos per GPU, batch {photos * gpus}; step {1e3 * step_s:.1f} ms, "
                f"{gib:.1f} GiB per GPU, an epoch of {PHOTOS} photos {epoch_s:.2f} s and "
                f"${epoch_s / 3600 * gpus * gpu_hour_usd:.4f} at ${gpu_hour_usd:g} per GPU and hour"
            )
            rate, ideal = photos * gpus / step_s, photos * gpus / alone_s
            what = f"{recipe}, {gpus} GPU{'s' * (gpus > 1)}"
            rows.append(compare(what, f"{gpus} times one GPU", [rate] * 2, [ideal] * 2, "photos/s", None, note))
    return rows


@dataclass(frozen=True)
class HeadCount:
    """What the trained head does in a step that keeps all views, which is its most."""

    flops: float
    """Of one photo, forward and backward."""
    kernels: int
    """Of one micro-batch, whatever its size."""
    tokens: int
    """That one photo sends to the experts of each layer."""


def count_head(config: Config) -> HeadCount:
    """Run one photo of noise through the head, forward and backward, and count."""
    backbone = vith16plus_config()
    head, batch = build_head(config, backbone).train(), noise(config, backbone, 1)
    with FlopCounterMode(display=False) as counter:
        head(**batch, keep_all=True).loss.backward()
    with Kernels() as kernels:
        output = head(**batch, keep_all=True)
        output.loss.backward()
    return HeadCount(float(counter.get_total_flops()), sum(kernels.calls.values()), output.token_mask.shape[1])


def gpu_step_s(
    config: Config, parameters: Parameters, head: HeadCount, photos: int, gpus: int, assumed: Assumptions
) -> float:
    """Seconds of a step with one micro-batch on each of so many GPUs.

    A ring is as fast as its slowest link. Processes that share experts are neighbours in a node; each token goes to its
    experts and back, in the forward and in the backward pass.
    """
    inside = gpus <= assumed.gpu_per_node
    link = assumed.node_bytes_per_s if inside else assumed.fabric_bytes_per_s
    latency = assumed.node_latency_s if inside else assumed.fabric_latency_s
    crossings = max(2 * (gpus - 1) / gpus, 1e-9)  # of a link, by each byte of an all-reduce
    costs = gpu_costs(config, parameters, head, photos, gpus, assumed)
    model, size = config.model, min(gpus, config.train.expert_parallel)
    sent = head.tokens * model.experts_per_token * model.width * BF16 * (size - 1) / size
    exchanges = 4 * model.layers if size > 1 else 0
    exchange_s = exchanges * (photos * sent / assumed.node_bytes_per_s + assumed.node_latency_s)
    reduce_s = latency * math.log2(gpus)
    return exchange_s + predict(
        costs, photos, 1, gpus, slowdown=1.0, bytes_per_s=link / crossings, latency_s=reduce_s
    )  # fmt: skip


def gpu_costs(
    config: Config, parameters: Parameters, head: HeadCount, photos: int, gpus: int, assumed: Assumptions
) -> Costs:
    """The parts of a step on a GPU: operations, kernels and bytes at the speeds that are assumed."""
    share = 1 / config.train.distil_every if config.train.distil_every else 0.0
    views = share * config.model.num_views + (1 - share) * config.model.keep_views
    online = 0.0 if config.data.features else views * view_flops(config.model.view_side)
    head_s = head.flops / (assumed.head_mfu * assumed.matmul_flops)
    backbone_s = online / (assumed.backbone_mfu * assumed.matmul_flops)
    held = parameters.shared + parameters.experts / min(gpus, config.train.expert_parallel)
    moved = parameters.trained * (2 * BF16 + 5 * FP32)  # gradient and weight; master, moments and average
    return Costs(
        # Whichever is longer, launching the head's kernels or running them; the backbone's are long.
        fixed_s=max(0.0, head.kernels * assumed.launch_s - photos * head_s),
        photo_s=head_s + backbone_s,
        optimizer_s=moved / assumed.memory_bytes_per_s,
        reduced_bytes=BF16 * held,
        gathered_bytes=BF16 * held,
        collectives=2 * math.ceil(held / BUCKET) + 3,  # of buckets twice; of target counts, the norm and the agreement
    )


class Kernels(TorchDispatchMode):
    """Counts operations that compute something; views of tensors cost no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and go on."""
        if not function.is_view:
            self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


@cache
def view_flops(side: int) -> float:
    """FLOPs of one view through DINOv3 ViT-H/16+, counted on tensors without content."""
    with torch.device("meta"):
        model = AutoModel.from_config(vith16plus_config(), attn_implementation="sdpa").eval()
        view = torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=view)
    return float(counter.get_total_flops())


if __name__ == "__main__":
    raise SystemExit(command(scaling))
