"""Optimizers, learning-rate schedule and weight averaging."""

from pipeline.optim.adamw import OptimConfig, build_optimizer
from pipeline.optim.ema import WeightAverage
from pipeline.optim.schedule import lr_at

__all__ = ["OptimConfig", "WeightAverage", "build_optimizer", "lr_at"]
