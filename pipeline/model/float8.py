"""The backbone's linear layers in FP8: faster on GPUs that multiply in FP8, at some loss. Not measured on a GPU yet."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer

from pipeline.errors import UserError

E4M3 = torch.float8_e4m3fn
"""Four bits of exponent, three of mantissa, no infinity (arXiv 2209.05433)."""
LARGEST = torch.finfo(E4M3).max
MULTIPLE = 16  # of both sides of a matrix; the GPU's kernels take no others


class Float8Linear(nn.Module):
    """y = x W' + b, with x and W in FP8 and a scale for each of their rows; sums are rounded to bf16."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        """Take over a linear layer.

        Args:
            linear: The layer; both its sides are multiples of 16.
        """
        super().__init__()
        weight, scale = to_e4m3(linear.weight.detach())
        # A buffer, since parameters of this type cannot be moved to another precision with the rest.
        self.register_buffer("weight", weight.t())
        self.register_buffer("scale", scale.t())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to [..., in]; returns [..., out] in the type of x."""
        rows, scale = to_e4m3(x.flatten(0, -2))
        y = torch._scaled_mm(rows, self.weight, scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16)
        y = y.to(x.dtype)
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])


def to_e4m3(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to FP8, each scaled so that its largest magnitude is the largest that FP8 has.

    Args:
        rows: [N, k].

    Returns:
        e4m3 [N, k] and the scales, float32 [N, 1]; their product is near `rows`, within 1/16 of each value that is not
        tiny beside the row's largest.
    """
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows.float() / scale).to(E4M3), scale


def to_float8(model: nn.Module) -> None:
    """Replace the linear layers inside the transformer layers of a DINOv3 ViT.

    Raises:
        UserError: A side of a layer is no multiple of 16.
    """
    for layer in [module for module in model.modules() if isinstance(module, DINOv3ViTLayer)]:
        for name, linear in [(name, part) for name, part in layer.named_modules() if isinstance(part, nn.Linear)]:
            if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
                size = f"{linear.in_features} x {linear.out_features}"
                raise UserError(
                    f"the backbone's {name} is {size}, and FP8 needs multiples of {MULTIPLE}; leave out --precision fp8"
                )
            layer.set_submodule(name, Float8Linear(linear))


def refuse_without_float8(device: torch.device) -> None:
    """Try one small product.

    Raises:
        UserError: The device does not multiply in FP8 with a scale for each row.
    """
    ones = torch.ones(MULTIPLE, MULTIPLE, device=device).to(E4M3)
    scale = torch.ones(MULTIPLE, 1, device=device)
    try:
        torch._scaled_mm(ones, ones.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError as error:  # torch's own check of the GPU's compute capability, and of what it was built for
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"--precision fp8 needs FP8 products with a scale for each row, which torch {torch.__version__} does not "
            f"have on {device} ({reason}); GPUs have them from compute capability 8.9 on; leave out --precision fp8"
        ) from error
