"""The training loop: what it costs over a bare loop, beside Hugging Face's `Trainer`, and what a second process brings.

All arms train the head of the demo recipe in fp32 on the CPU, from the same feature cache, one thread per process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.form import ROOT, Goal, Report, Row, compare, interleave, machine, publish, versions
from data_prep.features.command import features as make_cache
from data_prep.features.options import ModelChoice
from data_prep.scenes.data_set import KIND, scenes
from data_prep.shards.command import shard
from pipeline.cli import command
from pipeline.config import ACCELERATE_CONFIGS, find_recipe, read_config, to_yaml
from pipeline.launch.plan import read_accelerate

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers")
RECIPE = "demo"
BATCH, MICRO_BATCH = 32, 16
OVERHEAD_GOAL, TRAINER_GOAL, SCALING_GOAL = Goal(1.05, at_most=True), Goal(1.2), Goal(1.8)
NOTES = {
    "overhead": "one process, in turns on the same DeepSpeed engine and batches; ours also counts targets, draws "
    "seeds, sets the learning rate, keeps the weight average, agrees on stopping, watches for hangs and logs every "
    "tenth step",
    "trainer": "one process each, without DeepSpeed in theirs; ours also keeps the weight average, checks every "
    "read and can be stopped at any step; neither validates nor saves",
    "plain": "one process each; theirs has no DeepSpeed, no trainer and no weight average: what forward, backward and "
    "AdamW take, and so the most that any trainer could gain",
    "ceiling": "two processes that share no work and send nothing: what this machine lets a second core add",
    "scaling": "the same 32 photos a step: 2 x 16 at once over gloo with ZeRO-2, or 16 twice with ZeRO-0, as "
    "accelerate_configs/ has it; one thread per process",
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    images: int
    steps: int
    """Of a round."""
    rounds: int
    """Of the trainer and the bare loop, which take turns in one process."""
    starts: int
    """Of each other arm, which runs in a process of its own, two rounds long."""


FULL = Plan(images=400, steps=25, rounds=8, starts=4)
QUICK = Plan(images=32, steps=4, rounds=2, starts=1)
ROUNDS_OF_A_START = 2


def trainer(quick: bool = False, out: Path | None = None, seed: int = 0) -> Path:
    """Measure the training loop against a bare loop, Hugging Face's `Trainer`, and itself in two processes.

    Args:
        quick: Fewer photos, steps and rounds, in 90 seconds on two cores.
        out: Folder for trainer.json; benchmarks/results if not given, or runs/benchmarks with --quick.
        seed: Of the scenes and of the order of measuring.
    """
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="roadwork-trainer-") as place:
        rows = measure(plan, Path(place), seed)
    return publish(Report("trainer", machine(2), versions(PACKAGES), seed, rows), out, quick)


def measure(plan: Plan, folder: Path, seed: int) -> tuple[Row, ...]:
    """All rows."""
    prepare(plan, folder, seed)
    on = f"head of {RECIPE}, cached {KIND}, CPU"
    pairs = seconds(folder, "overhead", plan.steps, plan.rounds)
    arms = {
        "ours": partial(rates, folder, "ours", plan.steps),
        "hugging_face": partial(rates, folder, "hugging_face", plan.steps),
        "plain": partial(rates, folder, "plain", plan.steps),
        "two": partial(rates, folder, "ours", plan.steps, processes=2),
        "side by side": partial(rates, folder, "plain", plan.steps, processes=2, batches=2),
    }
    found = {
        arm: [rate for start in starts for rate in start] for arm, starts in interleave(arms, plan.starts, seed).items()
    }
    return (
        compare(
            f"a training step, {on}", "a bare loop", [1000 * pair[0] for pair in pairs],
            [1000 * pair[1] for pair in pairs], "ms", OVERHEAD_GOAL, NOTES["overhead"],
        ),
        compare(
            f"training, {on}", "transformers.Trainer", found["ours"], found["hugging_face"], "images/s", TRAINER_GOAL,
            NOTES["trainer"],
        ),
        compare(
            f"training, {on}", "a plain PyTorch loop", found["ours"], found["plain"], "images/s", None, NOTES["plain"],
        ),
        compare(
            f"training in two processes, {on}", "in one", found["two"], found["ours"], "images/s", SCALING_GOAL,
            NOTES["scaling"],
        ),
        compare(
            f"two plain loops side by side, {on}", "one", found["side by side"], found["plain"], "images/s", None,
            NOTES["ceiling"],
        ),
    )  # fmt: skip


def prepare(plan: Plan, folder: Path, seed: int) -> None:
    """Scenes, shards, their cache and the recipe that all arms train."""
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


def rates(folder: Path, arm: str, steps: int, processes: int = 1, batches: int = 1) -> list[float]:
    """Images per second of an arm, started anew, which does so many batches of `BATCH` at once."""
    return [batches * BATCH / first for first, *_ in seconds(folder, arm, steps, ROUNDS_OF_A_START, processes)]


def seconds(folder: Path, arm: str, steps: int, rounds: int, processes: int = 1) -> list[list[float]]:
    """Seconds per step of each round of an arm; see `benchmarks.trainer_arms`."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if processes == 1:
        launch = [sys.executable]
    words = [*launch, "-m", "benchmarks.trainer_arms", arm, str(folder), str(steps), str(rounds)]
    launch_file = read_accelerate(ACCELERATE_CONFIGS / f"cpu_{processes}.yaml")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": launch_file["deepspeed_config"]["deepspeed_config_file"],
    }
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    raise SystemExit(command(trainer))
