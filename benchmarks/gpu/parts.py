"""The parts of a measurement: each has a process and a time limit, and writes a line to a file for each number at once.

So if a call is cut off, a part hangs, or a kernel crashes its process, the numbers that were measured before are kept.
"""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModel, DINOv3ViTConfig

from benchmarks.form import machine, versions
from data_prep.scenes.data_set import scenes
from data_prep.scenes.pretraining import scenes_tiny_config
from pipeline.model.backbone import vith16plus_config
from pipeline.model.config import ModelConfig
from pipeline.progress import say, silence_libraries

CALL_LIMIT_S = 460.0
LOOK_EVERY_S = 0.5  # for processes that a part has started: once it has died, nothing says which ones were its own
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
NVIDIA_SMI = "nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader"
DRY_NOTE = "a rehearsal on a CPU with tiny sizes: no figure here says anything about a GPU"
RESIDUAL_SCALE = 0.1  # at DINOv3's 1, the residuals of random layers would drown what came before


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    view_side: int = 512
    pass_views: int = 192
    """Views in one pass of the backbone."""
    photos: int = 64
    """Photos that extraction and prediction read from files."""
    photo_size: str = "4032x3024"
    train_photos: int = 256
    batch_size: int = 64
    photo_batch: int = 16
    """Photos of a micro-batch in training from photos."""
    epochs: int = 60
    """Epochs of the training whose speed is measured."""
    few_epochs: int = 8
    """Epochs of training for its bits alone."""
    repeats: int = 5
    run_limit_s: float = 75.0
    """For one run of training or one command."""


PATIENCE = 4  # a rehearsal shares its cores with others
DRY = Sizes(64, 24, 4, "320x240", 24, 8, 8, epochs=4, few_epochs=2, repeats=2, run_limit_s=PATIENCE * 75.0)
DRY_HEAD = {"width": 32, "layers": 1, "heads": 2, "fusion_heads": 2, "experts": 2, "experts_per_token": 1,
            "expert_width": 16}  # fmt: skip


@dataclass
class Bench:
    """The tools of a part: the file for its numbers, the device, sizes, clocks and a backbone with random weights."""

    part: str
    file: Path
    place: Path
    """Folder for this call's photos, weights and runs; it is removed afterwards."""
    dry: bool

    def __post_init__(self) -> None:
        self.start = time.perf_counter()
        self.sizes = DRY if self.dry else Sizes()
        self.device = torch.device("cpu") if self.dry else torch.device("cuda", 0)

    def write(self, what: str, **found: Any) -> None:
        """Add a line to the file."""
        digits = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}
        line = {"part": self.part, "what": what, "at_s": round(time.perf_counter() - self.start, 1), **digits}
        append(self.file, line | ({"dry": True} if self.dry else {}))

    def attempt(self, what: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Write what `work` finds, or how it fails."""
        try:
            if not self.dry:
                torch.cuda.empty_cache()
            self.write(what, **work(*arguments))
        except Exception as error:
            traceback.print_exc()
            self.write(what, failed=f"{type(error).__name__}: {str(error)[-600:]}")

    def wait(self) -> None:
        """Wait for everything that was queued on the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Median time of a call; the first one, which may compile, is not in it."""
        work()
        return statistics.median(self.once(work) for _ in range(self.sizes.repeats))

    def once(self, work: Callable[[], object]) -> float:
        """Time of this call."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def peak_gb(self, work: Callable[[], object]) -> float:
        """The most GPU memory that `work` takes beyond what was taken before, in GB; 0 on the CPU."""
        if self.dry:
            work()
            return 0.0
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        self.wait()
        return round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)

    @property
    def several(self) -> int:
        """The number of processes that share a command's work: one for each GPU, two in a rehearsal."""
        return 2 if self.dry else torch.cuda.device_count()

    @property
    def backbone_config(self) -> DINOv3ViTConfig:
        """DINOv3 ViT-H/16+; in a rehearsal `scenes-tiny`'s, which has the same parts."""
        config = scenes_tiny_config() if self.dry else vith16plus_config()
        config.layerscale_value = RESIDUAL_SCALE
        return config

    @cached_property
    def backbone(self) -> str:
        """Folder of a backbone with random weights, which change no speed; all parts of a call share it."""
        folder = self.place / "backbone"
        if not folder.exists():
            torch.manual_seed(0)
            with torch.device(self.device):
                model = AutoModel.from_config(self.backbone_config).to(torch.bfloat16)
            model.save_pretrained(folder.with_suffix(".new"))
            folder.with_suffix(".new").rename(folder)
        return str(folder)

    @cached_property
    def photos(self) -> Path:
        """Folder of procedural scenes as `prep scenes` makes it; all parts of a call share it."""
        folder = self.place / "photos"
        if not folder.exists():
            scenes(folder.with_suffix(".new"), self.sizes.photos, self.sizes.photo_size, workers=1 if self.dry else 0)
            folder.with_suffix(".new").rename(folder)
        return folder

    def model_config(self, **changes: Any) -> ModelConfig:
        """The full model on that backbone."""
        sizes = {"backbone": self.backbone, "view_side": self.sizes.view_side, **(DRY_HEAD if self.dry else {})}
        return ModelConfig(**{**sizes, **changes})


