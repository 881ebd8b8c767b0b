"""The training loop: sample, forward, backward, average, log, validate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator

from pipeline.checkpoints.checkpoints import Checkpoints
from pipeline.config import Config
from pipeline.data.batch import Batch
from pipeline.devices import upload
from pipeline.distributed.agreement import Agreement
from pipeline.distributed.engine_tensors import EngineAverage, create_optimizer_state
from pipeline.distributed.experts import expert_parallel_size, watch_routers
from pipeline.distributed.settings import Batching
from pipeline.distributed.signals import StopSignal
from pipeline.distributed.skipping import skip_steps_that_are_not_finite, spoil_gradient
from pipeline.distributed.watchdog import Watchdog
from pipeline.errors import Stopped, UserError
from pipeline.model.config import TERMS
from pipeline.model.losses import Targets, count_targets
from pipeline.model.moe import set_grouped_mm
from pipeline.model.output import RoadworkOutput
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.build import build_optimizer, set_lr
from pipeline.optim.schedule import lr_at
from pipeline.progress import format_seconds, say
from pipeline.training.best_model import BestModel
from pipeline.training.faults import FaultPolicy
from pipeline.training.hessian_step import HessianStep
from pipeline.training.loader import TrainLoader
from pipeline.training.plan import Schedule
from pipeline.training.run_folder import RunFolder
from pipeline.training.state import TrainState
from pipeline.training.telemetry import Meter, Profiler
from pipeline.training.validation import Validation


class Trainer:
    """Trains a model's head. Every method that reduces or saves is collective: all ranks call it."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: RoadworkModel,
        loader: TrainLoader,
        validation: Validation | None,
        batching: Batching,
        schedule: Schedule,
        folder: RunFolder | None,
    ):
        """Wrap the model in a DeepSpeed engine; without a folder nothing is written."""
        self.config, self.accelerator, self.model = config, accelerator, model
        self.loader, self.validation = loader, validation
        self.batching, self.schedule, self.folder = batching, schedule, folder
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        model.train()
        set_grouped_mm(model, config.train.grouped_mm)
        optimizer = build_optimizer(model, config.optim, expert_parallel_size(accelerator))
        self.engine, self.optimizer = accelerator.prepare(model, optimizer)
        watch_routers(model)
        create_optimizer_state(self.engine)
        skip_steps_that_are_not_finite(self.engine)
        self.hessian = HessianStep(config, accelerator, self.engine)
        self.average = EngineAverage(model, config.train.ema_decay)
        self.checkpoints = Checkpoints(folder.checkpoints, config, self.rank, folder.log) if folder else None
        self.best_model = BestModel(model, self.average, folder, self.rank)
        self.stop = StopSignal(config.train.max_minutes)
        self.agreement = Agreement(config.train.hang_minutes)
        self.faults = FaultPolicy(config.train, self.engine, self.average, self.checkpoints, loader, self.agreement)
        self.meter = Meter(accelerator.device, batching.batch_size, self.agreement)
        self.profiler = Profiler(config.train.profile, folder.path if folder else None, self.rank)
        self.state = TrainState(batching.batch_size)
        self.saved_step, self.saved_s = -1, time.monotonic()

    def run(self, max_steps: int | None = None) -> dict[str, Any]:
        """Train from the run's present step to its end, or to `max_steps`; returns the summary."""
        last = min(self.schedule.steps, max_steps or self.schedule.steps)
        with Watchdog(
            self.config.train.hang_minutes, self.folder.stacks if self.folder else None, self.rank
        ) as watchdog:
            self.alive = watchdog.alive
            self._resume()
            if self._validation_due():  # stopped between a step and its validation
                self._validate()
            self._train(last)
        return self._finish()

    def _train(self, last: int) -> None:
        state = self.state
        batches = self.loader.batches(state.samples_seen)
        started, before_s = time.monotonic(), state.wall_s
        while state.step < last and not state.is_out_of_patience(self.config.train.patience):
            self.alive()
            mine, problem = self._fetch(batches)
            counts, stop, save = self._agree(mine, problem)
            if stop or (save and state.skips == 0):
                self._save_once()
            if stop:
                self._await_save()
                raise Stopped(self._stopped())
            with self.profiler.step(state.step + 1):
                losses, outputs = self._take_step(mine, counts)
            taken = self.engine.was_step_applied()
            state.step += 1
            state.wall_s = before_s + time.monotonic() - started
            step_s = self.meter.add_step(losses, taken)
            if self.checkpoints:
                self.checkpoints.add_step(step_s)
            state.skips = 0 if taken else state.skips + 1
            if not taken and self.faults.after_skip(state, mine, outputs, self._write):
                self._save_once()
            if state.step % self.config.train.log_every == 0 or state.step == last:
                self.meter.add_load(outputs[-1], self.config.model.experts_per_token)
                self._log()
            if self._validation_due():
                self._validate()
                self._save_once()
        self._save_once()
        self._await_save()

    def _fetch(self, batches: Iterator[Batch]) -> tuple[list[Batch], UserError | None]:
        """This rank's micro-batches of one step, or the error in its data."""
        with self.meter.waiting_for_data():
            try:
                return [next(batches) for _ in range(self.batching.accumulation)], None
            except UserError as error:
                return [], error

    def _agree(self, mine: list[Batch], problem: UserError | None) -> tuple[torch.Tensor, bool, bool]:
        """Agree with the other ranks on what to do before a step. Collective.

        Returns:
            How many samples of the step have each term's target, whether to stop, and whether to save first.

        Raises:
            UserError: Raised on every rank where one cannot read its data; else the others would wait for it, or report
                its absence instead of its reason.
        """
        every_s, every = 60 * self.config.checkpoint.every_minutes, self.config.checkpoint.every_steps
        clock = self.rank == 0 and 0 < every_s <= time.monotonic() - self.saved_s
        counts = [count_targets(Targets.from_batch(batch)) for batch in mine]
        flags = torch.tensor([float(problem is not None), float(self.stop.received), float(clock)])
        shared = self.agreement.sum(torch.cat([sum(counts, torch.zeros(len(TERMS))), flags]))
        failed, stop, save = (shared[-3:] > 0).tolist()
        if failed:
            problems = self.agreement.gather(problem and str(problem))
            raise UserError(next(text for text in problems if text is not None))
        return shared[:-3], stop, save or (every > 0 and self.state.step % every == 0)

    def _take_step(self, batches: list[Batch], counts: torch.Tensor) -> tuple[torch.Tensor, list[RoadworkOutput]]:
        """Take one optimizer step over several micro-batches, if its loss and gradient are finite.

        Args:
            batches: This rank's micro-batches.
            counts: Counts of targets from `_agree`.

        Returns:
            This rank's part of the loss, then of each term, and the output for each micro-batch.
        """
        step = self.state.step
        # All randomness of a step follows from its number and the rank, so checkpoints store no random state.
        seeds = np.random.SeedSequence((self.config.train.seed, step, self.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        lr = lr_at(step, self.schedule.steps, self.config.optim)
        set_lr(self.optimizer, lr)
        every = self.config.train.distil_every
        keep_all = every > 0 and step % every == 0
        counts, outputs = upload(counts, self.accelerator.device), []
        sums = torch.zeros(1 + len(TERMS), device=self.accelerator.device)
        self.hessian.take(step, batches, counts, keep_all)
        for batch in batches:
            with self.accelerator.accumulate(self.engine), self.meter.flops_counted(keep_all):
                with self.meter.forward():
                    output = self.engine(batch, with_loss=True, target_counts=counts, keep_all=keep_all)
                # The loss is this micro-batch's share of the mean over all; DeepSpeed would divide it once more, by the
                # number of ranks and micro-batches.
                self.accelerator.backward(spoil_gradient(output.loss) * self.world_size * len(batches))
            outputs.append(output)
            sums[0] += output.loss.detach()
            for i, term in enumerate(TERMS):
                if term in output.loss_terms:
                    sums[1 + i] += output.loss_terms[term].detach().sum() / counts[i].clamp(min=1)
        if self.engine.was_step_applied():
            self.average.update(step)
        return sums, outputs

    def _log(self) -> None:
        means, curvature = self.meter.read(), self.hessian.read()
        left_s = (self.schedule.steps - self.state.step) * means["step_s"]
        epoch = self.state.samples_seen / self.schedule.samples_per_epoch
        lr = lr_at(self.state.step - 1, self.schedule.steps, self.config.optim)
        norm = self.engine.get_global_grad_norm()  # None with experts shared under ZeRO-0
        self._write({
            "kind": "train", "step": self.state.step, "epoch": round(epoch, 3), "lr": lr,
            **({"grad_norm": float(norm)} if norm is not None and math.isfinite(norm) else {}),
            **curvature, **means,
        })  # fmt: skip
        if self.rank == 0:
            loss = f"loss {means['loss']:.4f}" if "loss" in means else "no step taken"
            say(
                f"step {self.state.step}/{self.schedule.steps}  epoch {epoch:.2f}  {loss}  lr {lr:.2e}  "
                f"{means['images_per_s']:.1f} images/s  {format_seconds(left_s)} left"
            )
            if curvature.get("hessian_skips"):
                say(
                    f"{curvature['hessian_skips']} of the estimates of the curvature since the last line were not "
                    "finite and were left out"
                )
            if warning := self.meter.warn_of_straggler(means["rank_s"]):
                say(warning)

    def _validation_due(self) -> bool:
        due = self.state.step in self.schedule.validation_steps and self.state.step > self.state.validated_step
        return due and self.validation is not None

    def _validate(self) -> None:
        assert self.validation is not None
        state = self.state
        with self.meter.paused():
            averaged = self.best_model.averaged()
            scores = self.validation(averaged, self.alive)
            better = state.add_validation(scores)
            if better:
                self.best_model.save(averaged)
        self._write({"kind": "val", "step": state.step, **scores})
        if self.rank == 0:
            say(
                f"step {state.step}/{self.schedule.steps}  validation: loss {scores['loss']:.4f}, "
                f"MCC {scores['mcc']:.3f} (cross-fitted, metadata NULL, n={scores['n']})"
                f"{'; the lowest loss so far' if better else ''}"
            )

    def _resume(self) -> None:
        saved = self.checkpoints.restore(self.engine, self.average) if self.checkpoints else None
        if saved is None:
            return
        assert self.checkpoints is not None and self.folder is not None  # noqa: PT018
        self.state = TrainState.from_json(saved, self.batching.batch_size)
        self.saved_step = self.state.step
        self.best_model.restore(self.state, self.checkpoints)
        if self.rank == 0:
            self.folder.truncate_metrics(self.state.step)
            say(f"resuming at step {self.state.step} of {self.schedule.steps}")
        dist.barrier()

    def close(self) -> None:
        """Wait for the last checkpoint, and for a bounded time for uploads; report what is missing."""
        if self.checkpoints:
            self.checkpoints.close()

    def _stopped(self) -> str:
        reason = f"train.max_minutes={self.config.train.max_minutes:g} is over; " if self.stop.out_of_time else ""
        what = "saved" if self.checkpoints and self.checkpoints.unsaved is None else "not saved"
        return f"{reason}{what} at step {self.state.step} of {self.schedule.steps}; the same command resumes there"

    def _save_once(self) -> None:
        """Begin to save a checkpoint, unless this step's is begun already."""
        if self.checkpoints is None or self.saved_step == self.state.step:
            return
        with self.meter.paused():
            self.checkpoints.save(self.state.step, self.engine, self.average, self.state.to_json())
        self.saved_step, self.saved_s = self.state.step, time.monotonic()

    def _await_save(self) -> None:
        if self.checkpoints:
            self.checkpoints.wait()

    def _write(self, values: dict[str, Any]) -> None:
        if self.folder is None:
            return
        if self.rank == 0:
            self.folder.log(values)
        kind = values["kind"]
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=self.state.step)

    def _finish(self) -> dict[str, Any]:
        if self.rank == 0 and self.state.is_out_of_patience(self.config.train.patience):
            say(f"stopped early: {self.state.validations_since_best} validations without a lower loss")
        if self.folder and self.state.best is None:
            # There was nothing to validate on: the last average is the best model.
            self.best_model.save(self.best_model.averaged())
        saves = {"checkpoints": self.checkpoints.summary()} if self.checkpoints else {}
        return {**self.state.summary(self.schedule.samples_per_epoch), **saves}
