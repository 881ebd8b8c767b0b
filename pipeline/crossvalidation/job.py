"""A cross-validation from shards to results: a training run for each fold, and what follows from all of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.config import Config, differences
from pipeline.crossvalidation.division import Places, divide, find_places
from pipeline.crossvalidation.held_out import answer_held_out
from pipeline.crossvalidation.product import save_ensemble
from pipeline.crossvalidation.review import write_review
from pipeline.crossvalidation.scores import LOG_ODDS, in_words, out_of_fold_table, score
from pipeline.crossvalidation.suspects import rank_suspects
from pipeline.data.dataset import ShardDataset
from pipeline.data.features import open_cache
from pipeline.data.folds import Folds, write_folds
from pipeline.data.index import Index, read_index
from pipeline.data.inputs import check_inputs
from pipeline.devices import pick_device
from pipeline.errors import STARTED_VARIABLE, UserError
from pipeline.evaluation.calibration import fit
from pipeline.files import write_json, write_summary, write_text
from pipeline.launch.demo import Steps
from pipeline.progress import say
from pipeline.training.run_folder import RunFolder

FOLDS_NAME, IDENTITY_NAME = "folds.json", "crossval.json"


@dataclass(frozen=True)
class Plan:
    """What a cross-validation does; a run folder holds one of them."""

    recipe: str
    """Recipe as the user named it, a name or a path."""
    words: tuple[str, ...]
    """Options for training as the user typed them, without --run."""
    folds: int
    seeds: int
    splits: tuple[str, ...]
    review: int
    """Number of suspects whose photos are copied out to be looked at."""
    dry_run: bool = False
    """Whether to print the folds only."""

    def identity(self, config: Config, index: Index) -> dict[str, Any]:
        """What a resumed cross-validation must have in common with this one, as JSON has it."""
        own = {"folds": self.folds, "seeds": self.seeds, "splits": list(self.splits)}
        return {**own, "config": json.loads(json.dumps(asdict(config))), "source_sha256": index.source_sha256}

    def training(self, run: Path, fold: int) -> list[str]:
        """The words of the command that trains a fold."""
        own = {
            "--run": run / "folds" / str(fold), "--train.heads": self.seeds, "--data.folds": run / FOLDS_NAME,
            "--data.fold": fold,
        }  # fmt: skip
        return ["train", self.recipe, *self.words, *(str(word) for pair in own.items() for word in pair)]


def cross_validate(plan: Plan, config: Config, run: Path, again: str) -> Path | None:
    """Train a fold after the other, and write the results; what is there already is kept.

    Args:
        plan: What to do.
        config: Configuration of the training runs.
        run: Run folder.
        again: The command line, which resumes.

    Returns:
        The path of summary.json; None after a dry run.

    Raises:
        UserError: The shards have too few places or classes, or the folder holds something else.
    """
    index = read_index(config.data.shards)
    check_inputs(index, config.model, config.data.allow_leaks)
    open_cache(config.data.features, index)  # one of other photos is refused before anything is written
    identity = plan.identity(config, index)
    if _is_finished(run, identity):
        say(f"{run} is finished already; for another cross-validation choose another --run")
        return (run / "summary.json").resolve()
    places = find_places(index, plan.splits, plan.folds)
    folds = divide(places, plan.folds, config.train.seed, index.source_sha256)
    say(describe(places, folds))
    if plan.dry_run:
        return None
    write_json(run / IDENTITY_NAME, identity)
    write_folds(run / FOLDS_NAME, folds)
    os.environ.setdefault(STARTED_VARIABLE, str(time.time()))  # train.max_minutes counts for all folds together
    steps = Steps(again)
    runs = [RunFolder(run / "folds" / str(number)) for number in range(plan.folds)]
    for number, fold in enumerate(runs):
        if "steps" not in fold.results():
            steps.run(f"fold {number + 1} of {plan.folds}", plan.training(run, number))
    # After all training, so that no backbone of this process takes a GPU's memory meanwhile.
    answers = [answer_held_out(fold, pick_device("auto"), steps.end_if_asked) for fold in runs]
    steps.end_if_asked()
    table = out_of_fold_table(places, folds.part_of, pd.concat(answers, ignore_index=True))
    return _write_results(plan, config, run, index, table, [fold.model for fold in runs], places.rule)


def _write_results(
    plan: Plan, config: Config, run: Path, index: Index, table: pd.DataFrame, models: list[Path], place: str
) -> Path:
    """Write all that follows from the rows of out_of_fold.csv and the models of the folds; returns the summary."""
    scores, suspects = score(table), rank_suspects(table)
    say(in_words(scores))
    write_text(run / "out_of_fold.csv", table.to_csv(index=False))
    write_text(run / "suspects.csv", suspects.to_csv(index=False))
    if plan.review:
        write_review(run / "suspects", suspects[: plan.review], photos_of(index, config))
    calibration = fit(table["label"].to_numpy(), table[LOG_ODDS].to_numpy())
    heads, about = plan.folds * plan.seeds, {**scores, "folds": plan.folds, "seeds": plan.seeds, "place": place}
    save_ensemble(run, models, calibration, about)
    say(f"the model with all {heads} heads is in {run / 'model'}; its own score is not measured, that of its folds is")
    product = {"folder": str((run / "model").resolve()), "heads": heads, **asdict(calibration), "score": None}
    return write_summary(run, {**about, "splits": list(plan.splits), "model": product})


def describe(places: Places, folds: Folds) -> str:
    """The folds in one line: what they are made of, and the photos of each."""
    part = np.array([folds.part_of[key] for key in places.keys])
    photos, roadwork = np.bincount(part), np.bincount(part[places.labels == 1])
    sizes = ", ".join(f"{n} ({ones})" for n, ones in zip(photos, roadwork, strict=True))
    count = len(np.unique(places.numbers))
    return (
        f"{len(part)} labelled photos in {count} places, each {places.rule}; photos in each fold, and those with "
        f"roadwork: {sizes}"
    )


def photos_of(index: Index, config: Config) -> Callable[[str], tuple[str, bytes]]:
    """A function that gives the extension and the bytes of a photo by its key."""
    place = {s.key: (name, row) for name, split in index.splits.items() for row, s in enumerate(split.samples)}
    opened: dict[str, ShardDataset] = {}

    def photo(key: str) -> tuple[str, bytes]:
        name, row = place[key]
        if name not in opened:
            opened[name] = ShardDataset(config.data.shards, index, name, config.input_spec)
        return opened[name].split.samples[row].photo_extension, opened[name].photo(row)

    return photo


def _is_finished(run: Path, identity: dict[str, Any]) -> bool:
    """Whether the run folder holds the same cross-validation, finished; it may also be new, or hold a part of it.

    Raises:
        UserError: The folder holds something else.
    """
    path = run / IDENTITY_NAME
    if not path.is_file():
        if (run / "config.yaml").exists() or any(run.glob("*.safetensors")):
            raise UserError(f"{run} holds a training run or a model, not a cross-validation; choose another --run")
        return False
    if not any((run / "folds").glob("*/*")):  # the first fold was refused
        return False
    before = json.loads(path.read_text())
    changed = [
        f"--{key} {before[key]} (now {identity[key]})" for key in ("folds", "seeds", "splits")
        if before[key] != identity[key]
    ]  # fmt: skip
    changed += differences(before["config"], identity["config"])
    if changed:
        raise UserError(
            f"{run} holds a cross-validation with {changed[0]}; give the same value to resume it, or another --run to "
            "start anew"
        )
    if before["source_sha256"] != identity["source_sha256"]:
        raise UserError(f"{run} holds a cross-validation on other shards; choose another --run")
    return (run / "summary.json").is_file()
