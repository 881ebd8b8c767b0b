"""The claims about the model, and the study's verdicts on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.form import Row, judged, ratio_interval
from benchmarks.study.answers import ArmAnswers, Bootstrap
from benchmarks.study.arms import COMPLETE
from pipeline.evaluation.place_bootstrap import Estimate

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
MISSION, PROJECT = "the project's mission", "this project"
POINTS = 100.0


@dataclass(frozen=True)
class Claim:
    """A claim that an MCC, or a difference of MCCs, is above a bound."""

    text: str
    source: str
    """Who makes the claim."""
    ours: str
    """Name of the arm that the claim is about."""
    theirs: str = ""
    """The arm to compare with; if empty, the claim is about the MCC itself."""
    bound: float = 0.0
    """Bound on the difference of the MCCs, or on the MCC itself."""


CLAIMS = (
    Claim("The complete model has an MCC above 0.94", MISSION, COMPLETE, bound=0.94),
    Claim("The complete model beats a single view with a linear classifier", PROJECT, COMPLETE, "single_view"),
    Claim("The complete model beats mean pooling with an MLP", PROJECT, COMPLETE, "mean_pool"),
    Claim("The complete model beats attention MIL", PROJECT, COMPLETE, "attention_mil"),
    Claim("The complete model beats cell MIL", PROJECT, COMPLETE, "cell_mil"),
    Claim("Cell evidence helps", PROJECT, COMPLETE, "no_evidence"),
    Claim("Scoring views is better than taking random ones", PROJECT, COMPLETE, "random_views"),
    Claim("Pruning views costs less than one point", PROJECT, COMPLETE, "all_views", -0.01),
    Claim("The pyramid helps", MISSION, COMPLETE, "no_pyramid"),
    Claim("The gate after the attention helps", MISSION, COMPLETE, "no_gate"),
    Claim("Experts are better than a dense layer of the same active width", MISSION, COMPLETE, "dense"),
    Claim("Gated fusion is better than the mean", MISSION, COMPLETE, "mean_fusion"),
    Claim("The consistency loss helps", MISSION, COMPLETE, "no_consistency"),
    Claim("The segmentation loss helps", MISSION, COMPLETE, "no_segmentation"),
    Claim("The weather loss helps", MISSION, COMPLETE, "no_weather"),
    Claim("The focal loss is better than cross-entropy", MISSION, COMPLETE, "cross_entropy"),
    Claim("GPS-weighted sampling gains seven points or more", MISSION, COMPLETE, "uniform", 0.07),
    Claim("GPS-weighted sampling is better than uniform sampling", MISSION, COMPLETE, "uniform"),
    Claim("GPS-weighted sampling is better than class balance alone", PROJECT, COMPLETE, "class_balanced"),
    Claim("It is the right weights on the right clusters that help", PROJECT, COMPLETE, "gps_permuted"),
    Claim("It is the places of the clusters that help", PROJECT, COMPLETE, "random_clusters"),
    Claim("Metadata at the test helps", PROJECT, "metadata_given", COMPLETE),
    Claim("Learning with metadata helps where the test has none", PROJECT, COMPLETE, "no_metadata"),
    Claim("A random split flatters the model", PROJECT, "seen_places", COMPLETE),
    Claim("More photos would help: half of them are worse", PROJECT, COMPLETE, "half_data"),
)


@dataclass(frozen=True)
class Finding:
    """A claim, judged."""

    claim: Claim
    verdict: str
    numbers: str
    """What was found, in words."""
    row: Row


def verdict(low: float, high: float, bound: float) -> str:
    """Supported if a whole interval is above the bound, refuted if all of it is below, else undecided."""
    if low > bound:
        return SUPPORTED
    return REFUTED if high < bound else UNDECIDED


def judge(answers: Mapping[str, ArmAnswers], bootstrap: Bootstrap, about: str) -> list[Finding]:
    """Judge all claims whose arms were trained, in the order of `CLAIMS`; those about optimizers come last.

    Args:
        answers: Answers by the arm's name.
        bootstrap: The study's bootstrap.
        about: What all rows share, for their notes.
    """
    asked = [claim for claim in CLAIMS if {claim.ours, claim.theirs or claim.ours} <= answers.keys()]
    found = [judge_mcc(claim, answers, bootstrap, about) for claim in asked]
    for name, theirs in answers.items():
        if theirs.arm.optimizer != "adamw":
            claim = Claim(f"{name} is better than AdamW", MISSION, name, COMPLETE)
            found += [judge_mcc(claim, answers, bootstrap, about), judge_steps(theirs, answers[COMPLETE])]
    return found


def judge_mcc(claim: Claim, answers: Mapping[str, ArmAnswers], bootstrap: Bootstrap, about: str) -> Finding:
    """A claim about an MCC, or about the difference of two on the same photos."""
    ours = answers[claim.ours]
    if not claim.theirs:
        mcc = bootstrap.mcc(ours)
        ratio = mcc.scaled(1 / claim.bound)
        judged, other, title = mcc, claim.bound, f"an MCC of {claim.bound:g}"
        numbers = f"MCC {mcc}"
        mine, goal = mcc.value, f"> {POINTS * claim.bound:g}"
    else:
        theirs = answers[claim.theirs]
        compared = bootstrap.compare(ours, theirs)
        judged, ratio, other, title = compared.difference, compared.ratio, compared.theirs, theirs.arm.title
        points = judged.scaled(POINTS)
        numbers = (
            f"{ours.arm.title} {compared.ours:.3f}, {title} {compared.theirs:.3f}: {points.value:+.1f} points of MCC "
            f"({points.low:+.1f} to {points.high:+.1f})"
        )
        mine, goal = compared.ours, f"difference > {POINTS * claim.bound:g}"
    found = verdict(judged.low, judged.high, claim.bound)
    sides = mine * POINTS, other * POINTS
    row = _row(f"{claim.text}: {found}", title, sides, "points of MCC", ratio, goal, found, f"{numbers}; {about}")
    return Finding(claim, found, numbers, row)


def judge_steps(ours: ArmAnswers, adamw: ArmAnswers) -> Finding:
    """Whether an optimizer needs fewer steps to AdamW's final validation loss, training by training.

    The loss is the term `roadwork` on validation photos, interpolated between validations. A training that never
    reaches the loss counts as if it needed one validation more than it had, which is too few; so if there is such a
    training, the claim is not supported, whatever the others do.
    """
    pairs = zip(ours.curves, adamw.curves, strict=True)
    steps = np.array([[steps_to(curve, theirs[-1, 1]) for curve in (mine, theirs)] for mine, theirs in pairs])
    never = int((steps[:, 0] > ours.curves[0, -1, 0]).sum())
    middle, ends = ratio_interval(steps[:, 0].tolist(), steps[:, 1].tolist())
    ratio = Estimate(middle, *ends)
    found = verdict(1 - ratio.high, 1 - ratio.low, 0.0)
    found = UNDECIDED if never and found == SUPPORTED else found
    name = ours.arm.title
    text = f"{name} needs fewer steps than AdamW to AdamW's final validation loss"
    claim = Claim(text, MISSION, ours.arm.name, COMPLETE)
    numbers = f"{ratio} times AdamW's steps; {never} of {len(steps)} trainings did not get there in as many steps"
    means = (float(steps[:, 0].mean()), float(steps[:, 1].mean()))
    note = f"{numbers}; interval by Student's t over trainings, on the same validation photos: no place is drawn"
    row = _row(f"{claim.text}: {found}", "AdamW", means, "steps", ratio, "< 1", found, note)
    return Finding(claim, found, numbers, row)


def steps_to(curve: np.ndarray, loss: float) -> float:
    """Steps after which a curve [validations, 2] first reaches a loss; one validation beyond its end if never."""
    reached = np.flatnonzero(curve[:, 1] <= loss)
    if not len(reached):
        return float(curve[-1, 0] + curve[0, 0])
    at = int(reached[0])
    if at == 0:
        return float(curve[0, 0])
    (before, high), (after, low) = curve[at - 1], curve[at]
    return float(before + (after - before) * (high - loss) / (high - low))


def _row(
    what: str, against: str, sides: tuple[float, float], unit: str, ratio: Estimate, goal: str, found: str, note: str
) -> Row:
    row = judged(what, against, sides, unit, ratio.value, (ratio.low, ratio.high), None, note)
    return replace(row, goal=goal, met=found == SUPPORTED)
