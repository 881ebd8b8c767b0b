"""Steps whose loss or gradient is not finite: all ranks leave them out together.

ZeRO 1 to 3 do this by themselves: from the norm of the whole gradient, which every rank knows, each sees that the step
must not be taken. So nothing has to be agreed on: a loss that is not finite makes its gradient so.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist


def spoil_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself where it is finite; else one whose gradient is NaN, as it need not be by itself."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def skip_steps_that_are_not_finite(engine: Any) -> None:
    """See to it that `engine.step()` takes no step with such a gradient, whatever the ZeRO stage.

    `engine.was_step_applied()` tells.
    """
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:  # ZeRO 0 in fp32, where DeepSpeed calls torch's optimizer as it is
        optimizer.overflow = False
        # DeepSpeed would clip just before, and tell nobody the norm, which is needed here too.
        engine.clip_fp32_gradients = lambda: None
        optimizer.register_step_pre_hook(partial(_clip_or_drop, engine))
    elif engine.has_moe_layers and hasattr(optimizer, "check_grad_overflow"):
        # In fp32 ZeRO 1 and 2 judge by the norm alone, for which the ranks' experts are averaged: the -1 that stands
        # for "not finite" on one of them would be lost.
        optimizer.check_grad_overflow = True


def _clip_or_drop(engine: Any, optimizer: Any, args: Any, kwargs: Any) -> None:
    """Clip the gradient, or let the step change nothing.

    Torch's optimizers pass over a parameter without gradient: no decay, no moments, no change.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if not engine.has_moe_layers:  # a process with some of the experts knows the norm of these alone
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
    """Let the optimizer's own count, which corrects the bias of young moments, be that of the trainer's steps.

    A step that was skipped counts, so that a checkpoint need not hold how many there were.
    """
    for state in engine.basic_optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)
