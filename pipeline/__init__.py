"""Training, evaluating and serving a roadwork classifier; photos become shards in `data_prep`."""

import os

import torch

if not torch.cuda.is_available():
    # DeepSpeed, which accelerate and transformers import, would warn on stdout, where only a summary's path belongs.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
