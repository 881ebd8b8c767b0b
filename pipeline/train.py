"""Train a roadwork classifier: `accelerate launch --config_file A.yaml pipeline/train.py --config RECIPE.yaml`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":  # started as a file: the project's root replaces this folder on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from accelerate import Accelerator

from pipeline.config import Config, parse_config
from pipeline.data.feature_dataset import open_split
from pipeline.data.feature_key import feature_key
from pipeline.data.features import FeatureCache, open_cache
from pipeline.data.folds import read_dealt
from pipeline.data.index import INDEX_NAME, Index
from pipeline.data.inputs import check_inputs
from pipeline.data.storage import open_folder
from pipeline.devices import has_bf16, out_of_memory
from pipeline.distributed.agreement import first_of_node_first, on_rank_zero
from pipeline.distributed.settings import (
    EngineSettings,
    describe_engine,
    engine_settings,
    launched_file,
    resolve_precision,
)
from pipeline.distributed.startup import choose_kernels, run_process, start, world_size
from pipeline.files import write_summary
from pipeline.launch.rank_logs import divert_output
from pipeline.model.roadwork import RoadworkModel
from pipeline.progress import say, silence_libraries
from pipeline.trainer import Trainer
from pipeline.training.loader import open_loader, place_split, workers_of
from pipeline.training.plan import describe_model, describe_sampling, describe_schedule, plan_sampling, plan_schedule
from pipeline.training.run_folder import RunFolder
from pipeline.training.tracking import start_tracking
from pipeline.training.validation import Validation

DRY_RUN_STEPS = 2


def main() -> Path | None:
    """Read the command line and train; returns the path of the summary, None after a dry run."""
    divert_output()
    config, dry_run = parse_config(sys.argv[1:], "pipeline/train.py")
    silence_libraries()
    choose_kernels(config.train.deterministic)
    # Libraries print, and stdout is for the summary's path.
    with contextlib.redirect_stdout(sys.stderr), out_of_memory("train.micro_batch_size"):
        summary = train(config, dry_run)
    if dist.is_initialized():  # Accelerate ends it too, after some runs; not after an error, see `run_process`
        dist.destroy_process_group()
    return summary


def train(config: Config, dry_run: bool) -> Path | None:
    """Train the run that a configuration describes, or resume it; a finished run returns at once."""
    shards = config.data.shards
    index = None
    if not dry_run or open_folder(shards).exists(INDEX_NAME):
        index = read_dealt(shards, config.data.folds, config.data.fold)
    if index is not None:
        check_inputs(index, config.model, config.data.allow_leaks)
    cache = None if index is None else open_cache(config.data.features, index)
    precision = resolve_precision(config.train.precision, has_bf16())
    engine = engine_settings(config, launched_file(), world_size(), precision)
    log_with = ["wandb"] if config.train.wandb and not dry_run else []
    accelerator = start(engine, log_with, config.train.hang_minutes)
    if index is None or dry_run:
        return _train(config, accelerator, engine, index, cache, None)
    folder = RunFolder(Path(config.train.run))
    if on_rank_zero(lambda: folder.check(config, index)):
        if accelerator.is_main_process:
            say(f"{folder.path} is finished already; for another run choose another --train.run")
        return folder.summary.resolve()
    with contextlib.ExitStack() as held:
        on_rank_zero(lambda: held.enter_context(folder.locked()))
        return _train(config, accelerator, engine, index, cache, folder)


def _train(
    config: Config, accelerator: Accelerator, engine: EngineSettings, index: Index | None, cache: FeatureCache | None,
    folder: RunFolder | None,
) -> Path | None:  # fmt: skip
    """Build everything, and train; without a run folder only two steps."""
    lead, shards = accelerator.is_main_process, config.data.shards
    ranks = accelerator.process_index, accelerator.num_processes
    loader = open_loader(config, index, engine.batching.micro_batch_size, *ranks, cache)
    schedule = plan_schedule(config, loader.samples)
    sampling = None if index is None else plan_sampling(config, index.split("train"))
    if lead:
        say_plan(describe_engine(engine, config))
        say_plan(("note", note) for note in engine.notes)
        say_plan(describe_schedule(config, schedule))
        say_plan(() if sampling is None else describe_sampling(sampling))
    torch.manual_seed(config.train.seed)
    model = first_of_node_first(
        lambda first: RoadworkModel.build(
            config.model, config.loss, config.data.decode_scale, accelerator.device, config.train.heads,
            local_files_only=not first,
        )
    )  # fmt: skip
    if cache is not None:
        on_rank_zero(lambda: cache.check(feature_key(model.backbone, config.input_spec, config.model.pool_grid)))
    if lead:
        say_plan(describe_model(config, model, engine))
    validation = None
    if index is not None and folder is not None and (index.splits["val"].labels >= 0).any():
        held_out = open_split(shards, index, "val", config.input_spec, cache)
        validation = Validation(
            place_split(config, held_out, accelerator.device), engine.batching.micro_batch_size,
            workers_of(config.data), *ranks,
        )  # fmt: skip
    trainer = Trainer(
        config, accelerator, model, loader.placed(config, accelerator.device), validation, engine.batching, schedule,
        folder,
    )  # fmt: skip
    if folder is None:
        summary = trainer.run(DRY_RUN_STEPS)
        if lead:
            say(f"dry run: {summary['steps']} steps at {summary['images_per_s']} images/s; nothing was written")
        return None
    assert index is not None and sampling is not None  # noqa: PT018
    if lead:
        folder.create(config, index, accelerator.num_processes)
    start_tracking(accelerator, config)
    with contextlib.closing(trainer):
        summary = trainer.run()
    accelerator.end_training()
    return write_summary(folder.path, {**summary, "sampling": sampling.report()}) if lead else None


def say_plan(lines: Iterable[tuple[str, str]]) -> None:
    """Print lines of the plan."""
    for about, text in lines:
        say(f"{about:<10} {text}")


if __name__ == "__main__":
    run_process(main)
