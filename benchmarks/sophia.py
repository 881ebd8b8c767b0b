"""The cost of one of Sophia's estimates of the Hessian, and whether the form of the engine changes its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.form import Report, Row, compare, interleave, machine, publish, timed, versions
from benchmarks.loops import make_trainer
from benchmarks.parity import PACKAGES, matrix, measure
from benchmarks.parity_cells import SEED, Cell, photo
from benchmarks.processes import run_apart
from pipeline.cli import command
from pipeline.config import find_recipe, read_config
from pipeline.data.batch import collate
from pipeline.distributed.settings import find_deepspeed
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.config import OptimConfig
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
    found = run_apart(time_arms, 1, 3 if quick else ROUNDS)
    rows: tuple[Row, ...] = ()
    for name in OPTIMIZERS:
        what = f"an estimate of {name}, head of demo, {PHOTOS} cached photos, CPU"
        sides = found[f"{name} estimate"], found[f"{name} step"]
        rows += (compare(what, "an ordinary step", *sides, "core s", note=NOTE),)
    if not quick:
        rows += measure(forms())
    report = Report("sophia", machine(1 if quick else max(PROCESSES)), versions(PACKAGES), SEED, rows)
    return publish(report, out, quick)


def forms() -> list[Cell]:
    """Cells with every stage and placement of experts, on one process and, with accumulation, on two.

    `benchmarks.parity --optimizer NAME` has the whole matrix, up to four processes.
    """
    cells = [cell for name in OPTIMIZERS for cell in matrix(PROCESSES, name)]
    return [cell for cell in cells if cell.accumulation == cell.processes]


def time_arms(rounds: int) -> dict[str, list[float]]:
    """Seconds of a core for an estimate of each kind, and for a step of the same photos."""
    arms = {f"{name} {what}": arm for name in OPTIMIZERS for what, arm in make_arms(name).items()}
    for arm in arms.values():
        arm()
    return interleave(arms, rounds, SEED)


def make_arms(name: str) -> dict[str, Callable[[], float]]:
    """Functions that time a step and an estimate, on an engine of their own."""
    config = read_config(find_recipe("demo"))
    config.model.pruning, config.optim = "off", OptimConfig(name=name)
    config.train.batch_size = config.train.micro_batch_size = PHOTOS
    torch.manual_seed(SEED)
    model = RoadworkModel.build(config.model, config.loss)
    trainer = make_trainer(config, model, find_deepspeed("ds_configs/zero1.json"), Schedule(PHOTOS, 100, frozenset()))
    photos = [collate([photo(row, model.config.backbone_dim, config.model) for row in range(PHOTOS)])]
    counts, _, _ = trainer._agree(photos, None)

    def step() -> float:
        trainer.state.step = 1  # on which no estimate is due
        return timed(lambda: trainer._take_step(photos, counts)).core_s

    def estimate() -> float:
        return timed(lambda: trainer.hessian.take(0, photos, counts, keep_all=True)).core_s

    return {"step": step, "estimate": estimate}


if __name__ == "__main__":
    raise SystemExit(command(sophia))
