"""What a checkpoint costs: bytes, time that training stands still, steps slowed down by a write, and time to resume.

One process on the CPU with a DeepSpeed engine around the head; the backbone is frozen and in no checkpoint. Theirs is
DeepSpeed's own `save_checkpoint`, a pickle for this number of processes, without weight average, hashes, or a flush to
the disk.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.form import Goal, Report, Row, compare, exact, interleave, machine, publish, timed, versions
from benchmarks.loops import engine_step, make_trainer
from benchmarks.parity_cells import photo
from benchmarks.processes import run_apart
from pipeline.checkpoints.files import FILES, name_of
from pipeline.cli import command
from pipeline.config import Config, TrainConfig
from pipeline.data.batch import collate
from pipeline.distributed.engine_tensors import create_optimizer_state
from pipeline.distributed.settings import find_deepspeed
from pipeline.model.config import ModelConfig
from pipeline.model.roadwork import RoadworkConfig, RoadworkModel
from pipeline.training.plan import Schedule
from pipeline.training.run_folder import RunFolder

PACKAGES = ("torch", "deepspeed", "safetensors", "fsspec")
SAVE_GOAL = Goal(1.0, at_most=True)
SIZE_GOAL = Goal(1.05, at_most=True)
STATE: dict[str, Any] = {"best": None}


@dataclass(frozen=True)
class Plan:
    """Size of the head, and how much is measured."""

    sizes: ModelConfig = field(default_factory=ModelConfig)
    dim: int = 1280
    photos: int = 2
    rounds: int = 5


FULL = Plan()
QUICK = Plan(replace(FULL.sizes, width=256, expert_width=1024, layers=2), photos=1, rounds=3)


class Subject:
    """A trainer and its checkpoints."""

    def __init__(self, plan: Plan, place: Path, seed: int):
        """Build the head with random weights on random tokens, and take a first step."""
        config = Config(train=TrainConfig(batch_size=plan.photos, micro_batch_size=plan.photos), model=plan.sizes)
        torch.manual_seed(seed)
        model = RoadworkModel(RoadworkConfig(backbone_dim=plan.dim, **asdict(plan.sizes)), config.loss)
        file, schedule = find_deepspeed("ds_configs/zero2.json"), Schedule(plan.photos, 1, frozenset())
        self.place = place
        self.trainer = make_trainer(config, model, file, schedule, folder=RunFolder(place / "ours"))
        self.engine, self.average = self.trainer.engine, self.trainer.average
        assert self.trainer.checkpoints is not None
        self.checkpoints, self.saved = self.trainer.checkpoints, 0
        self.batch = collate([photo(row, plan.dim, plan.sizes) for row in range(plan.photos)])
        self.step()
        assert self.checkpoints.restore(self.engine, self.average) is None

    def trained_bytes(self) -> int:
        """Bytes of weights, their average, and two moments, of 32 bits each."""
        return sum(4 * 4 * parameter.numel() for parameter in self.engine.module.parameters())

    def save(self) -> float:
        """Seconds that training stands still, where no earlier save is waited for."""
        seconds = timed(self._begin_save).wall_s
        self.checkpoints.wait()
        return seconds

    def save_and_wait(self) -> float:
        """Seconds until a save is on the disk, as at the end of a run."""

        def save() -> None:
            self._begin_save()
            self.checkpoints.wait()

        return timed(save).wall_s

    def step(self) -> float:
        """Seconds of an optimizer step."""
        return timed(lambda: engine_step(self.trainer, [self.batch])).wall_s

    def step_in_a_write(self) -> float:
        """Seconds of the step after a save, while its files are written; the write may end before the step does."""
        self._begin_save()
        seconds = self.step()
        self.checkpoints.wait()
        return seconds

    def _begin_save(self) -> None:
        self.saved += 1
        self.checkpoints.save(self.saved, self.engine, self.average, STATE)

    def restore(self) -> float:
        """Seconds to check the newest checkpoint and restore it."""
        return timed(lambda: self.checkpoints.restore(self.engine, self.average)).wall_s

    def newest_bytes(self) -> int:
        """Bytes of the newest checkpoint on the disk."""
        newest = self.checkpoints.folder / name_of(self.saved)
        assert all((newest / name).is_file() for name in FILES)
        return sum(file.stat().st_size for file in newest.iterdir())

    def save_theirs(self) -> float:
        """Seconds that training stands still while DeepSpeed saves."""
        shutil.rmtree(self.place / "theirs", ignore_errors=True)
        return timed(lambda: self.engine.save_checkpoint(str(self.place / "theirs"), tag="one")).wall_s

    def restore_theirs(self) -> float:
        """Seconds in which DeepSpeed restores its checkpoint."""
        seconds = timed(lambda: self.engine.load_checkpoint(str(self.place / "theirs"), tag="one")).wall_s
        create_optimizer_state(self.engine)  # DeepSpeed replaces the state, and parameters lose their link to it
        return seconds


def checkpoint(quick: bool = False, out: Path | None = None, seed: int = 0) -> Path:
    """Measure what checkpoints cost, beside DeepSpeed's own.

    The files need 8 GB in the folder for temporary files.

    Args:
        quick: A smaller head and fewer rounds, in 90 seconds on two cores.
        out: Folder for checkpoint.json; benchmarks/results if not given, or runs/benchmarks with --quick.
        seed: Seed of the weights and of the order of measuring.
    """
    rows = run_apart(measure, 1, QUICK if quick else FULL, seed)
    return publish(Report("checkpoint", machine(), versions(PACKAGES), seed, rows), out, quick)


def measure(plan: Plan, seed: int) -> tuple[Row, ...]:
    """All rows of the benchmark, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="roadwork-checkpoint-") as place:
        subject = Subject(plan, Path(place), seed)
        arms = {
            "save": subject.save,
            "save theirs": subject.save_theirs,
            "save and wait": subject.save_and_wait,
            "step": subject.step,
            "step in a write": subject.step_in_a_write,
            "restore": subject.restore,
            "restore theirs": subject.restore_theirs,
        }
        for arm in arms.values():  # so that there is something to restore, and modules are loaded
            arm()
        found = interleave(arms, plan.rounds, seed)
        written, trained = subject.newest_bytes(), subject.trained_bytes()
        write_s = subject.checkpoints.summary()["write_s"]
    note, against = f"head of {trained / 16e6:.1f} M parameters, {plan.rounds} rounds", "DeepSpeed's own"
    size, resumed = (written / 2**20, trained / 2**20), f"{note}; ours checks every hash"
    copied = f"{note}; ours copies, the weight average too, and a thread writes the copy"
    flushed = f"{note}; ours has the weight average too, hashes and flushes to the disk, theirs does none of these"
    slowed = f"{note}, {plan.photos} photos a step; a write takes {write_s:g} s on average, in one thread"
    stopped, whole, theirs = found["save"], found["save and wait"], found["save theirs"]
    return (
        exact("size of a checkpoint", "weights, average, moments", *size, "MiB", SIZE_GOAL, note),
        compare("time stopped by a save", against, stopped, theirs, "s", SAVE_GOAL, copied),
        compare("time until a save is on the disk", against, whole, theirs, "s", None, flushed),
        compare("step during a write", "without", found["step in a write"], found["step"], "s", None, slowed),
        compare("time to resume", against, found["restore"], found["restore theirs"], "s", None, resumed),
    )


if __name__ == "__main__":
    raise SystemExit(command(checkpoint))
