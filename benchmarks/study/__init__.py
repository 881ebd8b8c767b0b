"""A study of what each part of the model, the sampler and the optimizer adds: `python -m benchmarks.study`."""

from benchmarks.study.command import study

__all__ = ["study"]
