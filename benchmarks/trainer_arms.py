"""What `benchmarks.trainer` times, in processes of its own: every arm trains the same head from the same cache."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.form import timed
from benchmarks.loops import BareLoop, engine_step, make_trainer
from pipeline.config import Config, read_config
from pipeline.data.batch import Batch, collate
from pipeline.data.feature_dataset import open_split
from pipeline.data.features import open_cache
from pipeline.data.index import read_index
from pipeline.distributed.settings import find_deepspeed
from pipeline.model.roadwork import RoadworkModel
from pipeline.trainer import Trainer
from pipeline.training.loader import TrainLoader, open_loader
from pipeline.training.plan import plan_schedule
from pipeline.training.run_folder import RunFolder

RECIPE, BATCH = "demo", 32
WARM_UP_STEPS = 4
Arm = Callable[[int], list[float]]
"""Takes a number of steps, and returns the seconds per step; two numbers where two loops take turns."""


def time_arm(folder: Path, arm: str, steps: int, rounds: int) -> list[list[float]]:
    """Seconds per step in each round of an arm, after a warm-up."""
    work = ARMS[arm](read_config(folder / "recipe.yaml"), folder / arm)
    work(WARM_UP_STEPS)
    return [work(steps) for _ in range(rounds)]


def build_model(config: Config) -> RoadworkModel:
    """The head that all arms begin with."""
    torch.manual_seed(config.train.seed)
    return RoadworkModel.build(config.model, config.loss, config.data.decode_scale).train()


def open_train(config: Config) -> TrainLoader:
    """The trainer's micro-batches."""
    index = read_index(config.data.shards)
    return open_loader(config, index, config.train.micro_batch_size, 0, 1, open_cache(config.data.features, index))


def build_trainer(config: Config, folder: Path) -> Trainer:
    """A trainer as `accelerate_configs/cpu_1.yaml` starts one, which logs, and neither validates nor saves."""
    loader, run = open_train(config), RunFolder(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    file, schedule = find_deepspeed("ds_configs/zero0.json"), plan_schedule(config, loader.samples)
    trainer = make_trainer(config, build_model(config), file, schedule, loader=loader, folder=run)
    trainer.checkpoints = None
    trainer.state.best = {"step": 0}  # without it the weights would be exported at the end of each round
    return trainer


def trainer_seconds(trainer: Trainer, steps: int) -> float:
    """Seconds that the trainer takes for a step."""
    with contextlib.redirect_stderr(io.StringIO()):  # its log lines
        return timed(lambda: trainer.run(trainer.state.step + steps)).wall_s / steps


def bare_seconds(trainer: Trainer, steps: int) -> float:
    """Seconds that a bare loop takes for a step of the trainer's engine, on the trainer's batches."""

    def loop() -> None:
        batches = trainer.loader.batches(trainer.state.samples_seen)
        for _ in range(steps):
            engine_step(trainer, [next(batches) for _ in range(trainer.batching.accumulation)])

    return timed(loop).wall_s / steps


def ours(config: Config, folder: Path) -> Arm:
    """The trainer alone."""
    trainer = build_trainer(config, folder)
    return lambda steps: [trainer_seconds(trainer, steps)]


def overhead(config: Config, folder: Path) -> Arm:
    """The trainer and the bare loop in turns; which of them comes first alternates."""
    trainer, order = build_trainer(config, folder), [trainer_seconds, bare_seconds]

    def both(steps: int) -> list[float]:
        order.reverse()
        found = {loop: loop(trainer, steps) for loop in order}
        return [found[trainer_seconds], found[bare_seconds]]

    return both


def hugging_face(config: Config, folder: Path) -> Arm:
    """`transformers.Trainer` on the same head, cache and batches, with the same optimizer and clipping."""
    index = read_index(config.data.shards)
    cache = open_cache(config.data.features, index)
    data, model = open_split(config.data.shards, index, "train", config.input_spec, cache), build_model(config)

    def train(steps: int) -> list[float]:
        arguments = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=config.train.micro_batch_size,
            gradient_accumulation_steps=BATCH // config.train.micro_batch_size, max_steps=steps,
            learning_rate=config.optim.lr, weight_decay=config.optim.weight_decay, max_grad_norm=config.optim.grad_clip,
            logging_steps=config.train.log_every, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False, dataloader_drop_last=True, seed=config.train.seed,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, arguments_of, data)
        trainer.model_accepts_loss_kwargs = False  # the head's further arguments are switches
        return [timed(trainer.train).wall_s / steps]

    return train


def arguments_of(samples: list[Batch]) -> dict[str, Any]:
    """The arguments of the model's forward pass for some samples."""
    return {"batch": collate(samples), "with_loss": True}


def plain(config: Config, folder: Path) -> Arm:
    """The shortest loop there is on the same head, cache, batches and optimizer: without DeepSpeed or any trainer."""
    train, accumulation = open_train(config), BATCH // config.train.micro_batch_size
    loop = BareLoop(build_model(config), config.optim, plan_schedule(config, train.samples).steps)

    def steps_of(steps: int) -> None:
        batches = train.batches(0)
        for number in range(steps):
            loop.step(number, [next(batches) for _ in range(accumulation)])

    return lambda steps: [timed(lambda: steps_of(steps)).wall_s / steps]


ARMS = {"ours": ours, "overhead": overhead, "hugging_face": hugging_face, "plain": plain}
