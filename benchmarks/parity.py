"""Whether ZeRO stage, sharded experts, processes and accumulation change what is computed: the whole matrix.

Nothing here is timed. A row compares the loss after the last step with that of a bare PyTorch loop of one process; its
note says how far any loss, any of its terms and the gradient's norm are from it in any step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.form import Report, Row, machine, publish, versions
from benchmarks.parity_cells import BATCH, EXPERTS, SEED, STEPS, Cell, Curve, bare_loop, run
from pipeline.cli import command
from pipeline.progress import say, track

PACKAGES = ("torch", "deepspeed", "accelerate", "transformers")
BOUND = 1e-5
PROCESSES = (1, 2, 4)


def parity(quick: bool = False, out: Path | None = None) -> Path:
    """Compare every form of the engine with a bare loop: ZeRO 0 to 3, experts whole or shared, accumulation.

    Args:
        quick: One and two processes only, in a minute and a half.
        out: Folder for parity.json; benchmarks/results if not given, or runs/benchmarks with --quick.
    """
    cells = list(matrix(PROCESSES[:2] if quick else PROCESSES))
    rows = measure(cells)
    report = Report("parity", machine(max(cell.processes for cell in cells)), versions(PACKAGES), SEED, rows)
    say(f"{sum(bool(row.met) for row in rows)} of {len(rows)} forms are within {BOUND:g} of a bare loop")
    return publish(report, out, quick)


def matrix(processes: tuple[int, ...]) -> Iterator[Cell]:
    """Every combination that DeepSpeed can do, by number of processes."""
    for count in processes:
        for stage in (0, 1, 2, 3):
            for sharding in (size for size in (1, 2, 4) if count % size == 0):
                for accumulation in (1, 2):
                    # Refused with clipping: DeepSpeed's norm is another one there.
                    yield Cell(stage, sharding, count, accumulation, clip=not (stage == 0 and sharding > 1))


def measure(cells: list[Cell]) -> tuple[Row, ...]:
    """A row for each cell; all cells of a world size share one start of processes."""
    bare = {clip: bare_loop(Cell(0, 1, 1, clip=clip)) for clip in {cell.clip for cell in cells}}
    curves: dict[Cell, Curve] = {}
    counts = sorted({cell.processes for cell in cells})
    for count in track(counts, len(counts), "running", unit="world sizes"):
        group = [cell for cell in cells if cell.processes == count]
        curves |= dict(zip(group, run(group), strict=True))
    return tuple(row(cell, curves[cell], bare[cell.clip]) for cell in cells)


def row(cell: Cell, curve: Curve, bare: Curve) -> Row:
    """What a cell's curve says beside the bare loop's."""
    ours, theirs = (float(found.losses[-1, 0]) for found in (curve, bare))
    difference = curve.difference(bare)
    return Row(
        what=str(cell),
        against="bare loop, one process",
        ours=ours,
        theirs=theirs,
        unit=f"loss, step {STEPS}",
        ratio=ours / theirs,
        interval=(1 - difference, 1 + difference),
        goal=f"1 +- {BOUND:g}",
        met=difference <= BOUND,
        note=f"{'' if cell.clip else 'without clipping; '}the interval is the largest relative difference of any loss, "
        f"term or gradient norm in {STEPS} steps of {BATCH} photos with {EXPERTS} experts: {difference:.1e}",
    )


if __name__ == "__main__":
    raise SystemExit(command(parity))
