"""Sophia: steps that are scaled by an estimate of the Hessian's diagonal, and clipped coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

State = dict[str, torch.Tensor]


class Sophia(torch.optim.Optimizer):
    """Sophia (Liu et al. 2023, arXiv 2305.14342, algorithm 3).

        m <- beta1 m + (1 - beta1) g
        theta <- theta - lr (clip(m / max(gamma h, eps), -1, 1) + weight_decay theta)

    and every few steps, inside `estimating()`, h <- beta2 h + (1 - beta2) h_hat.

    There h_hat is made from `.grad`, so that an engine which shards, reduces and checks gradients does the same for the
    estimates. Nothing here depends on the shapes of the parameters: they may be flat pieces of others.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        squared: bool = False,
    ):
        """Take the parameters; their state is created at the first step.

        Args:
            params: Parameters, or groups of them.
            lr: Learning rate.
            betas: Decay of the mean of the gradient, and of the mean of the Hessian's diagonal.
            gamma: Scale of the Hessian's diagonal.
            eps: The smallest divisor of a step, which also replaces negative curvature.
            weight_decay: Decoupled weight decay.
            squared: Whether h_hat is the square of `.grad` (Gauss-Newton-Bartlett) or `.grad` itself (Hutchinson).
        """
        defaults = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.squared = squared
        self.is_estimating = False

    @contextmanager
    def estimating(self) -> Iterator[None]:
        """A context in which `step()` updates the mean of the Hessian's diagonal and nothing else."""
        self.is_estimating = True
        try:
            yield
        finally:
            self.is_estimating = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; parameters without gradient are skipped."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            pieces = [piece for piece in group["params"] if piece.grad is not None]
            if pieces:
                states = [self._state_of(piece) for piece in pieces]
                gradients = [piece.grad for piece in pieces]
                if self.is_estimating:
                    self._estimate(group, states, gradients)
                else:
                    self._update(group, pieces, states, gradients)
        return loss

    def _state_of(self, piece: torch.Tensor) -> State:
        state = self.state[piece]
        if not state:
            state["step"] = torch.tensor(0.0, device=piece.device)
            state["exp_avg"], state["hessian"] = (torch.zeros_like(piece) for _ in range(2))
        return state

    def _estimate(self, group: dict[str, Any], states: list[State], found: list[torch.Tensor]) -> None:
        estimates = torch._foreach_mul(found, found) if self.squared else found
        torch._foreach_lerp_([state["hessian"] for state in states], list(estimates), 1 - group["betas"][1])

    def _update(
        self,
        group: dict[str, Any],
        pieces: list[torch.Tensor],
        states: list[State],
        gradients: list[torch.Tensor],
    ) -> None:
        torch._foreach_add_([state["step"] for state in states], 1)
        means = [state["exp_avg"] for state in states]
        torch._foreach_lerp_(means, gradients, 1 - group["betas"][0])
        curvature = torch._foreach_mul([state["hessian"] for state in states], group["gamma"])
        torch._foreach_clamp_min_(curvature, group["eps"])
        update = torch._foreach_div(means, curvature)
        torch._foreach_clamp_min_(update, -1.0)
        torch._foreach_clamp_max_(update, 1.0)
        if group["weight_decay"]:
            torch._foreach_mul_(pieces, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(pieces, update, alpha=-group["lr"])
