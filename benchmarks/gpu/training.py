"""Training through the launcher: speed, memory, bits, optimizers and ZeRO stages."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu.commands import answer, finished, module
from benchmarks.gpu.parts import Bench
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

SPREAD = ("--train.expert_parallel", "2")
TRAIN_PHOTO_SIZE = "1024x768"  # all twelve views of 512 px show something, and drawing takes little


def training(bench: Bench) -> None:
    """Train the full head from a feature cache, the most needed numbers first."""
    bench.attempt("features, by the command", prepare, bench)
    twice_and_resumed(bench, "AdamW, ZeRO-2", "adamw", bench.sizes.epochs)
    bench.attempt("memory beside its estimate", memory, bench, "adamw")
    bench.attempt("saves in the background", saves, bench, "adamw")
    bench.attempt("features in the GPU's memory", run, bench, "device", *few(), "--data.features_in", "device")
    bench.attempt("from photos, with a validation", run, bench, "photos", *few(epochs=1), *from_photos(bench))
    bench.attempt("memory from photos beside its estimate", memory, bench, "photos")
    for stage in (1, 3):
        bench.attempt(f"AdamW, ZeRO-{stage}", partial(run, stage=stage), bench, f"zero{stage}", *few())
    for name in ("sophia_g", "sophia_h"):
        bench.attempt(name, run, bench, name, *few(), "--optim.name", name, "--optim.hessian_every", "4")
    twice_and_resumed(bench, "train.deterministic", "fixed", bench.sizes.few_epochs, "--train.deterministic", "true")
    bench.attempt("experts in one grouped product", run, bench, "grouped", *few(), "--train.grouped_mm", "true")
    bench.attempt("baseline", run, bench, "baseline", *few(), "--model.head", "single_view")
    bench.attempt("3 heads", run, bench, "heads", *few(), "--train.heads", "3")
    bench.attempt("features in the host's memory", run, bench, "host", *few(), "--data.features_in", "host")
    bench.attempt("`evaluate`, a process on each GPU", evaluated, bench, "photos")
    if bench.several > 1:
        whole = partial(run, processes=bench.several)
        bench.attempt("a process on each GPU", whole, bench, "several", *few())
        bench.attempt("a process on each GPU, experts over two", whole, bench, "spread", *few(), *SPREAD)


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


def run(bench: Bench, name: str, *options: str, stage: int = 2, processes: int = 1) -> dict[str, Any]:
    """Train in a folder of its own, under a ZeRO stage; returns what the run's last log line says."""
    folder = RunFolder(bench.place / name)
    words = (str(bench.place / "recipe.yaml"), "--train.run", str(folder.path), *options)
    if bench.dry and processes == 1 and name != "adamw":  # a rehearsal saves the launcher's imports, but for one run
        finished(bench, name, trained_here, words, stage_file(stage))
    else:
        accelerate = bench.place / f"{name}.yaml"
        accelerate.write_text(yaml.safe_dump(launch_settings(stage, processes)))
        finished(bench, name, module, "pipeline.launch.launcher", *words, "--config_file", str(accelerate))
    return {key: value for key, value in last_line(folder).items() if not isinstance(value, str | list)}


def last_line(folder: RunFolder) -> dict[str, Any]:
    """The last line about training in a run's log."""
    lines = map(json.loads, folder.metrics.read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"][-1]


def stage_file(stage: int) -> Path:
    """DeepSpeed's file of a ZeRO stage."""
    return ROOT / "ds_configs" / f"zero{stage}.json"


def launch_settings(stage: int, processes: int) -> dict[str, Any]:
    """Settings of `accelerate launch` for the GPUs of this machine, under a ZeRO stage."""
    settings: dict[str, Any] = yaml.safe_load((ACCELERATE_CONFIGS / "gpu.yaml").read_text())
    settings["deepspeed_config"]["deepspeed_config_file"] = str(stage_file(stage))
    return settings | {"num_processes": processes}


def trained_here(words: Sequence[str], deepspeed: Path) -> None:
    """Train in this process, without the launcher and its imports."""
    # This process is a fork. Its first threads would set up PyTorch's pool at the same time, which fails now and then.
    torch.set_num_threads(torch.get_num_threads())
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(deepspeed)
    sys.argv = ["train.py", "--config", *words]
    train.main()


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


def saves(bench: Bench, name: str) -> dict[str, Any]:
    """How long the saves of a finished run stopped training, and how long each was written in the background."""
    lines = map(json.loads, RunFolder(bench.place / name).metrics.read_text().splitlines())
    done = [line for line in lines if line["kind"] == "save"]
    return {"saves": len(done)} | {key: statistics.median(line[key] for line in done) for key in ("save_s", "write_s")}


def evaluated(bench: Bench, name: str) -> dict[str, Any]:
    """Evaluate a finished run on its validation photos; loading is in `wall_s`."""
    folder = RunFolder(bench.place / name)
    start = time.perf_counter()
    answer(bench, "evaluate", "evaluate", "--run", str(folder.path), "--splits", "val")
    wall_s = time.perf_counter() - start
    photos = len((folder.path / "predictions.csv").read_text().splitlines()) - 1
    return {"processes": bench.several, "photos": photos, "wall_s": wall_s}


def memory(bench: Bench, name: str) -> dict[str, Any]:
    """The peak of a finished run under ZeRO-2, and what `doctor` would have estimated for it."""
    folder = RunFolder(bench.place / name)
    config = folder.config()
    engine = engine_settings(config, stage_file(2), 1, "fp32" if bench.dry else "bf16")
    wanted = need(config, bench.backbone_config, engine.precision, engine.sharding, engine.batching.micro_batch_size)
    return {"peak_gib": last_line(folder).get("gpu_peak_gib"), "estimate_gib": wanted.device / GIB}
