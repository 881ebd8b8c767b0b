"""Hutchinson's estimate of a Hessian's diagonal, from a product of the Hessian with random signs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


def rademacher(
    shapes: Mapping[str, tuple[int, ...]], seed: int, step: int, device: torch.device | str = "cpu"
) -> Tensors:
    """Random signs, +1 or -1 with even chance, for every coordinate of every parameter.

    They follow from the seed, the step and the parameter's name alone, so that processes which share a parameter, or
    hold parts of it, need not exchange them. Devices of one kind draw the same; a CPU and a GPU do not.

    Args:
        shapes: Shapes of the whole parameters, by name.
        seed: The run's seed.
        step: Optimizer step.
        device: Where they are drawn and stay.

    Returns:
        float32, by name.
    """
    generator = torch.Generator(device)
    signs = {}
    for name, shape in shapes.items():
        entropy = np.random.SeedSequence((seed, step, zlib.crc32(name.encode())))
        generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        signs[name] = torch.randint(2, shape, generator=generator, device=device, dtype=torch.float32).mul_(2).sub_(1)
    return signs


def hutchinson(
    loss: torch.Tensor, parameters: Mapping[str, torch.Tensor], probes: Mapping[str, torch.Tensor]
) -> Tensors:
    """u * (H u), whose mean over random signs u is the diagonal of the Hessian H (Hutchinson 1989).

    The product is exact: it is the gradient of <gradient of the loss, u>. Nothing is accumulated in `.grad`.

    Args:
        loss: Scalar; its graph is freed.
        parameters: The parameters from which the loss was computed, by name.
        probes: Random signs u, in the parameters' shapes.

    Returns:
        Estimates by name, in the parameters' shapes; zero where the loss does not depend on a parameter.
    """
    leaves = list(parameters.values())
    gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    slopes = [(gradient * probes[name]).sum() for gradient, name in pairs if gradient is not None]
    products = torch.autograd.grad(torch.stack(slopes).sum(), leaves, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if product is None else probes[name] * product
        for (name, leaf), product in zip(parameters.items(), products, strict=True)
    }
