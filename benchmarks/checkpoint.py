"""What a checkpoint costs: bytes, time that training stands still, time to resume, and whether an upload slows steps.

One process with a DeepSpeed engine around the head; the backbone is frozen and in no checkpoint. Theirs is DeepSpeed's
own `save_checkpoint`, a pickle for this number of processes, without weight average, hashes, or a flush to the disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.form import Goal, Report, Row, compare, interleave, machine, publish, timed, versions
from benchmarks.parity_cells import photo
from pipeline.checkpoints.checkpoints import Checkpoints
from pipeline.checkpoints.files import FILES, name_of
from pipeline.checkpoints.retention import Retention
from pipeline.checkpoints.sync import Remote, Uploader
from pipeline.cli import command
from pipeline.config import CheckpointConfig, Config
from pipeline.data.batch import collate, model_inputs
from pipeline.distributed import EngineAverage, create_optimizer_state, start
from pipeline.model.config import ModelConfig
from pipeline.model.roadwork import RoadworkConfig, RoadworkModel
from pipeline.optim.build import build_optimizer
from pipeline.progress import silence_libraries

PACKAGES = ("torch", "deepspeed", "safetensors", "fsspec")
SIZE_GOAL = Goal(1.05, at_most=True)
STEP_GOAL = Goal(1.05, at_most=True)
STATE: dict[str, Any] = {"best": None}
STEPS_ALONE = 3
LONGEST_S = 600.0


@dataclass(frozen=True)
class Plan:
    """How large the head is and how much is measured."""

    sizes: ModelConfig = field(default_factory=ModelConfig)
    dim: int = 1280
    photos: int = 2
    rounds: int = 5


FULL = Plan()
QUICK = Plan(replace(FULL.sizes, width=256, expert_width=1024, layers=2), photos=1, rounds=3)


class Subject:
    """An engine in training and its checkpoints."""

    def __init__(self, plan: Plan, place: Path, seed: int):
        """Build the head with random weights on random tokens, and take a first step."""
        accelerator = start(
            batch_size=plan.photos, accumulation=1, grad_clip=1.0, precision="fp32", log_with=[], hang_minutes=10,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = RoadworkModel(RoadworkConfig(backbone_dim=plan.dim, **asdict(plan.sizes))).train()
        config = Config(model=plan.sizes)
        model.loss_config = config.loss
        self.accelerator, self.place = accelerator, place
        self.engine, _ = accelerator.prepare(model, build_optimizer(model, config.optim))
        create_optimizer_state(self.engine)
        self.average = EngineAverage(model, config.train.ema_decay)
        self.photos = collate([photo(row, plan.dim, plan.sizes) for row in range(plan.photos)])
        self.checkpoints = Checkpoints(place / "ours", config, rank=0)
        settings = CheckpointConfig(sync=f"file://{place}/synced", sync_wait_s=LONGEST_S)
        self.synced = Checkpoints(place / "ours-synced", Config(model=plan.sizes, checkpoint=settings), rank=0)
        self.uploads = self.saved = 0
        self.step()
        for checkpoints in (self.checkpoints, self.synced):
            assert checkpoints.restore(self.engine, self.average) is None

    def step(self) -> None:
        """One optimizer step."""
        output = self.engine(
            **model_inputs(self.photos), labels=self.photos["labels"], mask_targets=self.photos["mask_targets"]
        )
        self.accelerator.backward(output.loss)

    def trained_bytes(self) -> int:
        """Weights, their average, and two moments, of 32 bits each."""
        return sum(4 * 4 * parameter.numel() for parameter in self.engine.module.parameters())

    def save(self, checkpoints: Checkpoints) -> float:
        """Seconds that training stands still."""
        self.saved += 1
        return timed(lambda: checkpoints.save(self.saved, self.engine, self.average, STATE)).wall_s

    def restore(self) -> float:
        """Seconds to check the newest checkpoint and set everything."""
        return timed(lambda: self.checkpoints.restore(self.engine, self.average)).wall_s

    def save_theirs(self) -> float:
        """See the module."""
        shutil.rmtree(self.place / "theirs", ignore_errors=True)
        return timed(lambda: self.engine.save_checkpoint(str(self.place / "theirs"), tag="one")).wall_s

    def restore_theirs(self) -> float:
        """See the module."""
        seconds = timed(lambda: self.engine.load_checkpoint(str(self.place / "theirs"), tag="one")).wall_s
        create_optimizer_state(self.engine)  # theirs puts another in its place, which the parameters do not know
        return seconds

    def steps(self) -> float:
        """Seconds per step."""
        began = time.perf_counter()
        for _ in range(STEPS_ALONE):
            self.step()
        return (time.perf_counter() - began) / STEPS_ALONE

    def steps_beside_an_upload(self) -> float:
        """Seconds per step, from the beginning of an upload of all that is here to its end."""
        self.uploads += 1
        there = self.place / f"upload-{self.uploads}"
        uploader = Uploader(Remote(f"file://{there}"), self.place / "ours", Retention(2, 0))
        began, steps = time.perf_counter(), 0
        uploader.start(new=False)
        while steps == 0 or not uploader.wait(0):
            self.step()
            steps += 1
        spent = time.perf_counter() - began
        uploader.close(0)
        shutil.rmtree(there)
        return spent / steps


def checkpoint(quick: bool = False, out: Path | None = None, seed: int = 0) -> Path:
    """Measure what checkpoints cost, beside DeepSpeed's own.

    The files need 8 GB in the folder for temporary files.

    Args:
        quick: A smaller head and fewer rounds, in 90 seconds on two cores.
        out: Folder for checkpoint.json; benchmarks/results if not given, or runs/benchmarks with --quick.
        seed: Of the weights and of the order of measuring.
    """
    # In a process of its own, since DeepSpeed's settings stay with a process until its end.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        rows = pool.submit(measure, QUICK if quick else FULL, seed).result()
    return publish(Report("checkpoint", machine(), versions(PACKAGES), seed, rows), out, quick)


def measure(plan: Plan, seed: int) -> tuple[Row, ...]:
    """All rows of the benchmark."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    silence_libraries()
    with tempfile.TemporaryDirectory(prefix="roadwork-checkpoint-") as place:
        subject = Subject(plan, Path(place), seed)
        arms = {
            "save": lambda: subject.save(subject.checkpoints),
            "save synced": lambda: subject.save(subject.synced),
            "save theirs": subject.save_theirs,
            "restore": subject.restore,
            "restore theirs": subject.restore_theirs,
            "steps": subject.steps,
            "steps uploading": subject.steps_beside_an_upload,
        }
        for arm in arms.values():  # so that there is something to restore, and modules are loaded
            arm()
        assert subject.synced.uploader
        found = interleave(arms, plan.rounds, seed)
        subject.synced.close()
        size = size_row(subject)
        dist.destroy_process_group()
    note = f"head of {subject.trained_bytes() / 16e6:.1f} M parameters, {plan.rounds} rounds"
    deepspeed = "DeepSpeed's own"

    def row(what: str, against: str, ours: str, theirs: str, goal: Goal | None = None, more: str = "") -> Row:
        return compare(what, against, found[ours], found[theirs], "s", goal, f"{note}{more}")

    return (
        replace(size, note=note),
        row("time stopped by a save", deepspeed, "save", "save theirs", None,
            "; ours averages, hashes and flushes to the disk, theirs does none of these"),
        row("time to resume", deepspeed, "restore", "restore theirs", None, "; ours checks every hash"),
        row("time stopped by a save, uploading", "without upload", "save synced", "save", None,
            "; to a folder on the same disk, where upload and save share its speed"),
        row("step during an upload", "without upload", "steps uploading", "steps", STEP_GOAL,
            f"; one thread computes, one uploads to a folder on the same disk; {plan.photos} photos per step"),
    )  # fmt: skip


def size_row(subject: Subject) -> Row:
    """Bytes on the disk against bytes of what is trained; there is no chance in it."""
    folder = subject.place / "ours" / name_of(max(int(p.name[5:]) for p in (subject.place / "ours").glob("step-*")))
    assert all((folder / name).is_file() for name in FILES)
    ours, theirs = sum(file.stat().st_size for file in folder.iterdir()) / 2**20, subject.trained_bytes() / 2**20
    ratio = ours / theirs
    return Row(
        "size of a checkpoint", "weights, average, moments", ours, theirs, "MiB", ratio, (ratio, ratio),
        str(SIZE_GOAL), SIZE_GOAL.met_by(ratio, ratio), "",
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(command(checkpoint))
