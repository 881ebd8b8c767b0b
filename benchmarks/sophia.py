"""What one of Sophia's estimates of the Hessian costs, and whether the form of the engine changes what it computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from benchmarks.form import Report, Row, compare, interleave, machine, publish, timed, versions
from benchmarks.parity import PACKAGES, matrix, measure
from benchmarks.parity_cells import SEED, Cell, photo
from pipeline.cli import command
from pipeline.config import Config, find_recipe, read_config
from pipeline.data.batch import collate
from pipeline.distributed import start
from pipeline.distributed.settings import Batching
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.config import OptimConfig
from pipeline.progress import silence_libraries
from pipeline.trainer import Trainer
from pipeline.training.plan import Schedule

OPTIMIZERS = ("sophia_h", "sophia_g")
PROCESSES = (1, 2)
PHOTOS = 8  # of a step
ROUNDS = 8
NOTE = (
    "ZeRO-1, fp32, one process, one thread, whose time on a core is counted; all views kept, in both; an estimate is "
    f"due every optim.hessian_every steps, {OptimConfig().hessian_every} by default"
)


def sophia(quick: bool = False, out: Path | None = None) -> Path:
    """Time an estimate beside an ordinary step, and compare forms of the engine with a bare loop.

    Args:
        quick: Three rounds, and no comparison; `benchmarks.parity --optimizer NAME --quick` has a short one.
        out: Folder for sophia.json; benchmarks/results if not given, or runs/benchmarks with --quick.
    """
    rows = cost(3 if quick else ROUNDS)
    if not quick:
        rows += measure(forms())
    report = Report("sophia", machine(1 if quick else max(PROCESSES)), versions(PACKAGES), SEED, rows)
    return publish(report, out, quick)


def forms() -> list[Cell]:
    """Every stage and placement of experts, on one process and, with accumulation, on two.

    `benchmarks.parity --optimizer NAME` has the whole matrix, up to four processes.
    """
    cells = [cell for name in OPTIMIZERS for cell in matrix(PROCESSES, name)]
    return [cell for cell in cells if cell.accumulation == cell.processes]


def cost(rounds: int) -> tuple[Row, ...]:
    """An estimate of each kind beside a step of the same photos, in one process on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    silence_libraries()
    arms: dict[str, Callable[[], float]] = {}
    for name in OPTIMIZERS:
        arms |= {f"{name} {what}": arm for what, arm in make_arms(name).items()}
    for arm in arms.values():
        arm()
    found = interleave(arms, rounds, SEED)
    dist.destroy_process_group()
    torch.set_num_threads(threads)
    return tuple(
        compare(
            f"an estimate of {name}, head of demo, {PHOTOS} cached photos, CPU",
            "an ordinary step",
            found[f"{name} estimate"],
            found[f"{name} step"],
            "core s",
            note=NOTE,
        )
        for name in OPTIMIZERS
    )


def make_arms(name: str) -> dict[str, Callable[[], float]]:
    """Seconds of a core for a step, and for an estimate, on an engine of its own."""
    config = read_config(find_recipe("demo"))
    config.model.pruning, config.optim = "off", OptimConfig(name=name)
    trainer = make_trainer(config)
    sizes, dim = trainer.model.config.sizes, trainer.model.config.backbone_dim
    photos = [collate([photo(row, dim, sizes) for row in range(PHOTOS)])]
    counts, _, _ = trainer._agree(photos, None)

    def step() -> float:
        trainer.step = 1  # on which no estimate is due
        return timed(lambda: trainer._take_step(photos, counts)).core_s

    def estimate() -> float:
        return timed(lambda: trainer.hessian.take(0, photos, counts, keep_all=True)).core_s

    return {"step": step, "estimate": estimate}


def make_trainer(config: Config) -> Trainer:
    """A trainer in this process alone, without data."""
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = "ds_configs/zero1.json"
    AcceleratorState._reset_state()  # that of the optimizer before; the process group stays
    accelerator = start(
        batch_size=PHOTOS, accumulation=1, grad_clip=config.optim.grad_clip, precision="fp32", log_with=[],
        hang_minutes=10, optimizer=config.optim.name,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = RoadworkModel.build(config.model)
    model.loss_config = config.loss
    batching, schedule = Batching(PHOTOS, PHOTOS, 1), Schedule(PHOTOS, 100, frozenset())
    nothing: Any = None
    return Trainer(config, accelerator, model, nothing, None, batching, schedule, None)


if __name__ == "__main__":
    raise SystemExit(command(sophia))