def cosine_distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest 1 - cosine of any token with its counterpart: [..., D]."""
    return 1 - torch.cosine_similarity(ours.double(), theirs.double(), dim=-1).min().item()


def append(file: Path, line: dict[str, Any]) -> None:
    """Append a JSON line to a file, and print it."""
    text = json.dumps(line)
    with file.open("a") as stream:
        stream.write(text + "\n")
    say(text)


def run_parts(name: str, parts: Mapping[str, float], out: Path, dry: bool) -> Path:
    """Run one part after the other; none of them can keep the next one from running.

    Args:
        name: The part of the file's name that follows the hardware.
        parts: `package.module:part`, a function that takes a `Bench`, and its limit in seconds.
        out: Folder for the file.
        dry: See `benchmarks.gpu.gpu`.

    Returns:
        The file.
    """
    here, started = machine(), time.perf_counter()
    call_limit_s = CALL_LIMIT_S * (PATIENCE if dry else 1)
    file = out / f"{'dry-' if dry else ''}{here['name']}-{name}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    about: dict[str, Any] = {"note": DRY_NOTE} if dry else {"driver": subprocess.getoutput(NVIDIA_SMI)}
    cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    append(file, {"name": name, "dry": dry, **about, "machine": here, "versions": versions(PACKAGES) | cuda})
    if dry:  # the parts are forks of this process, so that they share one import
        for function in parts:
            importlib.import_module(function.partition(":")[0])
    with tempfile.TemporaryDirectory(prefix="roadwork-gpu-") as place:
        for function, own_limit_s in parts.items():
            bench = Bench(function.partition(":")[2], file, Path(place), dry)
            # A fork of a process that has talked to a GPU cannot use it.
            start = get_context("fork").Process if dry else get_context("spawn").Process
            process = start(target=enter, args=(function, bench))
            limit_s = max(0.0, min(own_limit_s, call_limit_s - (time.perf_counter() - started)))
            status = finish(process, limit_s)
            if status == 0:
                bench.write("end")
            elif status is None:
                bench.write("end", failed=f"took longer than its limit of {limit_s:.0f} s")
            else:
                bench.write("end", failed=f"its process ended with status {status}")
    return file.resolve()


def enter(function: str, bench: Bench) -> None:
    """Run a part, in its own process."""
    if bench.dry:
        torch.set_num_threads(1)
    work = getattr(importlib.import_module(function.partition(":")[0]), bench.part)
    silence_libraries()
    work(bench)


def finish(process: BaseProcess, limit_s: float) -> int | None:
    """Start a process and wait for it; what it started and left behind is killed, lest it keep the GPU busy.

    Returns:
        The exit status, or None where the process took too long and was killed.
    """
    process.start()
    assert process.pid is not None
    parent, descendants = psutil.Process(process.pid), set[psutil.Process]()
    end = time.monotonic() + limit_s
    while process.is_alive() and (left_s := end - time.monotonic()) > 0:
        process.join(min(left_s, LOOK_EVERY_S))
        descendants |= started_by(parent)
    status = None if process.is_alive() else process.exitcode
    for one in (*descendants, *started_by(parent), parent):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.join()
    return status


def started_by(parent: psutil.Process) -> set[psutil.Process]:
    """All living descendants of a process: launches have sessions of their own, and no signal to a group finds them."""
    with suppress(psutil.NoSuchProcess):
        return set(parent.children(recursive=True))
    return set()
