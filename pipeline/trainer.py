"""The loop, and nothing else: sample, forward, backward, average, log, validate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator

from pipeline.config import Config
from pipeline.data.dataset import model_inputs
from pipeline.distributed import (
    Checkpoints,
    EngineAverage,
    StopSignal,
    create_optimizer_state,
    expert_parallel_size,
    on_all_ranks,
    watch_routers,
)
from pipeline.errors import Stopped
from pipeline.feed import Batch, Feed
from pipeline.files import replace_folder
from pipeline.losses import TERMS, Targets, count_targets
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim import build_optimizer, lr_at
from pipeline.plan import Batching, Schedule
from pipeline.progress import format_seconds, say
from pipeline.run_folder import RunFolder
from pipeline.validation import Validation


class Window:
    """Mean of a vector over the steps since the last log line."""

    def __init__(self) -> None:
        self.steps, self.total = 0, torch.zeros(())

    def add(self, values: torch.Tensor) -> None:
        """Count one step's values."""
        self.steps += 1
        self.total = self.total + values

    def mean(self) -> torch.Tensor:
        """Over the steps that were added."""
        return self.total / self.steps


def targets_of(batch: Batch) -> Targets:
    """A batch's targets."""
    return Targets(batch["labels"], batch["weather"], batch["mask_targets"])


