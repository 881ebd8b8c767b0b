"""Optimizers, learning-rate schedule and weight averaging."""

from pipeline.optim.build import build_optimizer
from pipeline.optim.config import MOMENTS, OptimConfig
from pipeline.optim.ema import WeightAverage
from pipeline.optim.schedule import lr_at
from pipeline.optim.sophia import Sophia

__all__ = ["MOMENTS", "OptimConfig", "Sophia", "WeightAverage", "build_optimizer", "lr_at"]
