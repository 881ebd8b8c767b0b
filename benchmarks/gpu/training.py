"""Training through the launcher: speed, memory, bits, optimizers and ZeRO stages."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.parts import Bench, finish
from data_prep.features.command import features
from data_prep.features.options import ModelChoice
from data_prep.scenes.data_set import scenes
from data_prep.shards.command import shard
from pipeline import train
from pipeline.config import ACCELERATE_CONFIGS, ROOT, Config, DataConfig, TrainConfig, to_yaml
from pipeline.files import sha256_of
from pipeline.training.run_folder import RunFolder

RUN_LIMIT_S = 90
TRAIN_PHOTO_SIZE = "1024x768"  # all twelve views of 512 px show something, and drawing takes little


def training(bench: Bench) -> None:
    """Train the full head from a feature cache, twice to compare the bits, in other ways, and once from the photos."""
    bench.attempt("features, by the command", prepare, bench)
    halfway = bench.sizes.epochs * bench.sizes.train_photos // bench.sizes.batch_size // 2
    long = ("--train.epochs", str(bench.sizes.epochs), "--checkpoint.every_steps", str(halfway))
    bench.attempt("AdamW, ZeRO-2", run, bench, "first", *long)
    bench.attempt("the same again", again, bench, long)
    bench.attempt("resumed halfway", resumed, bench, long)
    few = ("--train.epochs", "4", "--train.log_every", "4")
    for optimizer in ("sophia_g", "sophia_h"):
        bench.attempt(optimizer, run, bench, optimizer, *few, "--optim.name", optimizer, "--optim.hessian_every", "4")
    bench.attempt("baseline", run, bench, "baseline", *few, "--model.head", "single_view")
    online = ("--data.shards", str(bench.place / "validated-shards"), "--data.features", "", "--train.epochs", "1",
              "--train.micro_batch_size", "16", "--train.log_every", "1")  # fmt: skip
    bench.attempt("online, with a validation", run, bench, "online", *online)
    for stage in (1, 3):
        bench.attempt(f"AdamW, ZeRO-{stage}", partial(run, stage=stage), bench, f"zero{stage}", *few)


def prepare(bench: Bench) -> dict[str, Any]:
    """Photos, shards, a cache of their tokens and a recipe; how fast the cache was made."""
    place, workers = bench.place, 1 if bench.dry else 0
    size = bench.sizes.photo_size if bench.dry else TRAIN_PHOTO_SIZE
    scenes(place / "train-photos", bench.sizes.train_photos, size, workers=workers)
    # With photos to validate on, each of many short epochs would be validated and saved.
    for name, share in (("shards", 0.0), ("validated-shards", 0.25)):
        shard(place / "train-photos", place / name, splits="random", val_share=share, test_share=0.0, workers=workers)
    batch = bench.sizes.batch_size
    config = Config(
        data=DataConfig(str(place / "shards"), str(place / "features"), epoch_share=1.0, workers=0 if bench.dry else 8),
        train=TrainConfig(batch_size=batch, micro_batch_size=batch, wandb=False, log_every=20, patience=0),
        model=bench.model_config(),
    )
    config.data.allow_leaks = True  # these scores are never read
    (place / "recipe.yaml").write_text(to_yaml(config))
    summary = features(recipe=str(place / "recipe.yaml"), model=ModelChoice(), device=str(bench.device), compile=False)
    found = json.loads(summary.read_text())
    return {"photos": found["photos"], "wall_s": found["wall_s"], **found["rank_zero"]}


def run(bench: Bench, name: str, *options: str, stage: int = 2) -> dict[str, Any]:
    """Train in a folder of its own, under a ZeRO stage; returns what the run's last log line says."""
    log = bench.place / f"{name}.log"
    # A rehearsal goes through the launcher once, and saves the imports of the other runs.
    start = trained_here if bench.dry and name != "first" else launched
    words = (str(bench.place / "recipe.yaml"), "--train.run", str(bench.place / name), *options)
    deepspeed = str(ROOT / "ds_configs" / f"zero{stage}.json")
    status = finish(get_context("fork").Process(target=start, args=(words, deepspeed, log)), RUN_LIMIT_S)
    said = log.read_text()
    print(f"== {name}\n{said}", file=sys.stderr, flush=True)
    if status is None:
        raise TimeoutError(f"longer than {RUN_LIMIT_S} s; it said last: {said[-300:]}")
    if status:
        raise RuntimeError(f"status {status}: {said[-500:]}")
    lines = map(json.loads, RunFolder(bench.place / name).metrics.read_text().splitlines())
    last = [line for line in lines if line["kind"] == "train"][-1]
    return {key: value for key, value in last.items() if not isinstance(value, str | list)}


def launched(words: Sequence[str], deepspeed: str, log: Path) -> None:
    """Replace this process by `./launch.sh train` with one process on the GPU."""
    divert(log)
    settings = yaml.safe_load((ACCELERATE_CONFIGS / "gpu.yaml").read_text())
    settings["deepspeed_config"]["deepspeed_config_file"] = deepspeed
    accelerate = log.with_suffix(".yaml")
    accelerate.write_text(yaml.safe_dump(settings))
    os.chdir(ROOT)
    launcher = (sys.executable, "-m", "pipeline.launch.launcher", *words, "--config_file", str(accelerate))
    os.execv(sys.executable, launcher)


def trained_here(words: Sequence[str], deepspeed: str, log: Path) -> None:
    """Train in this process, without the launcher and its imports."""
    divert(log)
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = deepspeed
    sys.argv = ["train.py", "--config", *words]
    train.main()


def divert(log: Path) -> None:
    """Send this process's output to a file."""
    with log.open("wb") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)


def again(bench: Bench, words: Sequence[str]) -> dict[str, Any]:
    """A second run of the same configuration, and whether it ends with the same bits."""
    run(bench, "second", *words)
    return {"equal": checkpoint(bench, "second") == checkpoint(bench, "first"), **checkpoint(bench, "second")}


def resumed(bench: Bench, words: Sequence[str]) -> dict[str, Any]:
    """The second run, taken back to its middle and finished anew, and whether it ends with the same bits."""
    folder = RunFolder(bench.place / "second")
    *_, middle, last = sorted(folder.checkpoints.glob("step-*"))
    shutil.rmtree(last)
    folder.summary.unlink()
    run(bench, "second", *words)
    return {"equal": checkpoint(bench, "second") == checkpoint(bench, "first"), "from": middle.name}


def checkpoint(bench: Bench, name: str) -> dict[str, str]:
    """SHA-256 of each file of tensors in a run's newest checkpoint."""
    newest = sorted(RunFolder(bench.place / name).checkpoints.glob("step-*"))[-1]
    return {f"{newest.name}/{file.name}": sha256_of(file)[:16] for file in sorted(newest.glob("*.safetensors"))}
