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
from pipeline.distributed.settings import engine_settings
from pipeline.files import sha256_of
from pipeline.training.memory import need
from pipeline.training.run_folder import RunFolder
from pipeline.training.telemetry import GIB

RUN_LIMIT_S = 75
TRAIN_PHOTO_SIZE = "1024x768"  # all twelve views of 512 px show something, and drawing takes little


def training(bench: Bench) -> None:
    """Train the full head from a feature cache, the most needed numbers first."""
    bench.attempt("features, by the command", prepare, bench)
    twice_and_resumed(bench, "AdamW, ZeRO-2", "adamw", bench.sizes.epochs)
    bench.attempt("features in the GPU's memory", run, bench, "device", *few(), "--data.features_in", "device")
    bench.attempt("from photos, with a validation", run, bench, "photos", *few(epochs=1), *from_photos(bench))
    bench.attempt("memory beside its estimate", memory, bench, ("adamw", "photos"))
    twice_and_resumed(bench, "train.deterministic", "fixed", bench.sizes.few_epochs, "--train.deterministic", "true")
    for name in ("sophia_g", "sophia_h"):
        bench.attempt(name, run, bench, name, *few(), "--optim.name", name, "--optim.hessian_every", "4")
    for stage in (1, 3):
        bench.attempt(f"AdamW, ZeRO-{stage}", partial(run, stage=stage), bench, f"zero{stage}", *few())
    bench.attempt("baseline", run, bench, "baseline", *few(), "--model.head", "single_view")
    bench.attempt("3 heads", run, bench, "heads", *few(), "--train.heads", "3")
    bench.attempt("features in the host's memory", run, bench, "host", *few(), "--data.features_in", "host")


def few(epochs: int = 4) -> tuple[str, ...]:
    """Options of a short run, whose last log line is far from its start."""
    return "--train.epochs", str(epochs), "--train.log_every", "4"


def from_photos(bench: Bench) -> tuple[str, ...]:
    """Options for training without the cache, in micro-batches that leave room for the backbone's activations."""
    shards = str(bench.place / "validated-shards")
    return (
        "--data.shards", shards, "--data.features", "", "--train.micro_batch_size", str(bench.sizes.photo_batch),
        "--train.log_every", "1",
    )  # fmt: skip


def twice_and_resumed(bench: Bench, what: str, name: str, epochs: int, *options: str) -> None:
    """Train, then train again, then go on from the middle of that run: all three should end with the same bits."""
    halfway = epochs * bench.sizes.train_photos // bench.sizes.batch_size // 2
    words = ("--train.epochs", str(epochs), "--checkpoint.every_steps", str(halfway), *options)
    bench.attempt(what, run, bench, name, *words)
    bench.attempt(f"{what}, the same again", again, bench, name, words)
    bench.attempt(f"{what}, resumed halfway", resumed, bench, name, words)


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
    log, folder = bench.place / f"{name}.log", RunFolder(bench.place / name)
    # A rehearsal goes through the launcher once, and saves the imports of the other runs.
    start = trained_here if bench.dry and name != "adamw" else launched
    words = (str(bench.place / "recipe.yaml"), "--train.run", str(folder.path), *options)
    status = finish(get_context("fork").Process(target=start, args=(words, str(stage_file(stage)), log)), RUN_LIMIT_S)
    said = log.read_text()
    print(f"== {name}\n{said}", file=sys.stderr, flush=True)
    if status is None:
        raise TimeoutError(f"longer than {RUN_LIMIT_S} s; it said last: {said[-300:]}")
    if status:
        raise RuntimeError(f"status {status}: {said[-500:]}")
    return {key: value for key, value in last_line(folder).items() if not isinstance(value, str | list)}


def last_line(folder: RunFolder) -> dict[str, Any]:
    """The last line about training in a run's log."""
    lines = map(json.loads, folder.metrics.read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"][-1]


def stage_file(stage: int) -> Path:
    """DeepSpeed's file of a ZeRO stage."""
    return ROOT / "ds_configs" / f"zero{stage}.json"


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


def again(bench: Bench, name: str, words: Sequence[str]) -> dict[str, Any]:
    """Run the same configuration a second time; compare the bits with which it ends."""
    run(bench, f"{name}-again", *words)
    return {"equal": checkpoint(bench, f"{name}-again") == checkpoint(bench, name)}


def resumed(bench: Bench, name: str, words: Sequence[str]) -> dict[str, Any]:
    """Take the second run back to its middle and finish it anew; compare the bits with which it ends."""
    folder = RunFolder(bench.place / f"{name}-again")
    *_, middle, last = sorted(folder.checkpoints.glob("step-*"))
    shutil.rmtree(last)
    folder.summary.unlink()
    run(bench, folder.path.name, *words)
    return {"equal": checkpoint(bench, folder.path.name) == checkpoint(bench, name), "from": middle.name}


def checkpoint(bench: Bench, name: str) -> dict[str, str]:
    """SHA-256 of each file of tensors in a run's newest checkpoint."""
    newest = sorted(RunFolder(bench.place / name).checkpoints.glob("step-*"))[-1]
    return {f"{newest.name}/{file.name}": sha256_of(file) for file in sorted(newest.glob("*.safetensors"))}


def memory(bench: Bench, names: Sequence[str]) -> dict[str, Any]:
    """The peak of finished runs under ZeRO-2, and what `doctor` would have estimated for them."""
    found: dict[str, Any] = {}
    for name in names:
        folder = RunFolder(bench.place / name)
        config = folder.config()
        engine = engine_settings(config, stage_file(2), 1, "fp32" if bench.dry else "bf16")
        wanted = need(
            config, bench.backbone_config, engine.precision, engine.sharding, engine.batching.micro_batch_size
        )
        found |= {f"{name}_gib": last_line(folder).get("gpu_peak_gib"), f"{name}_estimate_gib": wanted.device / GIB}
    return found
