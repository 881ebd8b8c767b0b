"""What a run reports while it runs: where the time goes, on which rank, memory, expert load, FLOPs and traces.

Nothing here waits for a GPU within a step: values on the GPU stay there until a log line is due.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from pipeline.config import profile_window
from pipeline.distributed.agreement import Agreement
from pipeline.model.config import TERMS
from pipeline.model.output import RoadworkOutput
from pipeline.progress import say
from pipeline.training.throughput import flop_counter, matmul_rate

STRAGGLER_RATIO = 1.5  # of a rank's own time to the median of all
STRAGGLER_LINES = 3  # log lines in a row on which one rank must be that slow: anybody has a slow moment
STRAGGLER_EVERY_S = 600.0  # between two warnings
GIB = 2**30


class Meter:
    """Counts and times of this rank since the last log line.

    All ranks wait for the slowest, so a step takes the same time on each. Only the parts in which a rank works alone
    tell ranks apart: waiting for data, and the forward pass. (Under ZeRO-3 and with sharded experts the forward pass
    has collectives too, which leaves data alone.)
    """

    def __init__(self, device: torch.device, batch_size: int, agreement: Agreement):
        """Start at zero.

        Args:
            device: The model's device.
            batch_size: Samples of one step, over all ranks.
            agreement: Gathers over the ranks.
        """
        self.device, self.batch_size, self.agreement = device, batch_size, agreement
        self.on_gpu = device.type == "cuda"
        self.peak_flops = matmul_rate(device) if self.on_gpu else 0.0
        self.flops_of: dict[bool, int] = {}
        self.slow: list[int] = []
        self.warned_s = -STRAGGLER_EVERY_S
        self._restart()

    def _restart(self) -> None:
        self.steps = self.taken = self.flops = 0
        self.data_s = self.forward_s = self.paused_s = self.counted_s = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.losses = torch.zeros(1 + len(TERMS), device=self.device)
        self.load: torch.Tensor | None = None
        self.started = time.monotonic()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time the reading of a step's micro-batches in the block."""
        start = time.monotonic()
        yield
        self.data_s += time.monotonic() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out: validations and checkpoints are no training."""
        start = time.monotonic()
        yield
        self.paused_s += time.monotonic() - start

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time the forward pass in the block."""
        if not self.on_gpu:
            start = time.monotonic()
            yield
            self.forward_s += time.monotonic() - start
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self.events.append((first, last))

    @contextmanager
    def flops_counted(self, keep_all: bool) -> Iterator[None]:
        """Count FLOPs of the forward and backward pass in the block, on a GPU only.

        Operations are counted in the first block of each kind, and that number is taken for the later ones.

        Args:
            keep_all: The kind of step: whether no view is pruned.
        """
        if not self.on_gpu:
            yield
            return
        counter = None if keep_all in self.flops_of else flop_counter()
        with counter or nullcontext():
            yield
        if counter is not None:
            self.flops_of[keep_all] = int(counter.get_total_flops())
        self.flops += self.flops_of[keep_all]

    def add_step(self, losses: torch.Tensor, taken: bool) -> float:
        """Count a step and, if it was taken, this rank's part of the loss and its terms, [1 + terms].

        Returns:
            Seconds since the step before, without pauses.
        """
        self.steps += 1
        if taken:
            self.taken += 1
            self.losses += losses
        before_s, self.counted_s = self.counted_s, self.wall_s
        return self.counted_s - before_s

    def add_load(self, output: RoadworkOutput, per_token: int) -> None:
        """Count how many tokens each expert of each layer gets in this micro-batch."""
        if not output.router_logits or output.token_mask is None:
            return
        load = torch.stack([expert_load(logits, output.token_mask, per_token) for logits in output.router_logits])
        self.load = load if self.load is None else self.load + load

    @property
    def wall_s(self) -> float:
        """Time of the steps since the last reading."""
        return time.monotonic() - self.started - self.paused_s

    def read(self) -> dict[str, Any]:
        """Sum up over all ranks and start anew. Collective.

        Returns:
            Values over the steps since the last reading: `loss` and `loss/TERM`, skipped steps left out;
            `images_per_s`, `step_s`, `data_wait_share` (of the rank that waits longest), `rank_s` (for each rank, the
            seconds of a step in which it works alone), `rss_gib` and `gpu_peak_gib` (of the largest rank), `mfu` on a
            GPU, `expert_load` (for each layer and expert, its share of the tokens times the number of experts, 1 when
            even), `expert_load_max`.
        """
        wall_s = self.wall_s
        shared = self.losses if self.load is None else torch.cat([self.losses, self.load.flatten()])
        torch.distributed.all_reduce(shared)
        sums = shared.cpu()  # the one place that waits for a GPU, once per log line
        forward_s = self.forward_s + sum(first.elapsed_time(last) for first, last in self.events) / 1000
        gpu_gib = torch.cuda.max_memory_allocated(self.device) / GIB if self.on_gpu else 0.0
        mine = (self.data_s, (self.data_s + forward_s) / self.steps, psutil.Process().memory_info().rss / GIB, gpu_gib)
        data_s, rank_s, rss_gib, peak_gib = zip(*self.agreement.gather(mine), strict=True)
        values: dict[str, Any] = {}
        if self.taken:
            means = (sums[: 1 + len(TERMS)] / self.taken).tolist()
            values = {"loss": means[0], **{f"loss/{term}": mean for term, mean in zip(TERMS, means[1:], strict=True)}}
        values |= {
            "images_per_s": round(self.steps * self.batch_size / wall_s, 2),
            "step_s": round(wall_s / self.steps, 5),
            "data_wait_share": round(max(data_s) / wall_s, 4),
            "rank_s": [round(value, 5) for value in rank_s],
            "rss_gib": round(max(rss_gib), 3),
        }
        if self.on_gpu:
            values |= {
                "gpu_peak_gib": round(max(peak_gib), 3),
                "mfu": round(self.flops / wall_s / self.peak_flops, 4),
            }
        if self.load is not None:
            load = sums[1 + len(TERMS) :].view_as(self.load)
            load = load / load.mean(dim=1, keepdim=True).clamp(min=1e-9)
            values["expert_load"] = [[round(share, 3) for share in layer] for layer in load.tolist()]
            values["expert_load_max"] = round(float(load.max()), 3)
        self._restart()
        return values

    def warn_of_straggler(self, rank_s: list[float]) -> str | None:
        """A sentence about a rank that all others wait for, line after line; at most one in ten minutes.

        Args:
            rank_s: The value of that name from `read`.
        """
        slowest = max(range(len(rank_s)), key=rank_s.__getitem__)
        usual = sorted(rank_s)[(len(rank_s) - 1) // 2]
        now = time.monotonic()
        if rank_s[slowest] < STRAGGLER_RATIO * usual:
            self.slow = []
            return None
        self.slow = [*self.slow, slowest][-STRAGGLER_LINES:]
        if self.slow != STRAGGLER_LINES * [slowest] or now - self.warned_s < STRAGGLER_EVERY_S:
            return None
        self.warned_s = now
        return (
            f"rank {slowest} is a straggler: its part of a step takes {1000 * rank_s[slowest]:.0f} ms, others' "
            f"{1000 * usual:.0f} ms, and all wait for it; look at its machine, its disk and its data.workers"
        )


def expert_load(router_logits: torch.Tensor, token_mask: torch.Tensor, per_token: int) -> torch.Tensor:
    """How many of a batch's tokens each expert gets: float32 [E].

    Args:
        router_logits: [B, T, E].
        token_mask: bool [B, T], tokens that count.
        per_token: Experts per token.
    """
    chosen = router_logits.detach().topk(per_token, dim=-1).indices
    counts = F.one_hot(chosen, router_logits.shape[-1]).sum(dim=-2)
    return (counts * token_mask[..., None]).sum(dim=(0, 1)).float()


class Profiler:
    """A torch profiler over a window of steps, whose trace goes to `profile/rank-N.json` of the run folder."""

    def __init__(self, window: str, folder: Path | None, rank: int):
        """Take the window of `train.profile`; without window or folder, nothing is profiled."""
        self.first, self.last = profile_window(window) if window else (-1, -1)
        self.folder, self.rank = folder, rank
        self.profile: torch.profiler.profile | None = None

    def step(self, number: int) -> AbstractContextManager[Any]:
        """A context for the step of this number (from 1), which profiles it if the window covers it."""
        if self.folder is None or not self.first <= number <= self.last:
            return nullcontext()
        return self._profiled(number, self.folder / "profile" / f"rank-{self.rank}.json")

    @contextmanager
    def _profiled(self, number: int, path: Path) -> Iterator[None]:
        if self.profile is None:
            self.profile = torch.profiler.profile(record_shapes=True)
            self.profile.start()
        yield
        if number == self.last:
            self.profile.stop()
            path.parent.mkdir(parents=True, exist_ok=True)
            self.profile.export_chrome_trace(str(path))
            self.profile = None
            if self.rank == 0:
                say(f"profiled steps {self.first} to {self.last}: {path} (open it in https://ui.perfetto.dev)")
