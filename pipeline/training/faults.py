"""What a run does about a loss or gradient that is not finite: name the samples, skip, roll back, give up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.checkpoints.checkpoints import Checkpoints
from pipeline.config import TrainConfig
from pipeline.data.batch import Batch
from pipeline.distributed.agreement import Agreement
from pipeline.distributed.engine_tensors import EngineAverage
from pipeline.distributed.skipping import count_steps
from pipeline.model.output import RoadworkOutput
from pipeline.progress import say
from pipeline.training.loader import TrainLoader
from pipeline.training.state import TrainState

NAMES_SAID = 8  # on one line; metrics.jsonl has them all


@dataclass
class FaultPolicy:
    """Skips a step that is not finite; after `train.max_skips` in a row goes back to the last checkpoint's weights."""

    config: TrainConfig
    engine: Any
    average: EngineAverage
    checkpoints: Checkpoints | None
    """None in a dry run."""
    loader: TrainLoader
    """Names the samples of a step."""
    agreement: Agreement

    def after_skip(
        self,
        state: TrainState,
        batches: Sequence[Batch],
        outputs: Sequence[RoadworkOutput],
        write: Callable[[dict[str, Any]], None],
    ) -> bool:
        """Name the samples of a skipped step, and roll back after several in a row. Collective.

        Args:
            state: The run's state, which counts the step and its skip already.
            batches: This rank's micro-batches of the step.
            outputs: The model's outputs for them.
            write: Appends a line to metrics.jsonl.

        Returns:
            Whether the weights were rolled back to a checkpoint's.

        Raises:
            FloatingPointError: There is no checkpoint to roll back to, or there were too many roll-backs.
        """
        count_steps(self.engine, state.step)
        reason, names = find_bad_samples(self.agreement, self.loader, batches, outputs)
        most = self.config.max_skips
        write({"kind": "skip", "step": state.step, "reason": reason, "samples": names, "in_a_row": state.skips})
        if self.agreement.is_first:
            say(
                f"step {state.step} skipped: its {reason} is not finite; samples: {in_words(names)} "
                f"({state.skips} in a row, {most} make a roll-back)"
            )
        if state.skips < most:
            return False
        self._roll_back(state, reason, write)
        return True

    def _roll_back(self, state: TrainState, reason: str, write: Callable[[dict[str, Any]], None]) -> None:
        """Restore the last checkpoint's weights, optimizer and average, and keep the step. Collective.

        The samples of the failed steps would fail again, so they are passed over, and so are those since the
        checkpoint. The order of samples thus still follows from the step alone. (PaLM passed over the batches around a
        spike in the same way, arXiv 2204.02311, section 5.1.)
        """
        trouble = f"{state.skips} steps in a row up to step {state.step} had no finite {reason}"
        cure = (
            "fix or leave out the samples that metrics.jsonl names, or begin another --train.run with a lower optim.lr"
        )
        if state.rollbacks >= self.config.max_rollbacks:
            raise FloatingPointError(f"{trouble}, after {state.rollbacks} roll-backs; {cure}")
        saved = self.checkpoints.restore(self.engine, self.average) if self.checkpoints else None
        if saved is None:
            raise FloatingPointError(f"{trouble}, and there is no checkpoint yet to roll back to; {cure}")
        state.skips, state.rollbacks = 0, state.rollbacks + 1
        count_steps(self.engine, state.step)
        write({"kind": "rollback", "step": state.step, "to": saved["step"]})
        if self.agreement.is_first:
            say(
                f"{trouble}: rolled back to the weights of step {saved['step']}, and the samples in between are passed "
                f"over (roll-back {state.rollbacks} of {self.config.max_rollbacks})"
            )


def find_bad_samples(
    agreement: Agreement, loader: TrainLoader, batches: Sequence[Batch], outputs: Sequence[RoadworkOutput]
) -> tuple[str, list[str]]:
    """Find the samples of a step, over all ranks, whose own losses are not finite. Collective.

    Args:
        agreement: Gathers over the ranks.
        loader: The training loader, which knows the samples' names.
        batches: This rank's micro-batches of the step.
        outputs: The model's outputs for them.

    Returns:
        What was not finite, "loss" or "gradient", and the samples' names; where every loss is finite, all of the step.
    """
    names = [loader.name(row) for batch in batches for row in batch["row"].tolist()]
    sound = [flag for output in outputs for flag in is_finite(output).tolist()]
    found = [pair for pairs in agreement.gather(list(zip(names, sound, strict=True))) for pair in pairs]
    bad = [name for name, flag in found if not flag]
    return ("loss", bad) if bad else ("gradient", [name for name, _ in found])


def is_finite(output: RoadworkOutput) -> torch.Tensor:
    """Which samples have a finite loss in every term: bool [B]."""
    assert output.loss_terms is not None
    return torch.stack([values.detach().isfinite() for values in output.loss_terms.values()]).all(dim=0)


def in_words(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:NAMES_SAID]) + (f" and {len(names) - NAMES_SAID} more" if len(names) > NAMES_SAID else "")
