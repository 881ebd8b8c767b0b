"""The study's page: verdicts first, then arms, learning, photos and folds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.study.answers import ArmAnswers, Bootstrap, worst_place
from benchmarks.study.arms import COMPLETE
from benchmarks.study.claims import POINTS, Finding
from benchmarks.study.folds import NOWHERE, Places
from benchmarks.study.plots import forest, loss_curves
from pipeline.evaluation.report import templates
from pipeline.files import write_text

if TYPE_CHECKING:
    from benchmarks.study.command import Done


def write_page(path: Path, done: Done, findings: Sequence[Finding], quick: bool, versions: dict[str, str]) -> None:
    """Write the page.

    Args:
        path: Path of the page.
        done: The study.
        findings: The judged claims.
        quick: Whether the figures are rough.
        versions: The packages' versions.
    """
    answers, places, bootstrap = done.answers, done.places, done.bootstrap
    rows = [describe(arm, bootstrap, places) for arm in answers.values()]
    complete = answers[COMPLETE]
    others = [arm for name, arm in answers.items() if name != COMPLETE]
    differences = [(arm.arm.title, bootstrap.compare(arm, complete).difference.scaled(POINTS)) for arm in others]
    trained = [arm for arm in answers.values() if arm.arm.name == COMPLETE or arm.arm.group in ("heads", "optimizers")]
    title, label = "Against the complete model", "points of MCC, 95 %"
    text = templates(Path(__file__).parent).get_template("page.html").render(
        name=done.config.name, data=done.photos.data, plan=done.config.plan, arms=rows, findings=findings,
        forest=forest([(row["title"], row["mcc"]) for row in rows], "MCC", "MCC, 95 %", None),
        differences=forest(differences, title, label, 0.0) if differences else "",
        curves=loss_curves(trained),
        labelled=int((places.blocks != NOWHERE).sum()), left_out=int((places.blocks == NOWHERE).sum()),
        places=int(places.blocks.max()) + 1, rule=places.rule, leaks=done.photos.leaks, lost=done.lost,
        quick=quick, units=done.units, versions=json.dumps(versions, indent=2),
    )  # fmt: skip
    write_text(path, text)


def describe(arm: ArmAnswers, bootstrap: Bootstrap, places: Places) -> dict[str, Any]:
    """An arm's line of the table."""
    worst = worst_place(arm, places.blocks)
    return {
        **{name: getattr(arm.arm, name) for name in ("title", "about")},
        **{name: getattr(arm, name) for name in ("auroc", "ece", "parameters", "wall_s")},
        "mcc": bootstrap.mcc(arm),
        "worst": None if worst is None else worst[1],
        "n": int(np.count_nonzero(arm.tested)),
        "lrs": ", ".join(f"{lr:g}: {count}" for lr, count in sorted(Counter(arm.lrs).items())),
    }
