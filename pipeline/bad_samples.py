"""Which samples a step failed on whose loss or gradient was not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.distributed import Agreement
from pipeline.feed import Batch, Feed
from pipeline.model.output import RoadworkOutput

NAMES_SAID = 8  # on one line; metrics.jsonl has them all


def find_bad_samples(
    agreement: Agreement, feed: Feed, batches: Sequence[Batch], outputs: Sequence[RoadworkOutput]
) -> tuple[str, list[str]]:
    """Find the samples of a step, over all ranks, whose own losses are not finite. Collective.

    Args:
        agreement: Between the ranks.
        feed: Knows the samples' names.
        batches: This rank's micro-batches of the step.
        outputs: The answers to them.

    Returns:
        What was not finite, "loss" or "gradient", and the samples' names: all of the step's where each loss is finite.
    """
    names = [feed.name(row) for batch in batches for row in batch["row"].tolist()]
    sound = [flag for output in outputs for flag in is_finite(output).tolist()]
    found = [pair for pairs in agreement.gather(list(zip(names, sound, strict=True))) for pair in pairs]
    bad = [name for name, flag in found if not flag]
    return ("loss", bad) if bad else ("gradient", [name for name, _ in found])


def is_finite(output: RoadworkOutput) -> torch.Tensor:
    """Which samples' losses are, in every term: bool [B]."""
    assert output.loss_terms is not None
    return torch.stack([values.detach().isfinite() for values in output.loss_terms.values()]).all(dim=0)


def in_words(names: Sequence[str]) -> str:
    """The first few names, and whether there are more."""
    return ", ".join(names[:NAMES_SAID]) + (f" and {len(names) - NAMES_SAID} more" if len(names) > NAMES_SAID else "")
