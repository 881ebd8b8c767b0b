"""The training loop: what it costs over a bare loop, and how fast it is beside Hugging Face's `Trainer`.

All arms train the head of the demo recipe in fp32 on the CPU, from the same feature cache, one thread per process.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.form import Goal, Report, Row, compare, interleave, machine, publish, versions
from benchmarks.processes import run_apart
from benchmarks.trainer_arms import BATCH, RECIPE, time_arm
from benchmarks.trainer_revision import Revision
from data_prep.features.command import features as make_cache
from data_prep.features.options import ModelChoice
from data_prep.scenes.data_set import KIND, scenes
from data_prep.shards.command import shard
from pipeline.cli import command
from pipeline.config import find_recipe, read_config, to_yaml

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers")
MICRO_BATCH = 16
OVERHEAD_GOAL, TRAINER_GOAL = Goal(1.03, at_most=True), Goal(1.2)
NOTES = {
    "overhead": "one process, in turns on the same DeepSpeed engine and batches; ours also counts targets, draws "
    "seeds, sets the learning rate, keeps the weight average, agrees on stopping, watches for hangs and logs every "
    "tenth step",
    "trainer": "one process each, without DeepSpeed in theirs; ours also keeps the weight average, checks every "
    "read and can be stopped at any step; neither validates nor saves",
    "plain": "one process each; theirs has no DeepSpeed, no trainer and no weight average: what forward, backward and "
    "AdamW take, and so the most that any trainer could gain",
    "revision": "one process each; theirs is the head of that revision in today's sizes, with its own feature cache "
    "and reader",
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    images: int
    steps: int
    """Steps in a round."""
    rounds: int
    """How often the trainer and the bare loop take turns in one process."""
    starts: int
    """How often each other arm is started, in a process of its own and for two rounds."""


FULL = Plan(images=400, steps=25, rounds=8, starts=4)
QUICK = Plan(images=32, steps=4, rounds=2, starts=1)
ROUNDS_OF_A_START = 2


def trainer(quick: bool = False, out: Path | None = None, seed: int = 0, against: Path | None = None) -> Path:
    """Measure the training loop against a bare loop, Hugging Face's `Trainer`, and plain PyTorch.

    Args:
        against: Folder with another revision of this project (`git archive REVISION | tar x -C FOLDER`); its head under
            `Trainer` is measured too.
        quick: Fewer photos, steps and rounds, in 90 seconds on two cores.
        out: Folder for trainer.json; benchmarks/results if not given, or runs/benchmarks with --quick.
        seed: Seed of the scenes and of the order of measuring.
    """
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="roadwork-trainer-") as place:
        rows = measure(plan, Path(place), seed, against)
    return publish(Report("trainer", machine(), versions(PACKAGES), seed, rows), out, quick)


def measure(plan: Plan, folder: Path, seed: int, against: Path | None = None) -> tuple[Row, ...]:
    """All rows of the benchmark."""
    prepare(plan, folder, seed)
    on = f"head of {RECIPE}, cached {KIND}, CPU"
    taken = run_apart(time_arm, 1, folder, "overhead", plan.steps, plan.rounds)
    ours, bare = ([1000 * second for second in seconds] for seconds in zip(*taken, strict=True))
    arms = {name: partial(rates, folder, name, plan.steps) for name in ("ours", "hugging_face", "plain")}
    if against is not None:
        (folder / "revision").mkdir()
        other = Revision(against, folder / "revision", plan.images, seed)
        arms["revision"] = partial(other.rates, plan.steps, ROUNDS_OF_A_START)
    found = {name: np.concatenate(starts).tolist() for name, starts in interleave(arms, plan.starts, seed).items()}
    what, unit, rate = f"training, {on}", "images/s", found["ours"]
    rows = [
        compare(f"a training step, {on}", "a bare loop", ours, bare, "ms", OVERHEAD_GOAL, NOTES["overhead"]),
        compare(what, "transformers.Trainer", rate, found["hugging_face"], unit, TRAINER_GOAL, NOTES["trainer"]),
        compare(what, "a plain PyTorch loop", rate, found["plain"], unit, None, NOTES["plain"]),
    ]
    if against is not None:
        name = f"transformers.Trainer, head of {against.name}"
        rows.append(compare(what, name, rate, found["revision"], unit, TRAINER_GOAL, NOTES["revision"]))
    return tuple(rows)


def prepare(plan: Plan, folder: Path, seed: int) -> None:
    """Make scenes, shards, their feature cache, and the recipe that all arms train."""
    scenes(folder / "photos", plan.images, "1024x768", seed=seed)
    shard(folder / "photos", folder / "shards", val_share=0.0, test_share=0.0, splits="random")
    make_cache(str(folder / "shards"), folder / "cache", recipe=RECIPE, model=ModelChoice(), device="cpu")
    config = read_config(find_recipe(RECIPE))
    config.data.shards, config.data.features = str(folder / "shards"), str(folder / "cache")
    config.data.workers = 0
    config.train.batch_size, config.train.micro_batch_size = BATCH, MICRO_BATCH
    config.train.epochs = 10000  # so that no arm comes to an end
    config.train.distil_every = 0  # `transformers.Trainer` knows no such steps
    (folder / "recipe.yaml").write_text(to_yaml(config))


def rates(folder: Path, arm: str, steps: int) -> list[float]:
    """Images per second in each round of an arm, in a process that is started anew."""
    return [BATCH / second for (second,) in run_apart(time_arm, 1, folder, arm, steps, ROUNDS_OF_A_START)]


if __name__ == "__main__":
    raise SystemExit(command(trainer))
