"""Sophia's estimates of the Hessian's diagonal on a DeepSpeed engine, whatever its ZeRO stage and experts.

An estimate is written as the gradient of a loss. The engine scales, reduces, shards and checks it like any gradient,
and the optimizer averages it into its diagonal instead of taking a step. So the estimate of a batch is the same for any
number of processes, micro-batches and shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod, sqrt
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config import Config
from pipeline.data.batch import Batch
from pipeline.devices import upload
from pipeline.distributed.engine_tensors import base_optimizer
from pipeline.distributed.experts import expert_parallel_size, second_derivatives, split_experts, whole_shapes
from pipeline.distributed.skipping import spoil_gradient
from pipeline.model.losses import Targets
from pipeline.optim.hessian import Tensors, hutchinson, rademacher
from pipeline.optim.sampled_loss import draws_needed, sampled_loss, uniform
from pipeline.optim.sophia import Sophia

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


class HessianStep:
    """Estimates the diagonal before every `optim.hessian_every`-th step; does nothing with AdamW.

    Attributes:
        skips: Estimates since the last reading that were not finite; none of them enters the mean.
    """

    def __init__(self, config: Config, accelerator: Accelerator, engine: Any):
        """Take an engine whose optimizer is that of the configuration."""
        self.config, self.accelerator, self.engine = config, accelerator, engine
        self.skips = 0
        self.shapes = whole_shapes(engine.module)

    def due(self, step: int) -> bool:
        """Whether optimizer step `step` (from 0) begins with an estimate."""
        return self.config.optim.name != "adamw" and step % self.config.optim.hessian_every == 0

    def take(self, step: int, batches: Sequence[Batch], counts: torch.Tensor, keep_all: bool) -> None:
        """Estimate the diagonal at the present weights, if an estimate is due. Collective.

        Only the probes, the drawn labels and the views of the pruning mode `random` are random: no dropout, no
        exploration. The random generator is restored, so that the step draws what it would draw without an estimate.

        Args:
            step: Optimizer step about to be taken.
            batches: This rank's micro-batches of it.
            counts: Counts of targets over all ranks, see `losses.combine`.
            keep_all: Whether the step keeps all views.
        """
        if not self.due(step):
            return
        probes = self._probes(step) if self.config.optim.name == "sophia_h" else None
        with self._apart():
            for batch in batches:
                with self.accelerator.accumulate(self.engine):
                    if probes is None:
                        loss = self._drawn(step, batch, counts, keep_all)
                    else:
                        loss = self._products(probes, batch, counts, keep_all)
                    # As for the loss itself: DeepSpeed averages over ranks and micro-batches.
                    self.accelerator.backward(spoil_gradient(loss) * self.accelerator.num_processes * len(batches))
            self.skips += not self.engine.was_step_applied()

    def _probes(self, step: int) -> Tensors:
        """Random signs u for this process's parameters, by name; the same for all micro-batches of a step."""
        module = self.engine.module
        signs = rademacher(self.shapes, self.config.train.seed, step, self.accelerator.device)
        mine = split_experts(module, signs)
        return {name: mine[name] for name, p in module.named_parameters() if p.requires_grad}

    def _products(self, probes: Tensors, batch: Batch, counts: torch.Tensor, keep_all: bool) -> torch.Tensor:
        """A loss whose gradient is u * (H u), where H is the Hessian of this micro-batch's share of the loss."""
        module = self.engine.module
        weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # Copies of the weights in fp32, which the engine's hooks do not know.
        leaves = {name: weight.detach().float().requires_grad_() for name, weight in weights.items()}
        # The fused kernels of attention have no second derivative.
        with second_derivatives(module), sdpa_kernel(SDPBackend.MATH):
            output = functional_call(module, leaves, (batch,), _wanted(counts, keep_all))
            products = hutchinson(spoil_gradient(output.loss), leaves, probes)
        return torch.stack([(products[name] * weight).sum() for name, weight in weights.items()]).sum()

    def _drawn(self, step: int, batch: Batch, counts: torch.Tensor, keep_all: bool) -> torch.Tensor:
        """The loss for labels that are drawn from the model's own predictions, see `sampled_loss`."""
        output = self.engine(batch, **_wanted(counts, keep_all))
        draws = uniform(batch["row"].tolist(), draws_needed(output), self.config.train.seed, step)
        draws = upload(draws, output.logits.device)
        targets = Targets.from_batch(batch).to(output.logits.device)
        return sampled_loss(output, targets, counts, self.config.loss, draws)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Run a step that changes no weights: not clipped, not counted, in evaluation mode, random state restored."""
        engine, optimizer = self.engine, base_optimizer(self.engine)
        assert isinstance(optimizer, Sophia)
        counters = {name: getattr(engine, name) for name in COUNTERS}
        clip = getattr(engine.optimizer, "clip_grad", None)  # ZeRO 1 to 3; stage 0 asks the engine
        engine.gradient_clipping = lambda: 0.0
        if clip is not None:
            engine.optimizer.clip_grad = 0.0
        engine.module.eval()
        device = self.accelerator.device
        try:
            with optimizer.estimating(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                yield
        finally:
            engine.module.train()
            if clip is not None:
                engine.optimizer.clip_grad = clip
            del engine.gradient_clipping
            for name, value in counters.items():
                setattr(engine, name, value)

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """Statistics of the optimizer's curvature over all processes; empty with AdamW. Collective.

        Returns:
            `clipped_share`: share of coordinates whose last step was clipped to the learning rate. `hessian_norm`:
            2-norm of the mean of the diagonal. `hessian_skips`: estimates since the last reading that were not finite.
        """
        optimizer = base_optimizer(self.engine)
        if not isinstance(optimizer, Sophia):
            return {}
        gamma, eps = self.config.optim.gamma, self.config.optim.epsilon
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for piece, state in optimizer.state.items():
            curvature = state["hessian"]
            clipped = (state["exp_avg"].abs() >= (gamma * curvature).clamp(min=eps)).sum()
            found = torch.stack([clipped.double(), curvature.double().square().sum()])
            sums += found.to(sums.device) / self._copies(piece)
        dist.all_reduce(sums)
        skips, self.skips = self.skips, 0
        coordinates = sum(map(prod, self.shapes.values()))
        clipped, square = sums.tolist()
        return {"clipped_share": round(clipped / coordinates, 5), "hessian_norm": sqrt(square), "hessian_skips": skips}

    def _copies(self, piece: torch.Tensor) -> int:
        """How many processes have the same piece of the state; more than one only without ZeRO."""
        if self.engine.zero_optimization():
            return 1
        world_size = self.accelerator.num_processes
        # Without ZeRO a piece is a parameter, and DeepSpeed marks those of sharded experts.
        return world_size if getattr(piece, "allreduce", True) else world_size // expert_parallel_size(self.accelerator)


def _wanted(counts: torch.Tensor, keep_all: bool) -> dict[str, Any]:
    """Arguments that ask the model for the loss of a training step."""
    return {"with_loss": True, "target_counts": counts, "keep_all": keep_all}
