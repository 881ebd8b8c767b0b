"""Agreement between ranks: what all must know before they continue, shared on the CPU so that no GPU is waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.errors import UserError

T = TypeVar("T")
COLLECTIVES_LATER_MINUTES = 2.0


def collective_timeout(hang_minutes: float) -> timedelta:
    """How long a collective waits: longer than the watchdog, which can report where threads hang."""
    return timedelta(minutes=hang_minutes + COLLECTIVES_LATER_MINUTES)


class Agreement:
    """Small sums and lists over all ranks. Every method is collective."""

    def __init__(self, hang_minutes: float) -> None:
        """Create a gloo group for these values where tensors go over NCCL.

        Args:
            hang_minutes: Minutes after which a process without progress is ended; the group waits for longer.
        """
        self.is_first = dist.get_rank() == 0
        apart = dist.get_backend() == "nccl"
        self.group = dist.new_group(backend="gloo", timeout=collective_timeout(hang_minutes)) if apart else None

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


def first_of_node_first(action: Callable[[bool], T]) -> T:
    """Run an action on rank 0, then on the first rank of each other node, and only then on all others. Collective.

    What an earlier one fetches, the later ones find. So no two ranks write into one cache at a time, whose locks are
    not dependable on a network file system, whether the nodes share it or each has its own.

    Args:
        action: Gets whether this rank is the first of its node, which may have to fetch.

    Raises:
        UserError: Raised on every rank where it was on one.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    mine = 0 if dist.get_rank() == 0 else 1 if first else 2

    def take(turn: int) -> T | None:
        return on_all_ranks(lambda: action(first) if turn == mine else None)

    return cast(T, [take(turn) for turn in range(3)][mine])
