"""The choice of optimizer, and its rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.errors import above, at_least, check_fields, in_range, one_of, require

OPTIMIZERS = ("adamw", "sophia_h", "sophia_g")
# Defaults of beta1, beta2 and eps. Sophia's are those of its paper.
_ADAMW = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
_SOPHIA = {"beta1": 0.96, "beta2": 0.99, "eps": 1e-12}
# The tensors that an optimizer keeps for each parameter, in its state and in checkpoints.
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sophia_h": ("exp_avg", "hessian"),
    "sophia_g": ("exp_avg", "hessian"),
}


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = "adamw"
    """`adamw`, or an optimizer that scales its steps by the loss's curvature: `sophia_h`, from products with the
    Hessian, or `sophia_g`, from gradients for labels drawn from the model's own predictions."""
    lr: float = 3e-4
    """Peak learning rate, reached at the end of the warm-up."""
    evidence_lr_scale: float = 3.0
    """The learning rate of the cell evidence, as a multiple of the others': it is small, and learns slowest."""
    final_lr_ratio: float = 0.02
    """The learning rate at the last step, as a share of `lr`."""
    warmup_share: float = 0.05
    """Share of all steps in which the learning rate rises linearly from zero."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; biases, norms and embeddings have none."""
    beta1: float | None = None
    """Decay of the mean of the gradient; if not given, 0.9 for AdamW and 0.96 for Sophia."""
    beta2: float | None = None
    """Decay of the mean of the squared gradient, or for Sophia of the Hessian's diagonal; if not given, 0.99."""
    eps: float | None = None
    """Added to the root of the second moment; for Sophia the smallest divisor of a step. If not given, 1e-8 for AdamW
    and 1e-12 for Sophia."""
    gamma: float = 0.01
    """Sophia's scale of the curvature: the larger, the fewer coordinates are clipped."""
    hessian_every: int = 10
    """Steps between Sophia's estimates of the Hessian's diagonal."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""

    def __post_init__(self) -> None:
        check_fields(
            "optim", self, name=one_of(OPTIMIZERS), lr=above(0), evidence_lr_scale=above(0),
            final_lr_ratio=in_range("[0, 1]"), warmup_share=in_range("[0, 1)"), weight_decay=at_least(0),
            gamma=above(0), hessian_every=at_least(1), grad_clip=at_least(0),
        )  # fmt: skip
        for key, beta in zip(("beta1", "beta2"), self.betas, strict=True):
            require(0 <= beta < 1, f"optim.{key}", beta, "in [0, 1)")
        require(0 < self.epsilon < math.inf, "optim.eps", self.epsilon, "above 0")

    @property
    def betas(self) -> tuple[float, float]:
        """`beta1` and `beta2`, or their defaults where they are not given."""
        return self._settled("beta1"), self._settled("beta2")

    @property
    def epsilon(self) -> float:
        """`eps`, or its default where it is not given."""
        return self._settled("eps")

    def _settled(self, key: str) -> float:
        given: float | None = getattr(self, key)
        return (_ADAMW if self.name == "adamw" else _SOPHIA)[key] if given is None else given
