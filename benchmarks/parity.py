"""Checks whether ZeRO stage, sharded experts, processes and accumulation change what is computed: the whole matrix.

Nothing here is timed, and nothing is measured twice: the engine gives the same digits every time. A row says how far
the losses of all steps are from those of a bare PyTorch loop of one process, as a share of what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.form import Goal, Report, Row, exact, machine, publish, versions
from benchmarks.parity_cells import BATCH, EXPERTS, SEED, STEPS, Cell, Curve, bare_loop, run
from pipeline.cli import command
from pipeline.errors import require
from pipeline.optim.config import OPTIMIZERS
from pipeline.progress import say, track

PACKAGES = ("torch", "deepspeed", "accelerate", "transformers")
BOUND = 1e-5
SINGLE_BOUND = 1e-4  # of the curvature of parameters that are one number, see `Curve.hessian_difference`
ONE_NUMBER = "the biases that are one number, which may differ by 1e-4"
GOAL = Goal(1, at_most=True)
PROCESSES = (1, 2, 4)


def parity(quick: bool = False, out: Path | None = None, optimizer: str = "adamw") -> Path:
    """Compare every form of the engine with a bare loop: ZeRO 0 to 3, experts whole or shared, accumulation.

    Args:
        quick: One and two processes only, in a minute and a half.
        out: Folder for parity.json; benchmarks/results if not given, or runs/benchmarks with --quick or Sophia, whose
            committed results are those of `benchmarks.sophia`.
        optimizer: `adamw`, `sophia_h` or `sophia_g`.
    """
    require(optimizer in OPTIMIZERS, "optimizer", optimizer, f"one of {', '.join(OPTIMIZERS)}")
    cells = list(matrix(PROCESSES[:2] if quick else PROCESSES, optimizer))
    rows = measure(cells)
    report = Report("parity", machine(max(cell.processes for cell in cells)), versions(PACKAGES), SEED, rows)
    say(f"{sum(bool(row.met) for row in rows)} of {len(rows)} forms are within {BOUND:g} of a bare loop")
    return publish(report, out, quick or optimizer != "adamw")


def matrix(processes: tuple[int, ...], optimizer: str = "adamw") -> Iterator[Cell]:
    """Every combination that DeepSpeed and the optimizer can do, by number of processes."""
    for count in processes:
        for stage in (0, 1, 2) if optimizer == "sophia_h" else (0, 1, 2, 3):
            for sharding in (size for size in (1, 2, 4) if count % size == 0):
                for accumulation in (1, 2):
                    # With clipping this is refused, since DeepSpeed would use another norm.
                    clip = not (stage == 0 and sharding > 1)
                    yield Cell(stage, sharding, count, accumulation, clip=clip, optimizer=optimizer)


def measure(cells: list[Cell]) -> tuple[Row, ...]:
    """A row for each cell; all cells of a world size share one start of processes."""
    kinds = {(cell.clip, cell.optimizer) for cell in cells}
    bare = {kind: bare_loop(Cell(0, 1, 1, clip=kind[0], optimizer=kind[1])) for kind in kinds}
    curves: dict[Cell, Curve] = {}
    counts = sorted({cell.processes for cell in cells})
    for count in track(counts, len(counts), "running", unit="world sizes"):
        group = [cell for cell in cells if cell.processes == count]
        curves |= dict(zip(group, run(group), strict=True))
    return tuple(row(cell, curves[cell], bare[cell.clip, cell.optimizer]) for cell in cells)


def row(cell: Cell, curve: Curve, bare: Curve) -> Row:
    """How far a cell's curve is from the bare loop's, as a share of what is allowed."""
    difference = curve.difference(bare)
    compared = "loss, term or gradient norm"
    if cell.optimizer != "adamw":
        single = curve.hessian_difference(bare, single=True) * BOUND / SINGLE_BOUND
        difference = max(difference, curve.hessian_difference(bare, single=False), single)
        compared += f", and of the first estimate of the Hessian's diagonal (a tenth of that in {ONE_NUMBER})"
    note = (
        f"the largest difference of any {compared} in {STEPS} steps of {BATCH} photos with {EXPERTS} experts, "
        f"{'clipped' if cell.clip else 'without clipping (ZeRO-0 with shared experts)'}; theirs is what is allowed"
    )
    return exact(str(cell), "bare loop, one process", difference, BOUND, "relative difference", GOAL, note)


if __name__ == "__main__":
    raise SystemExit(command(parity))
