"""Agreement between ranks: what all must know before they continue, shared on the CPU so that no GPU is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.errors import UserError

T = TypeVar("T")


class Agreement:
    """Small sums and lists over all ranks. Every method is collective."""

    def __init__(self) -> None:
        """Create a gloo group for these values where tensors go over NCCL."""
        self.is_first = dist.get_rank() == 0
        self.group = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum all ranks' CPU tensors element by element, in place; returns `values`."""
        dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        return gather(value, self.group)


def gather(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, by rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run an action on rank 0 and give every rank its result. Collective.

    Raises:
        UserError: Raised on every rank where it was on rank 0; else the others would wait for one that left.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [action(), None]
        except UserError as error:
            outcome = [None, str(error)]
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    result: T = outcome[0]
    return result


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run an action on every rank, and fail on all of them if it fails on one. Collective.

    Raises:
        UserError: Raised on every rank where it was on one; else the others would wait for that one, or report its
            absence instead of its reason.
    """
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    failed = torch.tensor(float(problem is not None), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(failed)
    if failed:
        raise UserError(next(text for text in gather(problem) if text is not None))
    return cast(T, result)
