"""View pruning on procedural scenes: MCC against the share of the backbone's FLOPs, counted and timed.

A study (`benchmarks/study`, recipe `pruning`) trains heads on `scenes-tiny` to answer from any number of views. The
heads then answer from the views that the pruner scores best, from random views, from the same views for every photo,
and from those that matter most among all twelve; and in the mode `dynamic`, whose rule is fitted on the fold's
validation part. The cost of pruning is the difference to all twelve views on the same photos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import form
from benchmarks.form import Goal, Row, compare, exact, interleave, judged, one_core, timed
from benchmarks.study.answers import ArmAnswers
from benchmarks.study.arms import COMPLETE
from benchmarks.study.claims import POINTS
from benchmarks.study.command import Done, run_study
from benchmarks.study.config import StudyConfig, read_recipe
from benchmarks.study.folds import make_fold
from benchmarks.study.views import KEPT, MAX_LOSSES, POLICIES, STATED_LOSS, dynamic_name, policy_name
from benchmarks.study.work import read_outcome
from data_prep.scenes import SceneConfig, render
from pipeline.cli import command
from pipeline.data.batch import Batch, collate
from pipeline.data.dataset import prepare_image
from pipeline.evaluation.inference import load_model
from pipeline.evaluation.metrics import confusion_counts
from pipeline.model.roadwork import RoadworkModel
from pipeline.names import NUM_VIEWS

PACKAGES = ("torch", "transformers")
TWELVE = "all 12 views, same head"
MOST_LOSS, MOST_LOSS_BOUND = 0.2, 1.0  # points of MCC: the mean, and the upper end of its interval
MOST_FLOPS = Goal(0.41, at_most=True)


@dataclass(frozen=True)
class Plan:
    """How much is timed."""

    photos: int
    """Photos in one batch."""
    rounds: int


FULL, QUICK = Plan(photos=32, rounds=7), Plan(photos=8, rounds=3)


def pruning(quick: bool = False, out: Path | None = None, seed: int = 0) -> Path:
    """Measure what view pruning saves and what it costs, for every way to choose the views.

    If it is interrupted, the same command resumes: the study is in runs/pruning.

    Args:
        quick: Fewer photos, steps and heads, in 90 seconds on two cores; heads are then poor and intervals wide.
        out: Folder for pruning.json; benchmarks/results if not given, or runs/benchmarks with --quick.
        seed: Seed of the bootstrap and of the order of measuring.
    """
    config = read_recipe("pruning")
    config = config.quick(config.plan.arms) if quick else config
    rows = measure(config, Path("runs") / ("pruning-quick" if quick else "pruning"), QUICK if quick else FULL, seed)
    report = form.Report("pruning", form.machine(), form.versions(PACKAGES), seed, rows)
    return form.publish(report, out, quick)


def measure(config: StudyConfig, folder: Path, plan: Plan, seed: int) -> tuple[Row, ...]:
    """All rows of the benchmark."""
    done = run_study(config, folder.resolve(), None, None, 0, seed)
    first = done.work.of_arm[COMPLETE][0][0][0]
    model = load_model(done.results / first.name, torch.device("cpu"))
    with one_core():
        spent = spending_rows(model, config, plan, seed)
    asked = read_views(done)
    return (*dynamic_rows(done, asked), *spent, *policy_rows(done, asked))


@dataclass(frozen=True)
class Asked:
    """The answers of the heads in one of the ways of `ask_views`."""

    answers: ArmAnswers
    views: np.ndarray
    """Number of views that each answer rests on, [seeds, photos]."""


def read_views(done: Done) -> dict[str, Asked]:
    """The answers of the arm `complete` in every way, by the way's name in `ask_views`."""
    complete, labels = done.answers[COMPLETE], done.photos.labels
    asked: dict[str, Asked] = {}
    for fold in done.work.of_arm[COMPLETE]:
        for number, (training,) in enumerate(fold):
            rows = make_fold(done.photos, training.parts, training.fold).test
            for name, says in read_outcome(done.results, training)["views"].items():
                if name not in asked:
                    answers = replace(complete, outcomes=np.zeros_like(complete.outcomes))
                    asked[name] = Asked(answers, np.zeros(complete.outcomes.shape[:2]))
                found = confusion_counts(labels[rows], np.array(says["roadwork"]), 0.5)
                asked[name].answers.outcomes[number, rows] = found
                asked[name].views[number, rows] = says["views"]
    return asked


