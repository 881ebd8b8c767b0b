"""What all ranks must know before a step, shared on the CPU, so that nobody waits for a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """Small sums and lists over all ranks. Every method is collective."""

    def __init__(self) -> None:
        """Where tensors go over NCCL, numbers get a gloo group of their own."""
        self.group = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Of all ranks' tensors on the CPU, element by element; `values` itself holds it afterwards."""
        dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values
