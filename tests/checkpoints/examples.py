"""A run's checkpoints without a run: a module of two layers in the place of a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.checkpoints import checkpoints
from pipeline.checkpoints.checkpoints import Checkpoints
from pipeline.checkpoints.files import AVERAGE, OPTIMIZER, WEIGHTS, write_checkpoint
from pipeline.config import CheckpointConfig, Config

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE: dict[str, Any] = {"best": None, "wall_s": 1.5}


def tensors_of(seed: int, width: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    """The files of a checkpoint, with other numbers for each seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (width, 3), "b.bias": (5,)}
    weights, average = (
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)
    )
    moments = {
        f"{name}/{kind}": torch.randn(shape, generator=generator) for name, shape in shapes.items() for kind in MOMENTS
    }
    return {WEIGHTS: weights, OPTIMIZER: moments, AVERAGE: average}


def write(folder: Path, *steps: int) -> list[Path]:
    """Checkpoints of some steps."""
    return [write_checkpoint(folder, step, tensors_of(step), STATE) for step in steps]


@contextmanager
def process_group(store: Path) -> Iterator[None]:
    """A world of one process."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Average(SimpleNamespace):
    """Stands for a `WeightAverage`."""

    def gathered(self) -> dict[str, torch.Tensor]:
        """All of it."""
        return self.tensors

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, one by one."""
        yield from self.tensors.items()

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse."""
        self.tensors = tensors


class Run:
    """What a trainer does with its checkpoints."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, width: int = 4, seed: int = 0, **settings: Any):
        """Restore at once, as a trainer does; `settings` are those of `CheckpointConfig`."""
        self.held = tensors_of(0, width)
        self.average = Average(tensors=self.held[AVERAGE])
        patch.setattr(checkpoints, "whole_weights", lambda engine: engine[WEIGHTS].items())
        patch.setattr(checkpoints, "whole_moments", lambda engine: engine[OPTIMIZER].items())
        patch.setattr(checkpoints, "set_tensors", self._set)
        config = Config(checkpoint=CheckpointConfig(**settings))
        config.train.seed = seed
        self.logged: list[dict[str, Any]] = []
        self.checkpoints = Checkpoints(folder, config, rank=0, log=self.logged.append)
        self.state = self.checkpoints.restore(self.held, self.average)

    def _set(self, engine: Any, weights: Any, moments: Any, step: int) -> None:
        engine[WEIGHTS], engine[OPTIMIZER] = weights, moments

    def save(self, step: int, best: int | None = None, wait: bool = True) -> None:
        """Save tensors that tell the step, and wait until they are on the disk."""
        self.held = tensors_of(step)
        self.average.tensors = self.held[AVERAGE]
        state = {**STATE, "best": None if best is None else {"step": best}}
        self.checkpoints.save(step, self.held, self.average, state)
        if wait:
            self.checkpoints.wait()

    def holds(self, step: int) -> bool:
        """Whether weights, optimizer state and average are those of a step."""
        wanted = tensors_of(step)
        found = {**self.held, AVERAGE: self.average.tensors}
        return all(
            found[file].keys() == values.keys() and all(torch.equal(found[file][n], v) for n, v in values.items())
            for file, values in wanted.items()
        )


def names(folder: Path) -> list[str]:
    """Checkpoints in a folder."""
    return sorted(path.name for path in folder.glob("step-*"))
