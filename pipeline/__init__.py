"""Train, evaluate and export a roadwork classifier; `data_prep` makes shards from photos."""

import os

from pipeline.devices import may_use_gpu

if os.environ.get("DS_ACCELERATOR") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else accelerate and DeepSpeed would choose different devices
elif not may_use_gpu():
    # DeepSpeed, which accelerate and transformers import, would warn on stdout, where only a summary's path belongs.
    os.environ["DS_ACCELERATOR"] = "cpu"
