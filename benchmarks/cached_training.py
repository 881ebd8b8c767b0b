"""The demo's recipe trained from the feature cache and from the photos: the time, and whether it learns as well."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.form import Goal, Row, compare
from data_prep.features.command import features
from data_prep.features.options import ModelChoice
from data_prep.scenes.data_set import KIND, scenes
from data_prep.shards.command import shard
from pipeline.progress import say

RECIPE = "demo"
SIZE, DIFFICULTY = "1024x768", 0.2  # as the demo draws them
GOAL = Goal(1 / 3, at_most=True)


def trained(place: Path, images: int, runs: int, seed: int) -> Row:
    """Train the recipe on scenes, several times in each way, and compare seconds and validation MCC.

    Args:
        place: Empty folder to work in.
        images: Scenes, of which the demo's shares are held out.
        runs: Trainings of each kind, with another seed each; at least 2.
        seed: Of the scenes, and of the first training.
    """
    scenes(place / "photos", images, SIZE, difficulty=DIFFICULTY, seed=seed)
    shard(place / "photos", place / "shards")
    made = features(str(place / "shards"), place / "features", recipe=RECIPE, model=ModelChoice(), device="cpu")
    pairs = []
    for number in range(seed, seed + runs):
        cached = train(place / f"cached-{number}", place, str(place / "features"), number)
        pairs.append((cached, train(place / f"online-{number}", place, "", number)))
    ours, theirs = zip(*pairs, strict=True)
    note = (
        f"{runs} trainings of each kind, two processes, validations included; the cache was made in "
        f"{json.loads(made.read_text())['wall_s']:.0f} s by one process, once for all of them. "
        f"Validation MCC without metadata (n {theirs[0]['val']['n']}): from the cache {scores(ours)}; "
        f"from the photos {scores(theirs)}"
    )
    return compare(
        f"training of the {RECIPE} recipe from the cache, {images} {KIND} {SIZE}", "the same from the photos",
        [one["wall_s"] for one in ours], [one["wall_s"] for one in theirs], "s", GOAL, note,
    )  # fmt: skip


def train(run: Path, place: Path, cache: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one run as users do; returns its summary."""
    say(f"training {run.name}")
    own = ["--run", str(run), "--shards", str(place / "shards"), "--data.features", cache, "--train.seed", str(seed)]
    for command in (
        ["pipeline.launch.launcher", RECIPE, *own],
        ["pipeline.evaluate", "--run", str(run), "--splits", "val"],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def scores(summaries: tuple[dict[str, Any], ...]) -> str:
    """Each run's MCC with its bootstrap interval."""
    found = [(one["val"]["mcc_null_metadata"], *one["val"]["ci95"]["mcc_null_metadata"]) for one in summaries]
    return ", ".join(f"{mcc:.3f} ({low:.3f} to {high:.3f})" for mcc, low, high in found)
