"""What `benchmarks.trainer` times, in processes of its own.

`python -m benchmarks.trainer_arms ARM FOLDER STEPS ROUNDS`: every arm trains the same head from the same feature cache,
and the last line of stdout is a JSON list of seconds per step, one for each round.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.form import timed
from pipeline.config import Config, read_config
from pipeline.data.batch import collate, model_inputs
from pipeline.data.feature_dataset import open_split
from pipeline.data.features import open_cache
from pipeline.data.index import read_index
from pipeline.distributed import start
from pipeline.distributed.settings import plan_batches
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.build import build_optimizer
from pipeline.trainer import Trainer
from pipeline.training.loader import open_loader
from pipeline.training.plan import plan_schedule
from pipeline.training.run_folder import RunFolder

WARM_UP_STEPS = 4


def build_trainer(config: Config, folder: Path) -> Trainer:
    """A trainer that logs, and neither validates nor saves."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    index = read_index(config.data.shards)
    cache = open_cache(config.data.features, index)
    batching = plan_batches(config.train, world_size)
    accelerator = start(
        batch_size=batching.micro_batch_size, accumulation=batching.accumulation, grad_clip=config.optim.grad_clip,
        precision="fp32", log_with=[], hang_minutes=config.train.hang_minutes,
    )  # fmt: skip
    loader = open_loader(config, index, batching.micro_batch_size, rank, world_size, cache)
    torch.manual_seed(config.train.seed)
    model = RoadworkModel.build(config.model, accelerator.device)
    model.loss_config = config.loss
    run = RunFolder(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, accelerator, model, loader, None, batching, plan_schedule(config, loader.samples), run)
    trainer.checkpoints = None
    trainer.best = {"step": 0}  # or else the weights would be exported at the end of each round
    return trainer


def trainer_seconds(trainer: Trainer, steps: int) -> float:
    """Per step of the trainer."""
    with contextlib.redirect_stderr(io.StringIO()):  # its log lines
        return timed(lambda: trainer.run(trainer.step + steps)).wall_s / steps


def bare_seconds(trainer: Trainer, steps: int) -> float:
    """Per step of the shortest loop that trains the trainer's engine on its batches."""
    engine, accelerator = trainer.engine, trainer.accelerator

    def loop() -> None:
        batches = trainer.loader.batches(trainer.samples_seen)
        for _ in range(steps * trainer.batching.accumulation):
            batch = next(batches)
            with accelerator.accumulate(engine):
                targets = {"labels": batch["labels"], "mask_targets": batch["mask_targets"]}
                accelerator.backward(engine(**model_inputs(batch), **targets).loss)

    return timed(loop).wall_s / steps


def ours(config: Config, folder: Path) -> Callable[[int], list[float]]:
    """The trainer alone."""
    trainer = build_trainer(config, folder)
    return lambda steps: [trainer_seconds(trainer, steps)]


def overhead(config: Config, folder: Path) -> Callable[[int], list[float]]:
    """The trainer and the bare loop, each time the other one first; seconds of both."""
    trainer, round_number = build_trainer(config, folder), 0

    def both(steps: int) -> list[float]:
        nonlocal round_number
        round_number += 1
        arms = [trainer_seconds, bare_seconds]
        found = {arm.__name__: arm(trainer, steps) for arm in (arms if round_number % 2 else reversed(arms))}
        return [found[arm.__name__] for arm in arms]

    return both


def hugging_face(config: Config, folder: Path) -> Callable[[int], list[float]]:
    """`transformers.Trainer` on the same head, cache and batches, with the same optimizer and clipping."""
    import transformers

    index = read_index(config.data.shards)
    cache = open_cache(config.data.features, index)
    data = open_split(config.data.shards, index, "train", config.model, config.data.decode_scale, cache)
    torch.manual_seed(config.train.seed)
    model = RoadworkModel.build(config.model)
    model.loss_config = config.loss
    batching = plan_batches(config.train, 1)

    def batch_of(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch = collate(samples)
        return {**model_inputs(batch), "labels": batch["labels"], "mask_targets": batch["mask_targets"]}

    def train(steps: int) -> list[float]:
        arguments = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=batching.micro_batch_size,
            gradient_accumulation_steps=batching.accumulation, max_steps=steps, learning_rate=config.optim.lr,
            weight_decay=config.optim.weight_decay, max_grad_norm=config.optim.grad_clip,
            logging_steps=config.train.log_every, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False, dataloader_drop_last=True, seed=config.train.seed,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, batch_of, data)
        trainer.model_accepts_loss_kwargs = False  # the head's further arguments are metadata
        with contextlib.redirect_stdout(sys.stderr):
            return [timed(trainer.train).wall_s / steps]

    return train


def plain(config: Config, folder: Path) -> Callable[[int], list[float]]:
    """The shortest loop there is on the same head, cache, batches and optimizer: without DeepSpeed or any trainer.

    Several processes share nothing, but begin each round together.
    """
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    index = read_index(config.data.shards)
    batching = plan_batches(config.train, 1)
    loader = open_loader(config, index, batching.micro_batch_size, 0, 1, open_cache(config.data.features, index))
    torch.manual_seed(config.train.seed)
    model = RoadworkModel.build(config.model).train()
    model.loss_config = config.loss
    optimizer = build_optimizer(model, config.optim)

    def loop(steps: int) -> None:
        batches = loader.batches(0)
        for _ in range(steps):
            for _ in range(batching.accumulation):
                batch = next(batches)
                loss = model(**model_inputs(batch), labels=batch["labels"], mask_targets=batch["mask_targets"]).loss
                assert loss is not None
                (loss / batching.accumulation).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad()

    return lambda steps: [timed(lambda: loop(steps)).wall_s / steps]


ARMS = {"ours": ours, "overhead": overhead, "hugging_face": hugging_face, "plain": plain}


def main(arm: str, folder: Path, steps: int, rounds: int) -> None:
    """Time one arm over `rounds` rounds of `steps` steps, after a warm-up."""
    with contextlib.redirect_stdout(sys.stderr):  # libraries print
        rank = os.environ.get("RANK", "0")
        work = ARMS[arm](read_config(folder / "recipe.yaml"), folder / f"{arm}-{rank}")
        work(WARM_UP_STEPS)
        seconds = []
        for _ in range(rounds):
            if dist.is_initialized():
                dist.barrier()
            seconds.append(work(steps))
    if rank == "0":
        print(json.dumps(seconds))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
