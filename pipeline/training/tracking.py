"""Weights & Biases through Accelerate's tracker: online with a key, offline without one."""

from __future__ import annotations

import os
from dataclasses import asdict

from accelerate import Accelerator

from pipeline.config import Config
from pipeline.progress import say

PROJECT = "roadwork"


def start_tracking(accelerator: Accelerator, config: Config) -> None:
    """Open the tracker in the run folder, unless `train.wandb` is off."""
    if not config.train.wandb:
        return
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if accelerator.is_main_process and mode is None and not wandb.login(prompt=False):
        mode = "offline"
        say(f"Weights & Biases: no key, logging offline to {config.train.run}/wandb (off with --train.wandb false)")
    accelerator.init_trackers(
        PROJECT,
        config=asdict(config),
        init_kwargs={"wandb": {"name": os.path.basename(config.train.run), "dir": config.train.run, "mode": mode}},
    )
