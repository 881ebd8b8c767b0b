"""The command `study`: from a recipe, or a user's own shards, to verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.form import Report, machine, publish, versions
from benchmarks.study.answers import ArmAnswers, Bootstrap, read_answers
from benchmarks.study.arms import COMPLETE, Arm, select_arms
from benchmarks.study.claims import judge
from benchmarks.study.config import StudyConfig, read_recipe
from benchmarks.study.folds import Places, divide
from benchmarks.study.page import write_page
from benchmarks.study.photos import Photos, find_photos, load_photos
from benchmarks.study.work import Work, count_kinds, plan_work, run_work, settle
from pipeline.errors import UserError, require
from pipeline.evaluation.place_bootstrap import bootstrap_units
from pipeline.progress import say

PACKAGES = ("torch", "transformers", "scikit-learn")


def study(
    recipe: str = "study_small",
    shards: str | None = None,
    features: str | None = None,
    out: Path | None = None,
    quick: bool = False,
    workers: int = 0,
    seed: int = 0,
) -> Path:
    """Train the model, the model without each of its parts, and what it is compared with; then judge the claims.

    Every arm gets the same photos and steps, in folds of whole places, and learning rates to try. If it is interrupted,
    the same command resumes: trainings that are finished are not done again.

    Args:
        recipe: study_small (forty minutes on two cores), study_heads, study_optimizers, study (a day), or a YAML file.
        shards: Folder of your own shards, or its URL; without it the recipe's procedural scenes are drawn.
        features: Feature cache of these shards; made in the study's folder if not given, and where it is missing.
        out: Folder of the study: study.html, RECIPE.json, and all that it is made from; runs/RECIPE if not given.
        quick: Take so few steps, and draw so few scenes, that it ends in two minutes and its figures say nothing.
        workers: Processes that train, each in one thread; 0 takes every core.
        seed: Seed of the bootstrap.
    """
    config = read_recipe(recipe)
    folder = (out or Path("runs") / (f"{config.name}-quick" if quick else config.name)).resolve()
    done = run_study(config.quick() if quick else config, folder, shards, features, workers, seed)
    packages, findings = versions(PACKAGES), judge(done.answers, done.bootstrap, done.about)
    write_page(folder / "study.html", done, findings, quick, packages)
    say(f"page: {folder / 'study.html'}")
    rows = tuple(finding.row for finding in findings)
    return publish(Report(config.name, machine(), packages, seed, rows, f"study --recipe {recipe}"), folder, quick)


@dataclass(frozen=True)
class Done:
    """A study whose trainings are done."""

    config: StudyConfig
    """The recipe, without metadata that gives the label away."""
    photos: Photos
    places: Places
    work: Work
    """The trainings, with the learning rates that were chosen."""
    results: Path
    """Folder of outcomes."""
    answers: dict[str, ArmAnswers]
    """Each arm's answers, by the arm's name."""
    lost: dict[str, str]
    """Why an arm has no answers, by the arm's title."""
    bootstrap: Bootstrap
    units: str
    """What the bootstrap draws."""

    @property
    def about(self) -> str:
        """What all rows share, for their notes."""
        plan, tested = self.config.plan, int(self.answers[COMPLETE].tested.sum())
        return (
            f"{tested} tested {self.photos.data} in {plan.folds} folds, {plan.seeds} seeds, metadata NULL unless "
            f"given; 95 % by bootstrap over {self.units} and seeds"
        )


def run_study(
    config: StudyConfig, folder: Path, shards: str | None, features: str | None, workers: int, seed: int
) -> Done:
    """Make what is missing, from scenes to trainings, and read all answers; see `study` for the arguments."""
    require(workers >= 0, "--workers", workers, "0 or more")
    arms = select_arms(config.plan.arms)
    trainings = config.plan.folds * config.plan.seeds
    if any(arm.optimizer != "adamw" for arm in arms):
        require(trainings >= 2, "plan.seeds", config.plan.seeds, "2 or more, or plan.folds, for claims about steps")
    tokens = find_photos(config, shards, features, folder)
    photos = load_photos(tokens)
    places = divide(photos, config.plan.parts)
    for name, why in photos.leaks.items():
        say(f"{name} is left out of the model: it gives the label away ({why})")
    config = config.without(photos.leaks)
    plan, results = plan_work(config, arms, photos.fingerprint), folder / "trainings"
    say(f"{len(photos.labels)} photos of {photos.data}, {places.blocks.max() + 1} places; {count_kinds(plan)}")
    run_work(plan, tokens, results, workers)
    settled = settle(plan, results)
    if settled != plan:
        run_work(settled, tokens, results, workers)
    answers, lost = read_all(settled, arms, photos, results)
    units, name = bootstrap_units(places.blocks, photos.groups, answers[COMPLETE].tested)
    return Done(
        config, photos, places, settled, results, answers, lost, Bootstrap(units, config.plan.seeds, seed), name
    )


def read_all(
    work: Work, arms: Sequence[Arm], photos: Photos, results: Path
) -> tuple[dict[str, ArmAnswers], dict[str, str]]:
    """The answers by the arm's name, and, by its title, why an arm has none: its loss became infinite.

    Raises:
        UserError: The arm without answers is `complete`, without which there is no study.
    """
    answers, lost = {}, {}
    for arm in arms:
        try:
            answers[arm.name] = read_answers(work, arm, photos, results)
        except UserError as error:
            if arm.name == COMPLETE:
                raise
            lost[arm.title] = str(error)
            say(f"left out: {error}")
    return answers, lost
