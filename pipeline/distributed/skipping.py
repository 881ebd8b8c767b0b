"""Steps whose loss or gradient is not finite: all ranks skip them together.

ZeRO 1 to 3 do this by themselves: every rank knows the norm of the whole gradient, and skips the step if it is not
finite. So a loss that is not finite need only make its gradient NaN; no extra collective is needed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist


def spoil_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself where it is finite; else one whose gradient is NaN, which autograd alone does not ensure."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def skip_steps_that_are_not_finite(engine: Any) -> None:
    """Let `engine.step()` skip gradients that are not finite, whatever the ZeRO stage.

    `engine.was_step_applied()` says whether a step was taken.
    """
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:  # ZeRO 0 in fp32, where DeepSpeed calls torch's optimizer as it is
        optimizer.overflow = False
        # DeepSpeed would clip just before and not return the norm, which is needed here too.
        engine.clip_fp32_gradients = lambda: None
        optimizer.register_step_pre_hook(partial(_clip_or_drop, engine))
    elif engine.has_moe_layers and hasattr(optimizer, "check_grad_overflow"):
        # In fp32 ZeRO 1 and 2 look at the norm alone, which is averaged over the ranks' experts: the -1 that stands for
        # "not finite" on one of them would be lost.
        optimizer.check_grad_overflow = True


def _clip_or_drop(engine: Any, optimizer: Any, args: Any, kwargs: Any) -> None:
    """Clip the gradient, or drop one that is not finite.

    Torch's optimizers skip a parameter without gradient: no decay, no moments, no change.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if not engine.has_moe_layers:  # a process with some of the experts knows only their norm
        optimizer._global_grad_norm = norm
    bad = (~norm.isfinite()).float()
    dist.all_reduce(bad)  # a sharded expert's gradient is on some ranks only
    optimizer.overflow = bool(bad)
    if optimizer.overflow:
        for parameter in parameters:
            parameter.grad = None
    elif engine.gradient_clipping() > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping(), norm)


def count_steps(engine: Any, steps: int) -> None:
    """Set the optimizer's own step count, which corrects the bias of young moments, to the trainer's.

    Skipped steps count too, so that a checkpoint need not store how many there were.
    """
    for state in engine.basic_optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)
