"""View pruning on procedural scenes: MCC against the share of the backbone's FLOPs, counted and timed.

Heads on `scenes-tiny` are trained to answer from any number of views. Then they are asked after the views that the
pruner scores best, after random ones, the same ones for every photo, and those that matter most among all twelve; and
in the mode `dynamic`, whose rule is calibrated on photos of its own. What pruning costs is the difference to all twelve
views on the same photos.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.form import Goal, Report, Row, Timing, compare, interleave, machine, one_core, publish, timed, versions
from benchmarks.pruning_study import (
    KEPT,
    MODEL,
    POLICIES,
    STATED_LOSS,
    Data,
    Plan,
    SeedAnswers,
    photos_of,
    run_study,
    scenes_of,
)
from data_prep.scenes import render
from pipeline.cli import command
from pipeline.evaluation.inference import load_model
from pipeline.evaluation.metrics import confusion_counts, mcc_of
from pipeline.model.roadwork import RoadworkModel

PACKAGES = ("torch", "transformers")
FULL = Plan({"train": 1500, "val": 900, "test": 2000}, steps=800, seeds=4, timed=32, rounds=7)
QUICK = Plan({"train": 128, "val": 64, "test": 96}, steps=40, seeds=3, timed=8, rounds=3)
DRAWS = 1000
TWELVE = "all 12 views, same head"
MOST_LOSS, MOST_LOSS_BOUND = 0.2, 1.0  # points of MCC: the mean, and the upper end of its interval
MOST_FLOPS = Goal(0.56, at_most=True)
SMALLEST_MCC = 1.0  # points; with less a ratio says nothing

Answers = Callable[[SeedAnswers], np.ndarray]


def pruning(quick: bool = False, out: Path | None = None, seed: int = 0) -> Path:
    """Measure what view pruning saves and what it costs, for every way to choose the views.

    Args:
        quick: Fewer photos, steps and heads, in 90 seconds on two cores; heads are then poor and intervals wide.
        out: Folder for pruning.json; benchmarks/results if not given, or runs/benchmarks with --quick.
        seed: Of the scenes, the bootstrap and the order of measuring.
    """
    rows = measure(QUICK if quick else FULL, seed)
    return publish(Report("pruning", machine(), versions(PACKAGES), seed, rows), out, quick)


def measure(plan: Plan, seed: int) -> tuple[Row, ...]:
    """All rows of the benchmark."""
    with tempfile.TemporaryDirectory(prefix="roadwork-pruning-") as place:
        labels, heads = run_study(Path(place), plan, seed)
        study = Study(labels, heads, seed)
        model = load_model(Path(place) / "model", torch.device("cpu"))
        with one_core():
            spent = spending_rows(model, plan, seed)
    about = (
        f"{len(labels)} distinct photos, {plan.photos['val']} others for cuts and rules, {plan.seeds} heads; intervals "
        "by bootstrap over photos and heads"
    )
    return (*dynamic_rows(study, about), *spent, *policy_rows(study, about))


class Study:
    """Paired comparisons over photos and heads."""

    def __init__(self, labels: np.ndarray, heads: list[SeedAnswers], seed: int):
        """Draw photos and heads with replacement. A photo is a street of its own, so photos are the groups."""
        self.labels, self.heads = labels, heads
        rng = np.random.default_rng(seed)
        photos = len(labels)
        drawn = (np.bincount(rng.integers(photos, size=photos), minlength=photos) for _ in range(DRAWS))
        self.photo_draws = np.stack(list(drawn))
        self.head_draws = rng.integers(len(heads), size=(DRAWS, len(heads)))

    def mcc(self, answers: Answers) -> tuple[float, np.ndarray]:
        """Mean over the heads, in points, of the photos at hand and of every draw [DRAWS]."""
        outcomes = [confusion_counts(self.labels, answers(head), 0.0) for head in self.heads]
        observed = np.mean([mcc_of(*outcome.sum(axis=0)) for outcome in outcomes])
        by_head = np.stack([mcc_of(*(self.photo_draws @ outcome).T) for outcome in outcomes], axis=1)  # [DRAWS, heads]
        return 100 * float(observed), 100 * np.take_along_axis(by_head, self.head_draws, axis=1).mean(axis=1)

    def share(self, views: Answers) -> tuple[float, np.ndarray]:
        """Mean share of the twelve views that reach the backbone, of the photos at hand and of every draw."""
        spent = np.stack([views(head) for head in self.heads]) / MODEL.num_views  # [heads, photos]
        by_head = self.photo_draws @ spent.T / len(self.labels)
        return float(spent.mean()), np.take_along_axis(by_head, self.head_draws, axis=1).mean(axis=1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def mcc_row(study: Study, what: str, against: str, ours: Answers, theirs: Answers, note: str) -> Row:
    """MCC of both sides on the same photos."""
    (mine, my_draws), (other, other_draws) = study.mcc(ours), study.mcc(theirs)
    ratios = np.maximum(my_draws, SMALLEST_MCC) / np.maximum(other_draws, SMALLEST_MCC)
    return Row(
        what=what,
        against=against,
        ours=mine,
        theirs=other,
        unit="points of MCC",
        ratio=max(mine, SMALLEST_MCC) / max(other, SMALLEST_MCC),
        interval=interval(ratios),
        goal=None,
        met=None,
        note=note,
    )


def with_loss(study: Study, row: Row, ours: Answers, theirs: Answers) -> Row:
    """The row with the difference of the two MCCs, which the goal is about."""
    (mine, my_draws), (other, other_draws) = study.mcc(ours), study.mcc(theirs)
    loss, (low, high) = other - mine, interval(other_draws - my_draws)
    return replace(
        row,
        goal=f"loss <= {MOST_LOSS}, bound <= {MOST_LOSS_BOUND}",
        met=loss <= MOST_LOSS and high <= MOST_LOSS_BOUND,
        note=f"loss of {loss:.2f} points ({low:.2f} to {high:.2f}); {row.note}",
    )


def dynamic_rows(study: Study, about: str) -> list[Row]:
    """The mode `dynamic` at every stated loss: share of FLOPs and MCC."""
    rows = []
    for max_loss in study.heads[0].dynamic:

        def answers(head: SeedAnswers, key: float = max_loss) -> np.ndarray:
            return head.dynamic[key][0]

        def views(head: SeedAnswers, key: float = max_loss) -> np.ndarray:
            return head.dynamic[key][1]

        share, draws = study.share(views)
        bounds, name = interval(draws), f"dynamic, stated loss {100 * max_loss:g}"
        is_stated = max_loss == STATED_LOSS
        row = Row(
            what=f"backbone FLOPs: {name}",
            against=TWELVE,
            ours=share * MODEL.num_views,
            theirs=MODEL.num_views,
            unit="views per photo",
            ratio=share,
            interval=bounds,
            goal=str(MOST_FLOPS) if is_stated else None,
            met=MOST_FLOPS.met_by(*bounds) if is_stated else None,
            note=about,
        )
        what = f"MCC at {share:.0%} of the FLOPs: {name}"
        cost = mcc_row(study, what, TWELVE, answers, twelve_views, about)
        rows += [row, with_loss(study, cost, answers, twelve_views) if is_stated else cost]
        if is_stated:
            rows.append(mcc_row(study, what, "a head trained on all 12", answers, lambda head: head.twelve, about))
    return rows


def twelve_views(head: SeedAnswers) -> np.ndarray:
    """The same head's answers from all views."""
    return head.policies["scored"][:, -1]


