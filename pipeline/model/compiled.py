"""Compile the frozen backbone, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer

from pipeline.progress import say

THREADS_VARIABLE = "TORCHINDUCTOR_COMPILE_THREADS"


def compile_layers(model: nn.Module, first_pass: Callable[[], object], threads: int) -> bool:
    """Compile each transformer layer by itself.

    All layers have the same code and the same shapes, so they share one compilation, and it does not depend on the
    memory layout of the views. A machine that cannot compile (no C compiler, no Python headers, no Triton) says so in
    a line, and the model stays as it was.

    Args:
        model: A DINOv3 ViT in eval mode.
        first_pass: Runs the model once, with as many views as all later passes have: it is what compiles.
        threads: Processes that compile kernels; TORCHINDUCTOR_COMPILE_THREADS, where it is set, comes first. Without
            either, each process of a machine would start up to 32.

    Returns:
        Whether the layers are compiled.

    Raises:
        torch.OutOfMemoryError: The pass does not fit into the GPU's memory.
    """
    if THREADS_VARIABLE not in os.environ:
        # The variable is read when torch imports this module, which may have happened by now.
        from torch._inductor import config

        config.compile_threads = threads
    layers = [module for module in model.modules() if isinstance(module, DINOv3ViTLayer)]
    for layer in layers:
        layer.compile(dynamic=False)
    try:
        first_pass()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # dynamo, inductor, Triton, gcc and the loader each have their own
        for layer in layers:
            layer._compiled_call_impl = None
        torch._dynamo.reset()
        say(f"the backbone cannot be compiled here ({_reason(error)}); it goes on uncompiled, which is slower")
        return False
    return True


def _reason(error: BaseException) -> str:
    """The first line of the error that all others came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
