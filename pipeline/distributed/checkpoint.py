"""Checkpoints as named tensors: nothing pickled, and nothing of the world size in the files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.distributed.engine_tensors import gather_tensors, set_tensors
from pipeline.files import sha256_of, sync, write_json
from pipeline.optim.ema import WeightAverage
from pipeline.progress import say

MANIFEST = "manifest.json"  # written last: a checkpoint without it does not exist


class Checkpoints:
    """Saves and restores a DeepSpeed engine (ZeRO-1 or 2), its weight average and the trainer's state.

    Files of `step-00001234/`: `weights.safetensors` (fp32 master weights by parameter name), `optimizer.safetensors`
    (`<parameter>/exp_avg`, `<parameter>/exp_avg_sq`), `average.safetensors`, `state.json`, and `manifest.json` with the
    SHA-256 of each. A folder is written under a hidden name and renamed when it is whole.
    """

    def __init__(self, folder: Path, keep: int, rank: int):
        """Keep the latest `keep` checkpoints in `folder`; rank 0 writes."""
        self.folder, self.keep, self.rank = folder, keep, rank

    def save(self, step: int, engine: Any, average: WeightAverage, state: dict[str, Any]) -> None:
        """Write a checkpoint. Collective: all ranks call it.

        Args:
            step: Optimizer steps taken.
            engine: The DeepSpeed engine.
            average: Of the engine's weights, the same on every rank.
            state: JSON values of the trainer.
        """
        weights, moments = gather_tensors(engine)
        averaged = average.gathered()
        if self.rank == 0:
            files = {
                "weights.safetensors": weights,
                "optimizer.safetensors": moments,
                "average.safetensors": averaged,
            }
            self._write(step, files, {"step": step, **state})
        dist.barrier()

    def restore(self, engine: Any, average: WeightAverage) -> dict[str, Any] | None:
        """Restore the newest valid checkpoint. Collective: all ranks call it.

        Returns:
            The trainer's state, or None when there is no checkpoint.
        """
        choice: list[Path | None] = [self._newest_valid() if self.rank == 0 else None]
        dist.broadcast_object_list(choice)
        path = choice[0]
        if path is None:
            return None
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        weights, moments = (read_tensors(path / f"{name}.safetensors") for name in ("weights", "optimizer"))
        set_tensors(engine, weights, moments, state["step"])
        average.load(read_tensors(path / "average.safetensors"))
        return state

    def _write(self, step: int, files: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in files.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / name)
        write_json(temporary / "state.json", state)
        names = [*files, "state.json"]
        write_json(temporary / MANIFEST, {name: sha256_of(temporary / name) for name in names})
        for name in names:
            sync(temporary / name)
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        sync(self.folder)
        for old in self._all()[self.keep :]:
            shutil.rmtree(old)

    def _all(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _newest_valid(self) -> Path | None:
        for path in self._all():
            problem = find_damage(path)
            if problem is None:
                return path
            say(f"checkpoint {path} is damaged ({problem}); trying the one before it")
        return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, digest in manifest.items():
            if sha256_of(path / Path(name).name) != digest:
                return f"{name} has changed"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file."""
    with safe_open(path, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
