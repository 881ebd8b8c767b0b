"""The learning rate as a pure function of the step: no state to save, and none to advance once too often."""

from __future__ import annotations

import math

from pipeline.optim.config import OptimConfig


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then half a cosine.

    Args:
        step: The step about to be taken, 0 <= step < total_steps.
        total_steps: Optimizer steps in the whole run.
        config: Peak, share of the warm-up and share of the last rate.

    Returns:
        The rate: exactly `lr` at the step after the warm-up and, unless that is the last one, exactly
        `lr * final_lr_ratio` at the last.
    """
    warmup = int(config.warmup_share * total_steps)  # rounded down, so that even the shortest run reaches its peak
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)
