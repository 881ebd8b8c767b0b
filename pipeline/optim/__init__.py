"""Optimizers, learning-rate schedule and weight averaging."""
