"""Where a run stands: everything in a checkpoint but tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass
class TrainState:
    """The trainer's state, the same on every rank."""

    batch_size: int
    """Samples per optimizer step, over all ranks."""
    step: int = 0
    """Optimizer steps taken, skipped ones among them."""
    best: dict[str, Any] | None = None
    """`step` and the scores of the best validation, the one with the lowest loss."""
    validations_since_best: int = 0
    validated_step: int = 0
    """The step of the last validation."""
    wall_s: float = 0.0
    """Seconds of training, those before a resume included."""
    skips: int = 0
    """Skipped steps in a row up to now."""
    rollbacks: int = 0

    @property
    def samples_seen(self) -> int:
        """The position in the sequence of samples: the whole data state."""
        return self.step * self.batch_size

    def to_json(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {**vars(self), "samples_seen": self.samples_seen}

    @classmethod
    def from_json(cls, values: dict[str, Any], batch_size: int) -> TrainState:
        """The inverse of `to_json`; other keys, such as the run's configuration, are ignored."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**{**known, "batch_size": batch_size})

    def add_validation(self, scores: dict[str, Any]) -> bool:
        """Record the scores of a validation at this step; returns whether its loss is the lowest so far.

        The loss is smooth, and depends on no cut; the MCC of a few hundred photos jumps by more than epochs differ.
        """
        better = self.best is None or scores["loss"] < self.best["loss"]
        if better:
            self.best, self.validations_since_best = {"step": self.step, **scores}, 0
        else:
            self.validations_since_best += 1
        self.validated_step = self.step
        return better

    def is_out_of_patience(self, patience: int) -> bool:
        """Whether the last `train.patience` validations brought no lower loss; 0 never runs out."""
        return 0 < patience <= self.validations_since_best

    def summary(self, samples_per_epoch: int) -> dict[str, Any]:
        """The part of summary.json about training."""
        best = None
        if self.best is not None:
            best = {"step": self.best["step"], "val": {key: self.best[key] for key in self.best if key != "step"}}
        return {
            "steps": self.step,
            "epochs": round(self.samples_seen / samples_per_epoch, 3),
            "validated_step": self.validated_step,
            "samples_seen": self.samples_seen,
            "wall_s": round(self.wall_s, 1),
            "images_per_s": round(self.samples_seen / max(self.wall_s, 1e-9), 2),
            "best": best,
        }