def dynamic_rows(done: Done, asked: dict[str, Asked]) -> list[Row]:
    """Rows for the mode `dynamic` at every stated loss: share of FLOPs, and MCC."""
    rows, twelve = [], asked[policy_name("scored", max(KEPT))].answers
    for max_loss in MAX_LOSSES:
        name, is_stated = dynamic_name(max_loss), max_loss == STATED_LOSS
        ours = asked[name]
        share = done.bootstrap.mean(ours.views / NUM_VIEWS, ours.answers.tested)
        row = judged(
            f"backbone FLOPs: {name}", TWELVE, (share.value * NUM_VIEWS, NUM_VIEWS), "views per photo", share.value,
            (share.low, share.high), MOST_FLOPS if is_stated else None, done.about,
        )  # fmt: skip
        what = f"MCC at {share.value:.0%} of the FLOPs: {name}"
        rows += [row, mcc_row(done, what, TWELVE, ours.answers, twelve, with_loss=is_stated)]
        if is_stated:
            rows.append(mcc_row(done, what, "a head trained on all 12", ours.answers, done.answers["all_views"]))
    return rows


def policy_rows(done: Done, asked: dict[str, Asked]) -> list[Row]:
    """Rows for every way to choose views, at every number of views below twelve."""
    twelve = asked[policy_name("scored", max(KEPT))].answers
    names = {policy_name(policy, keep): keep for keep in KEPT[:-1] for policy in POLICIES}
    return [
        mcc_row(done, f"MCC at {keep / NUM_VIEWS:.0%} of the FLOPs: {name}", TWELVE, asked[name].answers, twelve)
        for name, keep in names.items()
    ]


def mcc_row(done: Done, what: str, against: str, ours: ArmAnswers, theirs: ArmAnswers, with_loss: bool = False) -> Row:
    """A row of the MCC of both sides on the same photos; `with_loss` adds the loss, which the goal is about."""
    found = done.bootstrap.compare(ours, theirs)
    sides, interval = (POINTS * found.ours, POINTS * found.theirs), (found.ratio.low, found.ratio.high)
    row = judged(what, against, sides, "points of MCC", found.ratio.value, interval, None, done.about)
    if not with_loss:
        return row
    loss, high, low = vars(found.difference.scaled(-POINTS)).values()  # the ends change places with the sign
    goal, met = f"loss <= {MOST_LOSS}, bound <= {MOST_LOSS_BOUND}", loss <= MOST_LOSS and high <= MOST_LOSS_BOUND
    note = f"loss of {loss:z.2f} points ({low:z.2f} to {high:z.2f}); {row.note}"
    return replace(row, goal=goal, met=met, note=note)


def spending_rows(model: RoadworkModel, config: StudyConfig, plan: Plan, seed: int) -> list[Row]:
    """Rows of the backbone's counted FLOPs and the whole model's time, at K=8 and `dynamic`, against all views."""
    drawn = SceneConfig(difficulty=config.scenes["difficulty"], seed=config.scenes["seed"] + 1)
    images = [render(drawn, number).image.copy() for number in range(plan.photos)]
    photos = collate([prepare_image(image, model.config.input_spec) for image in images])
    arms: dict[str, Callable[[], None]] = {
        "all": partial(run_model, model, photos, "off", NUM_VIEWS),
        policy_name("scored", 8): partial(run_model, model, photos, "scored", 8),
        dynamic_name(STATED_LOSS): partial(run_model, model, photos, "dynamic", NUM_VIEWS),
    }
    flops = {name: backbone_flops(arm) / plan.photos for name, arm in arms.items()}
    taken = interleave({name: partial(timed, arm) for name, arm in arms.items()}, plan.rounds, seed)
    walls = {name: [timing.wall_s / plan.photos * 1e3 for timing in timings] for name, timings in taken.items()}
    note = f"{plan.photos} photos in one batch, one core; the head's own work, in every round, is in the time"
    rows = []
    for name in list(arms)[1:]:
        sides = flops[name] / 1e9, flops["all"] / 1e9
        counted = f"backbone FLOPs, counted by PyTorch: {name}"
        rows.append(exact(counted, TWELVE, *sides, "GFLOP per photo", None, note))
        rows.append(compare(f"wall clock: {name}", TWELVE, walls[name], walls["all"], "ms per photo", None, note))
    return rows


@torch.inference_mode()
def run_model(model: RoadworkModel, photos: Batch, pruning: str, keep: int) -> None:
    """Run one forward pass in a pruning mode."""
    model.config.pruning, model.config.keep_views = pruning, keep
    model(photos, null_metadata=True)


def backbone_flops(work: Callable[[], None]) -> int:
    """FLOPs of the frozen model alone, counted in one call of `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return sum(counter.get_flop_counts()["DINOv3ViTModel"].values())


if __name__ == "__main__":
    raise SystemExit(command(pruning))
