"""Train a roadwork classifier: `accelerate launch --config_file A.yaml pipeline/train.py --config RECIPE.yaml`."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # started as a file: the project's root takes the place of this folder on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

from pipeline.config import Config, parse_config
from pipeline.data.feature_dataset import open_split
from pipeline.data.feature_key import feature_key
from pipeline.data.features import FeatureCache, open_cache
from pipeline.data.index import INDEX_NAME, read_index
from pipeline.data.inputs import check_inputs
from pipeline.data.storage import open_folder
from pipeline.distributed import describe_experts, expert_parallel_size, on_rank_zero, resolve_precision, start
from pipeline.errors import run
from pipeline.feed import open_feed
from pipeline.files import write_summary
from pipeline.memory import Sharding
from pipeline.model.roadwork import RoadworkModel
from pipeline.plan import check_mixup, describe_model, describe_schedule, plan_batches, plan_schedule
from pipeline.progress import say, silence_libraries
from pipeline.rank_logs import divert_output
from pipeline.run_folder import RunFolder
from pipeline.tracking import start_tracking
from pipeline.trainer import Trainer
from pipeline.validation import Validation

DRY_RUN_STEPS = 2


def main() -> Path | None:
    """Read the command line and train; returns the path of the summary, None after a dry run."""
    divert_output()
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
    shards = config.data.shards
    index = None if dry_run and not open_folder(shards).exists(INDEX_NAME) else read_index(shards)
    if index is not None:
        check_inputs(index, config.model, config.data.allow_leaks)
    cache = None if index is None else open_cache(config.data.features, index)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    batching = plan_batches(config.train, world_size)
    check_mixup(config.loss.mixup_alpha, batching)
    precision = resolve_precision(config.train.precision)
    accelerator = start(
        batch_size=batching.micro_batch_size,
        accumulation=batching.accumulation,
        grad_clip=config.optim.grad_clip,
        precision=precision,
        expert_parallel=config.train.expert_parallel,
        experts=config.model.experts if config.model.head == "roadwork" else None,
        log_with=["wandb"] if config.train.wandb and not dry_run else [],
        hang_minutes=config.train.hang_minutes,
        optimizer=config.optim.name,
    )
    lead = accelerator.is_main_process
    folder = None
    if index is not None and not dry_run:
        folder = RunFolder(Path(config.train.run))
        if on_rank_zero(lambda: folder.check(config, index)):
            if lead:
                say(f"{folder.path} is finished already; for another run choose another --train.run")
            return folder.summary.resolve()

    feed = open_feed(config, index, batching.micro_batch_size, accelerator.process_index, world_size, cache)
    schedule = plan_schedule(config, feed.samples)
    if lead:
        for line in describe_schedule(config, batching, schedule, world_size):
            say(line)
    torch.manual_seed(config.train.seed)
    model = RoadworkModel.build(config.model, accelerator.device)
    model.loss_config = config.loss
    check_cache(cache, model, config)
    if lead:
        size = expert_parallel_size(accelerator)
        sharding = Sharding.of(accelerator.deepspeed_plugin.deepspeed_config, world_size, size)
        for line in (*describe_model(config, model, precision, sharding), *describe_experts(config, size)):
            say(line)
    validation = None
    if index is not None and not dry_run and (index.splits["val"].labels >= 0).any():
        held_out = open_split(shards, index, "val", config.model, config.data.decode_scale, cache)
        validation = Validation(
            held_out, batching.micro_batch_size, config.data.workers, accelerator.process_index, world_size
        )
    trainer = Trainer(config, accelerator, model, feed, validation, batching, schedule, folder)
    if folder is None:
        summary = trainer.run(DRY_RUN_STEPS)
        if lead:
            say(f"dry run: {summary['steps']} steps at {summary['images_per_s']} images/s; nothing was written")
        return None
    assert index is not None
    if lead:
        folder.create(config, index, world_size)
    start_tracking(accelerator, config)
    with contextlib.closing(trainer):
        summary = trainer.run()
    accelerator.end_training()
    return write_summary(folder.path, summary) if lead else None


def check_cache(cache: FeatureCache | None, model: RoadworkModel, config: Config) -> None:
    """Refuse a cache of other tokens than the model would compute itself. Collective."""
    if cache is not None:
        on_rank_zero(lambda: cache.check(feature_key(model.backbone, config.model, config.data.decode_scale)))


if __name__ == "__main__":
    raise SystemExit(run(main))