class Trainer:
    """Trains a model's head. Every method that reduces or saves is collective: all ranks call it."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: RoadworkModel,
        feed: Feed,
        validation: Validation | None,
        batching: Batching,
        schedule: Schedule,
        folder: RunFolder | None,
    ):
        """Wrap the model in a DeepSpeed engine; without a folder nothing is written."""
        self.config, self.accelerator, self.model = config, accelerator, model
        self.feed, self.validation = feed, validation
        self.batching, self.schedule, self.folder = batching, schedule, folder
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        model.train()
        optimizer = build_optimizer(model, config.optim, expert_parallel_size(accelerator))
        self.engine, self.optimizer = accelerator.prepare(model, optimizer)
        watch_routers(model)
        create_optimizer_state(self.engine)
        self.average = EngineAverage(model, config.train.ema_decay)
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep, self.rank) if folder else None
        self.stop = StopSignal()
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.validations_since_best = 0
        self.validated_step = 0
        self.wall_s = 0.0

    @property
    def samples_seen(self) -> int:
        """The place in the sequence of samples: the whole data state."""
        return self.step * self.batching.batch_size

    def run(self, max_steps: int | None = None) -> dict[str, Any]:
        """Train from where the run stands to its end, or to `max_steps` of it; returns the summary."""
        last = min(self.schedule.steps, max_steps or self.schedule.steps)
        self._resume()
        if self._validation_due():  # stopped between a step and its validation
            self._validate()
        batches = self.feed.batches(self.samples_seen)
        started = saved = logged = time.monotonic()
        before_s, window = self.wall_s, Window()
        while self.step < last and not self._out_of_patience():
            losses = self._take_step(self._fetch(batches))
            self.step += 1
            now = time.monotonic()
            self.wall_s = before_s + now - started
            loss, stop, due = self._agree(losses, now - saved)
            window.add(loss)
            if self.step % self.config.train.log_every == 0 or self.step == last:
                self._log(window, now - logged)
                window, logged = Window(), now
            if self._validation_due() and not stop:
                self._validate()
                due = True
            if self.checkpoints and (due or stop):
                self._save()
                saved = time.monotonic()
            logged += time.monotonic() - now  # validations and checkpoints are not part of the training rate
            if stop:
                raise Stopped(
                    f"saved at step {self.step} of {self.schedule.steps}; the same command goes on from there"
                )
        return self._finish()

    def _fetch(self, batches: Iterator[Batch]) -> list[Batch]:
        """This rank's micro-batches of one step. Collective."""
        return on_all_ranks(lambda: [next(batches) for _ in range(self.batching.accumulation)])

    def _take_step(self, batches: list[Batch]) -> torch.Tensor:
        """One optimizer step over several micro-batches; returns this rank's part of the loss, then of each term."""
        # All randomness of a step follows from its number and the rank, so a checkpoint need not hold any.
        seeds = np.random.SeedSequence((self.config.train.seed, self.step, self.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        lr = lr_at(self.step, self.schedule.steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        every = self.config.train.distil_every
        keep_all = every > 0 and self.step % every == 0
        counts = sum(count_targets(targets_of(batch)) for batch in batches)
        assert isinstance(counts, torch.Tensor)
        counts = counts.to(self.accelerator.device)
        dist.all_reduce(counts)
        sums = torch.zeros(1 + len(TERMS), device=self.accelerator.device)
        for batch in batches:
            with self.accelerator.accumulate(self.engine):
                output = self.engine(
                    **model_inputs(batch), labels=batch["labels"], mask_targets=batch["mask_targets"],
                    target_counts=counts, keep_all=keep_all,
                )  # fmt: skip
                # The loss is this micro-batch's share of the mean over all; DeepSpeed averages over ranks and
                # micro-batches, which would divide it once more.
                self.accelerator.backward(output.loss * self.world_size * len(batches))
            sums[0] += output.loss.detach()
            for i, term in enumerate(TERMS):
                if term in output.loss_terms:
                    sums[1 + i] += output.loss_terms[term].detach().sum() / counts[i].clamp(min=1)
        self.average.update(self.step)
        return sums

    def _agree(self, losses: torch.Tensor, since_save_s: float) -> tuple[torch.Tensor, bool, bool]:
        """Sum the losses of all ranks, and decide together whether to stop and whether to save. Collective."""
        every_s = 60 * self.config.checkpoint.every_minutes
        clock = self.rank == 0 and 0 < every_s <= since_save_s
        flags = torch.tensor([float(self.stop.received), float(clock)], device=losses.device)
        shared = torch.cat([losses, flags])
        dist.all_reduce(shared)
        values = shared[:-2].cpu()
        if not math.isfinite(float(values[0])):
            raise FloatingPointError(
                f"the loss of step {self.step} is {float(values[0])}; the last checkpoint is older and whole, "
                "a lower optim.lr or optim.grad_clip is the usual cure"
            )
        counted = self.config.checkpoint.every_steps
        due = bool(shared[-1] > 0) or (counted > 0 and self.step % counted == 0)
        return values, bool(shared[-2] > 0), due

    def _log(self, window: Window, wall_s: float) -> None:
        rate = window.steps * self.batching.batch_size / wall_s
        left_s = (self.schedule.steps - self.step) * self.batching.batch_size / rate
        epoch = self.samples_seen / self.schedule.samples_per_epoch
        lr = lr_at(self.step - 1, self.schedule.steps, self.config.optim)
        means = window.mean().tolist()
        values = {
            "kind": "train", "step": self.step, "epoch": round(epoch, 3), "loss": means[0], "lr": lr,
            "grad_norm": float(self.engine.get_global_grad_norm() or 0.0), "images_per_s": round(rate, 2),
            **{f"loss/{term}": value for term, value in zip(TERMS, means[1:], strict=True)},
        }  # fmt: skip
        self._write(values)
        if self.rank == 0:
            say(
                f"step {self.step}/{self.schedule.steps}  epoch {epoch:.2f}  loss {means[0]:.4f}  lr {lr:.2e}  "
                f"{rate:.1f} images/s  {format_seconds(left_s)} left"
            )

    def _validation_due(self) -> bool:
        due = self.step in self.schedule.validation_steps and self.step > self.validated_step
        return due and self.validation is not None

    def _validate(self) -> None:
        assert self.validation is not None
        averaged = self._averaged_model()
        scores = self.validation(averaged)
        better = self.best is None or (scores["mcc"], -scores["loss"]) > (self.best["mcc"], -self.best["loss"])
        if better and self.folder and self.rank == 0:
            replace_folder(self.folder.model, averaged.save_pretrained)
        if better:
            self.best, self.validations_since_best = {"step": self.step, **scores}, 0
        else:
            self.validations_since_best += 1
        self.validated_step = self.step
        self._write({"kind": "val", "step": self.step, **scores})
        if self.rank == 0:
            say(
                f"step {self.step}/{self.schedule.steps}  validation: MCC {scores['mcc']:.3f} (metadata NULL, "
                f"n={scores['n']}){', the best so far' if better else ''}"
            )

    def _averaged_model(self) -> RoadworkModel:
        """A whole model with the averaged weights, whatever holds the pieces of the one in training. Collective.

        A rank asks it by itself: one that has fewer photos to validate keeps no other waiting.
        """
        config: Any = self.model.config
        model = RoadworkModel(config).attach(self.model.backbone)
        model.loss_config = self.config.loss
        model.load_state_dict(self.average.gathered())
        return model.to(self.accelerator.device).to(self.model.dtype)

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return 0 < patience <= self.validations_since_best

    def _resume(self) -> None:
        state = self.checkpoints.restore(self.engine, self.average) if self.checkpoints else None
        if state is None:
            return
        self.step, self.best = state["step"], state["best"]
        self.validations_since_best, self.validated_step = state["validations_since_best"], state["validated_step"]
        self.wall_s = state["wall_s"]
        if self.rank == 0 and self.folder:
            self.folder.truncate_metrics(self.step)
            say(f"resuming at step {self.step} of {self.schedule.steps}")
        dist.barrier()

    def _save(self) -> None:
        assert self.checkpoints is not None
        state = {
            "best": self.best,
            "validations_since_best": self.validations_since_best,
            "validated_step": self.validated_step,
            "samples_seen": self.samples_seen,
            "wall_s": self.wall_s,
        }
        self.checkpoints.save(self.step, self.engine, self.average, state)

    def _write(self, values: dict[str, Any]) -> None:
        if self.folder is None:
            return
        if self.rank == 0:
            self.folder.log(values)
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self.accelerator.log({f"{values['kind']}/{key}": value for key, value in numbers.items()}, step=self.step)

    def _finish(self) -> dict[str, Any]:
        if self.rank == 0 and self._out_of_patience():
            say(f"stopped early: {self.validations_since_best} validations without a better MCC")
        if self.folder and self.best is None:
            # Nothing to validate on: the last average is the best there is.
            averaged = self._averaged_model()
            if self.rank == 0:
                replace_folder(self.folder.model, averaged.save_pretrained)
        best = None
        if self.best is not None:
            best = {"step": self.best["step"], "val": {key: self.best[key] for key in self.best if key != "step"}}
        return {
            "steps": self.step,
            "epochs": round(self.samples_seen / self.schedule.samples_per_epoch, 3),
            "validated_step": self.validated_step,
            "samples_seen": self.samples_seen,
            "wall_s": round(self.wall_s, 1),
            "images_per_s": round(self.samples_seen / max(self.wall_s, 1e-9), 2),
            "best": best,
        }
