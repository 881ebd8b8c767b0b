"""The study's page: verdicts first, then arms, learning, and what it all rests on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.answers import ArmAnswers, Bootstrap, worst_place
from benchmarks.study.arms import COMPLETE
from benchmarks.study.claims import POINTS, Finding
from benchmarks.study.config import StudyConfig
from benchmarks.study.folds import NOWHERE, Places
from benchmarks.study.photos import Photos
from benchmarks.study.plots import forest, loss_curves
from pipeline.evaluation.report import templates
from pipeline.files import write_text


def write_page(
    path: Path,
    config: StudyConfig,
    photos: Photos,
    places: Places,
    answers: Mapping[str, ArmAnswers],
    findings: Sequence[Finding],
    bootstrap: Bootstrap,
    about: dict[str, Any],
) -> None:
    """Write the page.

    Args:
        path: Where it lies.
        config: The recipe.
        photos: All of them.
        places: Where they were taken.
        answers: By arm.
        findings: The claims, judged.
        bootstrap: The study's.
        about: `quick`, `units`, `versions`, and `lost`, the arms that have no answers.
    """
    rows = [describe(arm, bootstrap, places) for arm in answers.values()]
    complete = answers[COMPLETE]
    others = [arm for name, arm in answers.items() if name != COMPLETE]
    differences = [(arm.arm.title, bootstrap.compare(arm, complete).difference.scaled(POINTS)) for arm in others]
    trained = [arm for arm in answers.values() if arm.arm.name == COMPLETE or arm.arm.group in ("heads", "optimizers")]
    text = (
        templates(Path(__file__).parent)
        .get_template("page.html")
        .render(
            name=config.name,
            data=photos.data,
            plan=config.plan,
            arms=rows,
            findings=findings,
            forest=forest([(row["title"], row["mcc"]) for row in rows], "MCC", "MCC, 95 %", None),
            differences=forest(differences, "Against the complete model", "points of MCC, 95 %", 0.0)
            if differences
            else "",
            curves=loss_curves(trained),
            labelled=int((places.blocks != NOWHERE).sum()),
            left_out=int((places.blocks == NOWHERE).sum()),
            places=int(places.blocks.max()) + 1,
            rule=places.rule,
            leaks=photos.leaks,
            lost=about["lost"],
            quick=about["quick"],
            units=about["units"],
            versions=json.dumps(about["versions"], indent=2),
        )
    )
    write_text(path, text)


def describe(arm: ArmAnswers, bootstrap: Bootstrap, places: Places) -> dict[str, Any]:
    """An arm's line of the table."""
    worst = worst_place(arm, places.blocks)
    return {
        "title": arm.arm.title,
        "about": arm.arm.about,
        "mcc": bootstrap.mcc(arm),
        "worst": None if worst is None else worst[1],
        "auroc": arm.auroc,
        "ece": arm.ece,
        "n": int(np.count_nonzero(arm.tested)),
        "lrs": ", ".join(f"{lr:g}: {count}" for lr, count in sorted(Counter(arm.lrs).items())),
        "parameters": arm.parameters,
        "wall_s": arm.wall_s,
    }
