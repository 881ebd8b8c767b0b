"""A run's folder: configuration, provenance, metrics, and whether there is a run to resume."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.config import ROOT, Config, differences, read_config, to_yaml
from pipeline.data.index import Index
from pipeline.data.lock import locked
from pipeline.errors import UserError, in_checkout
from pipeline.evaluation.inference import load_model
from pipeline.evaluation.results import read_results
from pipeline.files import write_json, write_text
from pipeline.model.roadwork import RoadworkModel
from pipeline.names import Profile

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "numpy", "scikit-learn", "webdataset")


class RunFolder:
    """A run's files. In training rank 0 writes here, and the other ranks read."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.summary = path / "summary.json"
        self.metrics = path / "metrics.jsonl"
        self.stacks = path / "stacks"

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of an existing run.

        Raises:
            UserError: There is no such folder.
        """
        if not path.is_dir():
            raise UserError(f"no run at {path}; name the folder that training wrote")
        return cls(path)

    def config(self) -> Config:
        """The run's configuration."""
        return read_config(self.path / "config.yaml")

    def load_model(self, device: torch.device, backbone: str | None = None) -> RoadworkModel:
        """The best weights, in evaluation mode, on the backbone at its place of training or at another one."""
        model = load_model(self.model, device, backbone)
        model.config.decode_scale = self.config().data.decode_scale  # older models do not know how theirs were decoded
        return model

    def profile(self, profile: Profile) -> Path:
        """The folder that an evaluation in a profile writes to: the run folder itself for `native`."""
        return self.path if profile == "native" else self.path / profile

    def results(self, profile: Profile = "native") -> dict[str, Any]:
        """The summary of training and of the native evaluation, or that of another profile; empty if there is none."""
        return read_results(self.path, profile)

    def text_encoder(self) -> str | None:
        """The text encoder of the descriptions in the training shards; None where they had none."""
        provenance = self.path / "provenance.json"
        known = json.loads(provenance.read_text()) if provenance.is_file() else {}
        return known.get("data", {}).get("arguments", {}).get("text_encoder") or None

    def check(self, config: Config, index: Index) -> bool:
        """Check that the folder is free, or holds a run of the same configuration and data.

        Returns:
            Whether that run is finished.

        Raises:
            UserError: The folder holds something else.
        """
        known = self.path / "config.yaml"
        if not known.exists():
            if self.path.exists() and any(self.path.glob("*.safetensors")):
                raise UserError(f"{self.path} holds model files, not a run; choose another --train.run")
            return False
        changed = differences(asdict(read_config(known)), asdict(config))
        if changed:
            raise UserError(
                f"{self.path} holds a run with {changed[0]}; give the same value to resume it, or another "
                "--train.run to start anew"
            )
        before = json.loads((self.path / "provenance.json").read_text())
        if before["data"]["source_sha256"] != index.source_sha256:
            raise UserError(f"{self.path} holds a run on other shards; choose another --train.run")
        return "steps" in self.results()

    def locked(self) -> AbstractContextManager[bool]:
        """Keep other trainings out of the folder; see `pipeline.data.lock.locked`."""
        return locked(self.path, f"training {self.path}", "choose another --train.run")

    def create(self, config: Config, index: Index, world_size: int) -> None:
        """Write what a new run starts with; a resumed run keeps its files."""
        if not (self.path / "config.yaml").exists():
            write_json(self.path / "provenance.json", provenance(config, index, world_size))
            write_text(self.path / "config.yaml", to_yaml(config))

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a resumed run takes again."""
        if self.metrics.exists():
            lines = [line for line in self.metrics.read_text().splitlines() if _step_of(line) <= step]
            write_text(self.metrics, "".join(line + "\n" for line in lines))

    def log(self, values: dict[str, Any]) -> None:
        """Append one JSON line to `metrics.jsonl`."""
        with self.metrics.open("a") as stream:
            stream.write(json.dumps(values) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line cut off by a kill
        return float("inf")


def provenance(config: Config, index: Index, world_size: int) -> dict[str, Any]:
    """Versions, revision, data, seeds, command and hardware; no environment variables, which may hold secrets."""
    return {
        "command": [Path(sys.executable).name, *sys.argv],
        "seed": config.train.seed,
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "data": {
            "shards": config.data.shards,
            "source_sha256": index.source_sha256,
            "arguments": index.arguments,
            "samples": {name: len(split.samples) for name, split in index.splits.items()},
        },
        "hardware": hardware(world_size),
    }


def hardware(world_size: int) -> dict[str, Any]:
    """The machine that a figure was measured on."""
    return {
        "processes": world_size,
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_revision() -> str | None:
    """The project's commit, with `+` when the tree has changes; None outside a checkout."""
    if not in_checkout():
        return None  # the environment that holds the wheel may lie in a repository of the user's
    try:
        revision = _git(ROOT, "rev-parse", "HEAD")
        return revision + ("+" if _git(ROOT, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", root, *words], check=True, capture_output=True, text=True).stdout.strip()
