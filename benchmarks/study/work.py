"""The trainings of a study: listed, spread over processes, each written when it is done, and none done twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.study.arms import COMPLETE, Arm
from benchmarks.study.config import StudyConfig
from benchmarks.study.training import Training, run_training
from data_prep.work.parallel import Workers
from pipeline.errors import UserError
from pipeline.optim.config import OptimConfig
from pipeline.progress import say, track

PRELOAD = ("benchmarks.study.training",)


@dataclass(frozen=True)
class Work:
    """The trainings of each arm, [folds][seeds][rates]; the rates of a seed are empty while other seeds choose them."""

    of_arm: dict[str, list[list[list[Training]]]]

    @property
    def trainings(self) -> list[Training]:
        """All trainings, the longest first, each once: some arms share trainings and differ only in the test."""
        every = {training.name: training for arm in self.of_arm for training in self.flat(arm)}
        return sorted(every.values(), key=lambda training: -training.cost)

    def flat(self, arm: str) -> list[Training]:
        """An arm's trainings."""
        return [training for fold in self.of_arm[arm] for seed in fold for training in seed]


def plan_work(config: StudyConfig, arms: Sequence[Arm], fingerprint: str) -> Work:
    """List the trainings that come first: those that choose a learning rate, and those with a single rate.

    Args:
        config: The recipe.
        arms: The arms, `complete` among them.
        fingerprint: Fingerprint of the photos.

    Raises:
        UserError: An arm does not differ from `complete`.
    """
    work = Work({arm.name: _trainings(config, arm, fingerprint) for arm in arms})
    complete = [replace(training, asks_metadata=False, asks_views=False) for training in work.flat(COMPLETE)]
    for arm in arms:
        if arm.name != COMPLETE and work.flat(arm.name) == complete:
            raise UserError(
                f"the arm {arm.name!r} ({arm.about}) is the same as {COMPLETE!r} by this recipe; change the recipe's "
                "model or loss, or leave the arm out of plan.arms"
            )
    return work


def _trainings(config: StudyConfig, arm: Arm, fingerprint: str) -> list[list[list[Training]]]:
    plan = config.plan
    model = arm.model_of(config.model)
    lrs = plan.head_lrs if plan.head_lrs and model.head != "roadwork" else plan.lrs

    def one(fold: int, seed: int, lr: float) -> Training:
        return Training(
            photos=fingerprint, parts=plan.parts, fold=fold, seen_places=arm.seen_places, train_share=arm.train_share,
            sampling=arm.sampling, temper=plan.temper, epoch_share=plan.epoch_share,
            model=model, loss=arm.loss_of(config.loss),
            optimizer=arm.optimizer, optim=optim_of(config.optim, arm.optimizer, lr),
            steps=plan.steps, batch_size=plan.batch_size, distil_every=plan.distil_every,
            validations=plan.validations, seed=seed,
            asks_metadata=bool(model.metadata) and (arm.name == COMPLETE or arm.with_metadata),
            asks_views=plan.asks_views and arm.name == COMPLETE,
        )  # fmt: skip

    def tried(fold: int, seed: int) -> list[Training]:
        return [one(fold, seed, lr) for lr in lrs] if seed == 0 or len(lrs) == 1 else []

    return [[tried(fold, seed) for seed in range(plan.seeds)] for fold in range(plan.folds)]


def settle(work: Work, results: Path) -> Work:
    """Choose every arm's learning rate in every fold, from the first seed's trainings, for all of its seeds.

    Where no rate led to a finite loss, nothing more is trained: all seeds share the first seed's training.
    """

    def settled(fold: list[list[Training]]) -> list[list[Training]]:
        if len(fold[0]) == 1:
            return fold
        best, outcome = choose([(training, read_outcome(results, training)) for training in fold[0]])
        return [[best if outcome["diverged"] else replace(best, seed=seed)] for seed in range(len(fold))]

    return Work({arm: [settled(fold) for fold in folds] for arm, folds in work.of_arm.items()})


def choose(candidates: Sequence[tuple[Training, dict[str, Any]]]) -> tuple[Training, dict[str, Any]]:
    """Choose the training with the best validation MCC, metadata NULL; at equal MCC, the one with the smaller loss.

    Returns:
        The training and its outcome; the first one if all of them diverged.
    """
    finite = [candidate for candidate in candidates if not candidate[1]["diverged"]]
    if not finite:
        return candidates[0]
    return max(finite, key=lambda one: (one[1]["null"]["val_mcc"], -one[1]["null"]["val_loss"]))


def optim_of(base: OptimConfig, name: str, lr: float) -> OptimConfig:
    """The recipe's settings for an optimizer: its betas and eps are the recipe's if it is the recipe's optimizer, else
    its paper's."""
    if name == base.name:
        return replace(base, lr=lr)
    return replace(base, name=name, lr=lr, beta1=None, beta2=None, eps=None)


def run_work(work: Work, tokens: Path, results: Path, processes: int) -> int:
    """Train all that is not trained yet; an outcome is there whole or not at all.

    Args:
        work: The trainings.
        tokens: Folder of the study's arrays, see `load_photos`.
        results: Folder of outcomes.
        processes: Number of processes, each with one thread; 0 for one on each core.

    Returns:
        The number of trainings that ran now.
    """
    results.mkdir(parents=True, exist_ok=True)
    missing = [training for training in work.trainings if not (results / f"{training.name}.json").is_file()]
    say(f"{len(missing)} of {len(work.trainings)} trainings are to be done")
    if missing:
        with Workers(processes, PRELOAD) as pool:
            done = pool.map(partial(run_training, tokens, results), missing)
            for _ in track(done, len(missing), "training", unit="heads"):
                pass
    return len(missing)


def read_outcome(results: Path, training: Training) -> dict[str, Any]:
    """The outcome that a training wrote."""
    outcome: dict[str, Any] = json.loads((results / f"{training.name}.json").read_text())
    return outcome


def count_kinds(work: Work) -> str:
    """How many trainings there are at first, and of how many arms, in words."""
    seeds = [fold for arm in work.of_arm.values() for fold in arm]
    later = sum(len(seed) == 0 for fold in seeds for seed in fold)
    more = f" and {later} more with the learning rates that they choose" if later else ""
    return f"{len(work.trainings)} trainings{more}, of {len(work.of_arm)} arms"
