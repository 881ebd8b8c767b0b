"""What each part of the model, the sampler and the optimizer is worth, with intervals: `python -m benchmarks.study`."""

from benchmarks.study.command import study

__all__ = ["study"]
