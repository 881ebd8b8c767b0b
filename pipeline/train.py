"""Train a roadwork classifier: `accelerate launch --config_file A.yaml pipeline/train.py --config RECIPE.yaml`."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # started as a file: the project's root takes the place of this folder on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from pipeline.config import Config, parse_config
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import Index, read_index
from pipeline.data.sampler import PositionSampler
from pipeline.data.stand_in import StandIn
from pipeline.distributed import on_rank_zero, resolve_precision, start
from pipeline.errors import run
from pipeline.files import write_summary
from pipeline.model.roadwork import RoadworkModel
from pipeline.plan import describe_model, describe_schedule, plan_batches, plan_schedule, sampling_weights
from pipeline.progress import say, silence_libraries
from pipeline.run_folder import RunFolder
from pipeline.tracking import start_tracking
from pipeline.trainer import Batch, Trainer
from pipeline.validation import Validation

DRY_RUN_STEPS = 2


def main() -> Path | None:
    """Read the command line and train; returns the path of the summary, None after a dry run."""
    config, dry_run = parse_config(sys.argv[1:], "pipeline/train.py")
    silence_libraries()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print; stdout is for the summary's path
            return train(config, dry_run)
    finally:
        if dist.is_initialized():  # else gloo's threads abort the process on its way out
            dist.destroy_process_group()


def train(config: Config, dry_run: bool) -> Path | None:
    """Train the run that a configuration describes, or go on with it; a finished run returns at once."""
    shards = Path(config.data.shards)
    index = None if dry_run and not shards.exists() else read_index(shards)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    batching = plan_batches(config.train, world_size)
    precision = resolve_precision(config.train.precision)
    accelerator = start(
        batch_size=batching.micro_batch_size,
        accumulation=batching.accumulation,
        grad_clip=config.optim.grad_clip,
        precision=precision,
        log_with=["wandb"] if config.train.wandb and not dry_run else [],
    )
    lead = accelerator.is_main_process
    folder = None
    if index is not None and not dry_run:
        folder = RunFolder(Path(config.train.run))
        if on_rank_zero(lambda: folder.check(config, index)):
            if lead:
                say(f"{folder.path} is finished already; for another run choose another --train.run")
            return folder.summary.resolve()

    dataset, sampler = training_data(config, index, batching.micro_batch_size, accelerator.process_index, world_size)
    schedule = plan_schedule(config, len(dataset))  # type: ignore[arg-type]
    if lead:
        for line in describe_schedule(config, batching, schedule, world_size):
            say(line)
    torch.manual_seed(config.train.seed)
    model = RoadworkModel.build(config.model, accelerator.device)
    model.loss_config = config.loss
    if lead:
        for line in describe_model(config, model, precision, world_size):
            say(line)
    validation = None
    if index is not None and not dry_run and (index.splits["val"].labels >= 0).any():
        held_out = ShardDataset(shards, index.split("val"), *sizes(config))
        validation = Validation(
            held_out, batching.micro_batch_size, config.data.workers, accelerator.process_index, world_size
        )
    trainer = Trainer(config, accelerator, model, dataset, sampler, validation, batching, schedule, folder)
    if folder is None:
        summary = trainer.run(DRY_RUN_STEPS)
        if lead:
            say(f"dry run: {summary['steps']} steps at {summary['images_per_s']} images/s; nothing was written")
        return None
    assert index is not None
    if lead:
        folder.create(config, index, world_size)
    start_tracking(accelerator, config)
    summary = trainer.run()
    accelerator.end_training()
    return write_summary(folder.path, summary) if lead else None


def sizes(config: Config) -> tuple[int, int, int]:
    """View side, number of views and mask side, as the data sets take them."""
    return config.model.view_side, config.model.num_views, config.model.mask_side


def training_data(
    config: Config, index: Index | None, batch_size: int, rank: int, world_size: int
) -> tuple[Dataset[Batch], PositionSampler]:
    """The training split and this rank's way through it; without shards, noise to try a step on."""
    if index is None:
        if rank == 0:
            say(f"no shards at {config.data.shards} yet: planning with a stand-in of noise, as if it were all the data")
        samples = 2 * config.train.batch_size
        dataset: Dataset[Batch] = StandIn(samples, *sizes(config))
        weights = np.ones(samples)
    else:
        split = index.split("train")
        dataset = ShardDataset(Path(config.data.shards), split, *sizes(config))
        weights = sampling_weights(config, split)
    sampler = PositionSampler(
        weights,
        plan_schedule(config, len(weights)).samples_per_epoch,
        seed=config.train.seed, batch_size=batch_size, rank=rank, world_size=world_size,
    )  # fmt: skip
    return dataset, sampler


if __name__ == "__main__":
    raise SystemExit(run(main))
