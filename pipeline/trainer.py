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

from pipeline.bad_samples import find_bad_samples, in_words
from pipeline.config import Config
from pipeline.distributed import (
    Agreement,
    Checkpoints,
    EngineAverage,
    HessianStep,
    StopSignal,
    Watchdog,
    count_steps,
    create_optimizer_state,
    expert_parallel_size,
    on_rank_zero,
    skip_steps_that_are_not_finite,
    spoil_gradient,
    watch_routers,
)
from pipeline.errors import Stopped, UserError
from pipeline.feed import Batch, Feed, loss_inputs, targets_of
from pipeline.files import replace_folder
from pipeline.losses import TERMS, count_targets
from pipeline.model.output import RoadworkOutput
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim import build_optimizer, lr_at
from pipeline.plan import Batching, Schedule
from pipeline.progress import format_seconds, say
from pipeline.run_folder import RunFolder
from pipeline.telemetry import Meter, Profiler
from pipeline.validation import Validation


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
        skip_steps_that_are_not_finite(self.engine)
        self.hessian = HessianStep(config, accelerator, self.engine)
        self.average = EngineAverage(model, config.train.ema_decay)
        self.checkpoints = Checkpoints(folder.checkpoints, config, self.rank) if folder else None
        self.stop = StopSignal(config.train.max_minutes)
        self.agreement = Agreement()
        self.meter = Meter(accelerator.device, batching.batch_size, self.agreement)
        self.profiler = Profiler(config.train.profile, folder.path if folder else None, self.rank)
        self.step = 0
        self.saved_step, self.saved_s = -1, time.monotonic()
        self.skips = self.rollbacks = 0
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
        batches = self.feed.batches(self.samples_seen)
        started, before_s = time.monotonic(), self.wall_s
        while self.step < last and not self._out_of_patience():
            self.alive()
            mine, problem = self._fetch(batches)
            counts, stop, save = self._agree(mine, problem)
            if stop or (save and self.skips == 0):
                self._save_once()
            if stop:
                raise Stopped(self._farewell())
            with self.profiler.step(self.step + 1):
                losses, outputs = self._take_step(mine, counts)
            taken = self.engine.was_step_applied()
            self.step += 1
            self.wall_s = before_s + time.monotonic() - started
            self.meter.add_step(losses, taken)
            self.skips = 0 if taken else self.skips + 1
            if not taken:
                self._skip(mine, outputs)
            if self.step % self.config.train.log_every == 0 or self.step == last:
                self.meter.add_load(outputs[-1], self.config.model.experts_per_token)
                self._log()
            if self._validation_due():
                self._validate()
                self._save_once()
        self._save_once()

    def _fetch(self, batches: Iterator[Batch]) -> tuple[list[Batch], UserError | None]:
        """This rank's micro-batches of one step, or what is wrong with its data."""
        with self.meter.waiting_for_data():
            try:
                return [next(batches) for _ in range(self.batching.accumulation)], None
            except UserError as error:
                return [], error

    def _agree(self, mine: list[Batch], problem: UserError | None) -> tuple[torch.Tensor, bool, bool]:
        """Decide together before a step. Collective.

        Returns:
            How many samples of the step have each term's target, whether to stop, and whether to save first.

        Raises:
            UserError: On every rank, where one cannot read its data; the others would wait for it, or report its
                absence instead of its reason.
        """
        every_s, every = 60 * self.config.checkpoint.every_minutes, self.config.checkpoint.every_steps
        clock = self.rank == 0 and 0 < every_s <= time.monotonic() - self.saved_s
        counts = [count_targets(targets_of(batch)) for batch in mine]
        flags = torch.tensor([float(problem is not None), float(self.stop.received), float(clock)])
        shared = self.agreement.sum(torch.cat([sum(counts, torch.zeros(len(TERMS))), flags]))
        failed, stop, save = (shared[-3:] > 0).tolist()
        if failed:
            problems = self.agreement.gather(problem and str(problem))
            raise UserError(next(text for text in problems if text is not None))
        return shared[:-3], stop, save or (every > 0 and self.step % every == 0)

    def _take_step(self, batches: list[Batch], counts: torch.Tensor) -> tuple[torch.Tensor, list[RoadworkOutput]]:
        """Take one optimizer step over several micro-batches, if its loss and gradient are finite.

        Args:
            batches: This rank's.
            counts: See `_agree`.

        Returns:
            This rank's part of the loss, then of each term, and the answers to each micro-batch.
        """
        # All randomness of a step follows from its number and the rank, so a checkpoint need not hold any.
        seeds = np.random.SeedSequence((self.config.train.seed, self.step, self.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        lr = lr_at(self.step, self.schedule.steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        every = self.config.train.distil_every
        keep_all = every > 0 and self.step % every == 0
        counts, outputs = counts.to(self.accelerator.device), []
        sums = torch.zeros(1 + len(TERMS), device=self.accelerator.device)
        self.hessian.take(self.step, batches, counts, keep_all)
        for batch in batches:
            with self.accelerator.accumulate(self.engine), self.meter.flops_counted(keep_all):
                with self.meter.forward():
                    output = self.engine(**loss_inputs(batch, counts, keep_all))
                # The loss is this micro-batch's share of the mean over all; DeepSpeed averages over ranks and
                # micro-batches, which would divide it once more.
                self.accelerator.backward(spoil_gradient(output.loss) * self.world_size * len(batches))
            outputs.append(output)
            sums[0] += output.loss.detach()
            for i, term in enumerate(TERMS):
                if term in output.loss_terms:
                    sums[1 + i] += output.loss_terms[term].detach().sum() / counts[i].clamp(min=1)
        if self.engine.was_step_applied():
            self.average.update(self.step)
        return sums, outputs

    def _skip(self, batches: list[Batch], outputs: list[RoadworkOutput]) -> None:
        """Name the samples of a step that was not taken, and roll back after several in a row. Collective."""
        count_steps(self.engine, self.step)
        reason, names = find_bad_samples(self.agreement, self.feed, batches, outputs)
        in_a_row, most = self.skips, self.config.train.max_skips
        self._write({"kind": "skip", "step": self.step, "reason": reason, "samples": names, "in_a_row": in_a_row})
        if self.rank == 0:
            say(
                f"step {self.step} skipped: its {reason} is not finite; samples: {in_words(names)} "
                f"({in_a_row} in a row, {most} make a roll-back)"
            )
        if in_a_row >= most:
            self._roll_back(reason)

    def _roll_back(self, reason: str) -> None:
        """Go on with the last checkpoint's weights, optimizer and average. Collective.

        The run's place stays: the samples of the failed steps would fail again, so they are passed over, and so are
        those since the checkpoint. All that a run is then follows from its step, as ever. (PaLM passed over the batches
        around a spike in the same way, arXiv 2204.02311, section 5.1.)
        """
        trouble = f"{self.skips} steps in a row up to step {self.step} had no finite {reason}"
        cure = (
            "mend or leave out the samples that metrics.jsonl names, or begin another --train.run with a lower optim.lr"
        )
        if self.rollbacks >= self.config.train.max_rollbacks:
            raise FloatingPointError(f"{trouble}, after {self.rollbacks} roll-backs; {cure}")
        state = self.checkpoints.restore(self.engine, self.average) if self.checkpoints else None
        if state is None:
            raise FloatingPointError(f"{trouble}, and there is no checkpoint yet to roll back to; {cure}")
        self.skips, self.rollbacks = 0, self.rollbacks + 1
        count_steps(self.engine, self.step)
        self._write({"kind": "rollback", "step": self.step, "to": state["step"]})
        if self.rank == 0:
            say(
                f"{trouble}: rolled back to the weights of step {state['step']}, and the samples in between are passed "
                f"over (roll-back {self.rollbacks} of {self.config.train.max_rollbacks})"
            )
        self._save_once()

    def _log(self) -> None:
        means, curvature = self.meter.read(), self.hessian.read()
        left_s = (self.schedule.steps - self.step) * means["step_s"]
        epoch = self.samples_seen / self.schedule.samples_per_epoch
        lr = lr_at(self.step - 1, self.schedule.steps, self.config.optim)
        norm = self.engine.get_global_grad_norm()  # None with experts shared under ZeRO-0
        self._write({
            "kind": "train", "step": self.step, "epoch": round(epoch, 3), "lr": lr,
            **({"grad_norm": float(norm)} if norm is not None and math.isfinite(norm) else {}),
            **curvature, **means,
        })  # fmt: skip
        if self.rank == 0:
            loss = f"loss {means['loss']:.4f}" if "loss" in means else "no step taken"
            say(
                f"step {self.step}/{self.schedule.steps}  epoch {epoch:.2f}  {loss}  lr {lr:.2e}  "
                f"{means['images_per_s']:.1f} images/s  {format_seconds(left_s)} left"
            )
            if curvature.get("hessian_skips"):
                say(
                    f"{curvature['hessian_skips']} of the estimates of the curvature since the last line were not "
                    "finite and were left out"
                )
            warning = self.meter.warn_of_straggler(means["rank_s"])
            if warning:
                say(warning)

    def _validation_due(self) -> bool:
        due = self.step in self.schedule.validation_steps and self.step > self.validated_step
        return due and self.validation is not None

    def _validate(self) -> None:
        assert self.validation is not None
        with self.meter.paused():
            averaged = self._averaged_model()
            scores = self.validation(averaged, self.alive)
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
        model = self._model_of(self.average.gathered()).attach(self.model.backbone)
        model.loss_config = self.config.loss
        return model.to(self.accelerator.device).to(self.model.dtype)

    def _model_of(self, weights: dict[str, torch.Tensor]) -> RoadworkModel:
        """A whole head with the given weights, without a backbone."""
        config: Any = self.model.config
        model = RoadworkModel(config)
        model.load_state_dict(weights)
        return model

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
        self.skips, self.rollbacks, self.saved_step = state["skips"], state["rollbacks"], self.step
        on_rank_zero(self._restore_best_model)
        if self.rank == 0 and self.folder:
            self.folder.truncate_metrics(self.step)
            say(f"resuming at step {self.step} of {self.schedule.steps}")
        dist.barrier()

    def _restore_best_model(self) -> None:
        """Write the best weights again where the checkpoint comes from another machine, which took them with it."""
        assert self.checkpoints is not None and self.folder is not None  # noqa: PT018
        folder = self.folder
        if self.best is None or ((folder.model / "config.json").exists() and not self.checkpoints.fetched):
            return
        weights = self.checkpoints.best_average()
        if weights is None:
            raise UserError(
                f"the best weights so far, those of step {self.best['step']}, are neither in {folder.model} nor in a "
                "checkpoint; copy that folder here, or choose another --train.run"
            )
        replace_folder(folder.model, self._model_of(weights).save_pretrained)

    def close(self) -> None:
        """Wait, for a bounded time, for what is still on its way to a store; says what did not get there."""
        if self.checkpoints:
            self.checkpoints.close()

    def _farewell(self) -> str:
        reason = f"train.max_minutes={self.config.train.max_minutes:g} is over; " if self.stop.out_of_time else ""
        what = "saved" if self.checkpoints and self.checkpoints.unsaved is None else "not saved"
        return f"{reason}{what} at step {self.step} of {self.schedule.steps}; the same command goes on from there"

    def _save_once(self) -> None:
        """Save, unless this very step is saved already."""
        if self.checkpoints is None or self.saved_step == self.step:
            return
        with self.meter.paused():
            self._save()
        self.saved_step, self.saved_s = self.step, time.monotonic()

    def _save(self) -> None:
        assert self.checkpoints is not None
        state = {
            "best": self.best,
            "validations_since_best": self.validations_since_best,
            "validated_step": self.validated_step,
            "samples_seen": self.samples_seen,
            "wall_s": self.wall_s,
            "skips": self.skips,
            "rollbacks": self.rollbacks,
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