def policy_rows(study: Study, about: str) -> list[Row]:
    """Every way to choose, at every number of views short of all."""
    rows = []
    for place, keep in enumerate(KEPT[:-1]):
        for policy in POLICIES if keep > 1 else POLICIES[:1]:

            def answers(head: SeedAnswers, policy: str = policy, place: int = place) -> np.ndarray:
                return head.policies[policy][:, place]

            name = f"{policy}, K={keep}" if keep > 1 else "the global view alone"
            what = f"MCC at {keep / MODEL.num_views:.0%} of the FLOPs: {name}"
            rows.append(mcc_row(study, what, TWELVE, answers, twelve_views, about))
    return rows


def spending_rows(model: RoadworkModel, plan: Plan, seed: int) -> list[Row]:
    """Counted FLOPs of the backbone and wall clock of the whole model, at K=8 and `dynamic`, against all views."""
    config = scenes_of("test", seed)
    photos = photos_of([render(config, number) for number in range(plan.timed)])
    arms: dict[str, Callable[[], None]] = {
        "all": partial(run_model, model, photos, "off", 12),
        "scored, K=8": partial(run_model, model, photos, "scored", 8),
        f"dynamic, stated loss {100 * STATED_LOSS:g}": partial(run_model, model, photos, "dynamic", 12),
    }
    for arm in arms.values():
        arm()
    flops = {name: backbone_flops(arm) / plan.timed for name, arm in arms.items()}
    taken: dict[str, list[Timing]] = interleave(
        {name: partial(timed, arm) for name, arm in arms.items()}, plan.rounds, seed
    )
    walls = {name: [timing.wall_s / plan.timed * 1e3 for timing in timings] for name, timings in taken.items()}
    rows = []
    for name in list(arms)[1:]:
        ratio = flops[name] / flops["all"]
        note = f"{plan.timed} photos in one batch, one core; the head's own work, in every round, is in the time"
        row = Row(
            what=f"backbone FLOPs, counted by PyTorch: {name}",
            against=TWELVE,
            ours=flops[name] / 1e9,
            theirs=flops["all"] / 1e9,
            unit="GFLOP per photo",
            ratio=ratio,
            interval=(ratio, ratio),
            goal=None,
            met=None,
            note=note,
        )
        rows.append(row)
        rows.append(compare(f"wall clock: {name}", TWELVE, walls[name], walls["all"], "ms per photo", None, note))
    return rows


@torch.inference_mode()
def run_model(model: RoadworkModel, photos: Data, pruning: str, keep: int) -> None:
    """One forward pass in a mode."""
    model.config.pruning, model.config.keep_views = pruning, keep
    model(**photos, null_metadata=True)


def backbone_flops(work: Callable[[], None]) -> int:
    """Of the frozen model alone."""
    with FlopCounterMode(display=False) as counter:
        work()
    return sum(counter.get_flop_counts()["DINOv3ViTModel"].values())


if __name__ == "__main__":
    raise SystemExit(command(pruning))
