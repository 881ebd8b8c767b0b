"""Start-up of the processes, the stop signal and checkpoints."""

from pipeline.distributed.checkpoint import CheckpointConfig, Checkpoints
from pipeline.distributed.signals import StopSignal
from pipeline.distributed.startup import start

__all__ = ["CheckpointConfig", "Checkpoints", "StopSignal", "start"]
