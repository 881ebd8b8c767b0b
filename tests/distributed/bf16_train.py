"""`pipeline/train.py` on a CPU in the precisions of a GPU: the head under DeepSpeed in bf16, and the backbone too."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the project in the place of this folder
    sys.path[0] = str(Path(__file__).parents[2])

import torch

from pipeline import train
from pipeline.distributed.startup import run_process
from pipeline.model import backbone

train.has_bf16 = lambda: True
backbone.compute_dtype = lambda device: torch.bfloat16
run_process(train.main)
