"""Linear layers, RMSNorm and attention with gradients of their own, for training on a CPU.

PyTorch has no fused kernel there for the gradients of RMSNorm and of attention with learned biases, and hands matrix
products in fp32 to MKL, which on AMD's processors is half as fast as oneDNN. All compute what PyTorch's operations
compute, up to rounding, and can be differentiated twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def trains_on_cpu(x: torch.Tensor) -> bool:
    """Whether this file's operations are for such a tensor; in 16 bits PyTorch's compute in fp32."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` for vectors [..., K], a weight [N, K] and a bias [N]: [..., N]. Made for many vectors, not for few."""
    if not (HAS_ONEDNN and trains_on_cpu(x) and torch.is_grad_enabled()):
        return F.linear(x, weight, bias)
    rows: torch.Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)
    return rows.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """`torch.nn.Linear` whose products oneDNN computes when it is trained on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map vectors [..., K] to [..., N]."""
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension; its gradient reads and writes the tokens fewer times on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm vectors [..., H]."""
        if not (trains_on_cpu(x) and torch.is_grad_enabled()):
            return super().forward(x)
        normed: torch.Tensor = _RMSNorm.apply(x, self.weight)
        return normed


def biased_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + b) v, with a gradient for the bias b of each key.

    `scaled_dot_product_attention` has a fused kernel on a CPU only where the bias needs no gradient.

    Args:
        query: [B, heads, T, d].
        key: [B, heads, T, d].
        value: [B, heads, T, d].
        bias: [B, T]; -inf for keys that are not attended to, but not for all of a row.

    Returns:
        [B, heads, T, d].
    """
    heads = query.shape[1]
    rows = bias[:, None, None].expand(-1, heads, -1, -1).flatten(0, 1)
    parts = (part.flatten(0, 1) for part in (query, key, value))
    attended: torch.Tensor = _Attention.apply(*parts, rows)
    return attended.unflatten(0, (-1, heads))


class _Linear(torch.autograd.Function):
    """y = x w^T + b for x [M, K] and w [N, K]; dx = g w, dw = g^T x, db = sum(g)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        product = _Linear.apply if torch.is_grad_enabled() else _product  # of gradients that are differentiated in turn
        return (
            product(gradient, weight.t(), None) if for_x else None,
            product(gradient.t(), x.t(), None) if for_weight else None,
            gradient.sum(dim=0) if for_bias else None,
        )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _RMSNorm(torch.autograd.Function):
    """y = s w x with s = 1 / sqrt(mean(x^2) + eps); dx = s w g - s^3 x mean(w g x)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = _scale(x)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is differentiated in turn, and what was saved counts as a constant
            scale = _scale(x)
        products = (gradient * x).flatten(0, -2)
        mean = (products @ weight).view_as(scale) / x.shape[-1]
        weights = (scale.flatten() @ products).view_as(weight)
        return torch.addcmul(gradient * weight * scale, x, scale**3 * mean, value=-1), weights


def _scale(x: torch.Tensor) -> torch.Tensor:
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return (mean + torch.finfo(x.dtype).eps).rsqrt()


class _Attention(torch.autograd.Function):
    """`biased_attention` for [N, T, d], with biases [N, 1, T]; the largest tensors, [N, T, T], are used in place."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        logits = _logits(query, key, bias)
        shares = torch.softmax(logits, dim=-1, out=logits)
        ctx.save_for_backward(query, key, value, bias, shares)
        return shares.bmm(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, bias, shares = ctx.saved_tensors
        found = gradient.bmm(value.transpose(1, 2))
        if torch.is_grad_enabled():  # as above
            shares = _logits(query, key, bias).softmax(dim=-1)
            found = torch._softmax_backward_data(found, shares, -1, shares.dtype)
        else:
            torch._softmax_backward_data(found, shares, -1, shares.dtype, grad_input=found)
        scale = query.shape[-1] ** -0.5
        return (
            scale * found.bmm(key),
            scale * found.transpose(1, 2).bmm(query),
            shares.transpose(1, 2).bmm(gradient),
            found.sum(dim=1, keepdim=True),
        )


def _logits(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(bias, query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5)
