"""The drawings of a study's page, in the report's style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.study.answers import ArmAnswers
from pipeline.evaluation.place_bootstrap import Estimate
from pipeline.evaluation.report.plots import INK, NONE, ROADWORK, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, ROW, MARGIN = 7.4, 0.27, 0.9  # inches
UNDECIDED = "#9aa3ae"
COLOURS = (ROADWORK, NONE, "#5a9367", "#8c6bb1", "#b08a2e", "#4f5d73")


def forest(rows: Sequence[tuple[str, Estimate]], title: str, label: str, reference: float | None) -> str:
    """Estimates with their intervals, one below the other.

    Args:
        rows: Names and estimates, the topmost first.
        title: Above the drawing.
        label: Along the axis.
        reference: Position of a line; estimates whose whole interval lies beyond it are coloured. None draws no line.
    """

    def draw(axes: Axes) -> None:
        names = [name for name, _ in rows]
        for place, (_, found) in enumerate(rows):
            colour = INK if reference is None else side(found, reference)
            axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot(found.value, place, "o", color=colour, markersize=5)
        if reference is not None:
            axes.axvline(reference, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.set(title=title, xlabel=label)
        axes.grid(axis="y", visible=False)

    return svg(draw, title, (WIDTH, MARGIN + ROW * len(rows)))


def side(found: Estimate, reference: float) -> str:
    """Colour of an estimate that is above a reference, below it, or neither for sure."""
    if found.low > reference:
        return ROADWORK
    return NONE if found.high < reference else UNDECIDED


def loss_curves(arms: Sequence[ArmAnswers]) -> str:
    """Validation loss over the steps, mean over folds and seeds, of several arms."""

    def draw(axes: Axes) -> None:
        for arm, colour in zip(arms, COLOURS, strict=False):
            mean = np.mean(arm.curves, axis=0)
            axes.plot(*mean.T, color=colour, linewidth=1.6, marker="o", markersize=3, label=arm.arm.title)
        axes.set(title="Validation loss, metadata NULL", xlabel="step", ylabel="focal loss")
        axes.locator_params(axis="x", integer=True)
        axes.legend(loc="best", fontsize=9)

    return svg(draw, "validation loss", (WIDTH, 3.6))
