"""The command `study`: from a recipe, or a user's own shards, to verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.form import Report, machine, publish, versions
from benchmarks.study.answers import ArmAnswers, Bootstrap, bootstrap_units, read_answers
from benchmarks.study.arms import COMPLETE, Arm, select_arms
from benchmarks.study.claims import judge
from benchmarks.study.config import read_recipe
from benchmarks.study.folds import divide
from benchmarks.study.page import write_page
from benchmarks.study.photos import Photos, find_photos, load_photos
from benchmarks.study.work import Work, count_kinds, plan_work, run_work, settle
from pipeline.errors import UserError, require
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
    """Train the model, its parts taken away one by one, and what it is compared with, and judge what is claimed of it.

    Every arm gets the same photos and steps, in folds of whole places, and learning rates to try. Cut off at any
    moment, the same command goes on: trainings that are finished are not done again.

    Args:
        recipe: study_small (forty minutes on two cores), study_heads, study_optimizers, study (a day), or a YAML file.
        shards: Folder of your own shards, or its URL; without it the recipe's procedural scenes are drawn.
        features: Feature cache of these shards; made in the study's folder if not given, and where it is missing.
        out: Folder of the study: study.html, RECIPE.json, and all that it is made from; runs/RECIPE if not given.
        quick: So few steps, and scenes where it draws them, that it ends in two minutes and says nothing.
        workers: Processes that train, each in one thread; 0 takes every core.
        seed: Of the bootstrap.
    """
    require(workers >= 0, "--workers", workers, "0 or more")
    config = read_recipe(recipe)
    work = (out or Path("runs") / (f"{config.name}-quick" if quick else config.name)).resolve()
    config = config.quick() if quick else config
    arms = select_arms(config.plan.arms)
    trainings = config.plan.folds * config.plan.seeds
    if any(arm.optimizer != "adamw" for arm in arms):
        require(trainings >= 2, "plan.seeds", config.plan.seeds, "2 or more, or plan.folds, for claims about steps")
    tokens = find_photos(config, shards, features, work)
    photos = load_photos(tokens)
    places = divide(photos, config.plan.parts)
    for name, why in photos.leaks.items():
        say(f"{name} is left out of the model: it gives the label away ({why})")
    config = config.without(photos.leaks)
    plan = plan_work(config, arms, photos.fingerprint)
    say(f"{len(photos.labels)} photos of {photos.data}, {places.blocks.max() + 1} places; {count_kinds(plan)}")
    run_work(plan, tokens, work / "trainings", workers)
    settled = settle(plan, work / "trainings")
    if settled != plan:
        run_work(settled, tokens, work / "trainings", workers)
    answers, lost = read_all(settled, arms, photos, work / "trainings")
    units, name = bootstrap_units(places.blocks, photos.groups, answers[COMPLETE].tested)
    bootstrap = Bootstrap(units, config.plan.seeds, seed)
    tested = int(answers[COMPLETE].tested.sum())
    about = (
        f"{tested} tested {photos.data} in {config.plan.folds} folds, {config.plan.seeds} seeds, metadata NULL unless "
        "given; "
        f"95 % by bootstrap over {name} and seeds"
    )
    findings = judge(answers, bootstrap, about)
    packages = versions(PACKAGES)
    told = {"quick": quick, "units": name, "versions": packages, "lost": lost}
    write_page(work / "study.html", config, photos, places, answers, findings, bootstrap, told)
    say(f"page: {work / 'study.html'}")
    rows = tuple(finding.row for finding in findings)
    return publish(Report(config.name, machine(), packages, seed, rows, f"study --recipe {recipe}"), work, quick)


def read_all(
    work: Work, arms: Sequence[Arm], photos: Photos, results: Path
) -> tuple[dict[str, ArmAnswers], dict[str, str]]:
    """The answers of each arm by its name, and by its title why one has none: its loss became infinite.

    Raises:
        UserError: That is `complete`, without which there is no study.
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
