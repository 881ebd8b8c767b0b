"""Training, evaluating and exporting a roadwork classifier; photos become shards in `data_prep`."""

import os

from pipeline.devices import expects_gpu

if os.environ.get("DS_ACCELERATOR") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or else accelerate and DeepSpeed would choose different devices
elif not expects_gpu():
    # DeepSpeed, which accelerate and transformers import, would warn on stdout, where only a summary's path belongs.
    os.environ["DS_ACCELERATOR"] = "cpu"
