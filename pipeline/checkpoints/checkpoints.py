"""Checkpoints as named tensors: nothing pickled, and independent of the world size.

`distributed.engine_tensors` gathers the tensors, `background` holds their copy while training continues, `files`
defines a checkpoint's folder, `retention` decides which checkpoints stay, and `sync` copies them to a URL.

No random state is stored, since none outlives a step: the order of samples follows from the seed and the epoch, and
dropout and exploration of a step from (seed, step, rank). So any number of processes may resume from any checkpoint,
and on a CPU the same number resumes bit for bit.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoints import files
from pipeline.checkpoints.background import Background, HostCopy
from pipeline.checkpoints.files import AVERAGE, OPTIMIZER, STATE, WEIGHTS, Damaged, write_checkpoint
from pipeline.checkpoints.retention import Retention
from pipeline.checkpoints.sync import Remote, Uploader
from pipeline.config import FREE_KEYS, Config, differences
from pipeline.data.sampler import VERSION
from pipeline.distributed.agreement import on_all_ranks, on_rank_zero
from pipeline.distributed.engine_tensors import EngineAverage, set_tensors, whole_moments, whole_weights
from pipeline.errors import UserError, explain
from pipeline.files import write_json
from pipeline.optim.config import MOMENTS
from pipeline.progress import say

# On these errors a checkpoint is given up and training continues; EFBIG is the limit of `ulimit -f`.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG})


@dataclass
class Steps:
    """How long some steps took."""

    number: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count a step."""
        self.number += 1
        self.seconds += seconds

    @property
    def mean_s(self) -> float | None:
        """Mean seconds of a step; None where there was none."""
        return round(self.seconds / self.number, 5) if self.number else None


class Checkpoints:
    """Saves and restores a DeepSpeed engine, its weight average and the trainer's state; rank 0 writes, in a thread.

    Attributes:
        unsaved: The step of the last checkpoint if it could not be written, else None; up to date after `wait`.
        fetched: Whether the run resumes from a checkpoint that was fetched from the URL; known to rank 0 alone.
    """

    def __init__(self, folder: Path, config: Config, rank: int, log: Callable[[dict[str, Any]], None]):
        """Keep the checkpoints of a run in `folder`, and copy them to the URL that the configuration may name.

        Args:
            folder: Folder of all checkpoints; it need not exist.
            config: The run's configuration.
            rank: This process's rank.
            log: Appends a line to metrics.jsonl; called on rank 0, in the thread.
        """
        settings = config.checkpoint
        self.folder, self.rank, self.settings, self.log = folder, rank, settings, log
        self.run, self.optimizer = _comparable(config), config.optim.name
        self.retention = Retention(settings.keep, settings.keep_every)
        self.unsaved: int | None = None
        self.fetched = False
        self.source = settings.resume or settings.sync
        self._looked = False
        self._copy, self._writer = HostCopy(), Background[int | None]("checkpoint-write")
        self._writing = False  # whether a save was not waited for yet; the same on every rank
        self._times: list[tuple[float, float]] = []
        self._slowed = False  # whether a write went on when the present step began
        self._steps = {True: Steps(), False: Steps()}  # of this process: those that began in a write, and the others
        self._steps_in_write = Steps()  # since the last save
        self.uploader: Uploader | None = None
        if rank == 0 and settings.sync:
            self.uploader = Uploader(Remote(settings.sync), folder, self.retention)

    def save(self, step: int, engine: Any, average: EngineAverage, state: dict[str, Any]) -> None:
        """Copy what belongs to a checkpoint, and let a thread write it. Collective: all ranks call it.

        It first waits for the save before. A full or failing disk costs a checkpoint only: the earlier ones stay, and
        `unsaved` is set.

        Args:
            step: Optimizer steps taken.
            engine: The DeepSpeed engine.
            average: The average of the engine's weights.
            state: JSON values of the trainer; `best` is None or has the `step` of the best validation.

        Raises:
            UserError: The save before could not be written, for a reason that the user must mend.
        """
        started = time.monotonic()
        self.wait()
        for file, tensors in (
            (WEIGHTS, whole_weights(engine)), (OPTIMIZER, whole_moments(engine)), (AVERAGE, average.whole()),
        ):  # fmt: skip
            if self.rank == 0:
                self._copy.fill(file, tensors)
            else:
                deque(tensors, maxlen=0)  # takes part in the gathering, and keeps nothing
        self._writing = True
        if self.rank == 0:
            self._copy.finish()
            stopped_s, values = time.monotonic() - started, {**state, "config": self.run, "sampler": VERSION}
            self._slowed, self._steps_in_write = True, Steps()
            self._writer.start(lambda: self._write(step, values, stopped_s))

    def add_step(self, seconds: float) -> None:
        """Count a step, apart where it began while a checkpoint was written."""
        for steps in (self._steps[self._slowed], *([self._steps_in_write] if self._slowed else [])):
            steps.add(seconds)
        self._slowed = self._writer.busy

    def wait(self) -> None:
        """Wait until the last save is on the disk, or is given up and `unsaved` is set. Collective.

        Raises:
            UserError: It could not be written, for a reason that the user must mend.
        """
        if self._writing:
            self._writing = False
            self.unsaved = on_rank_zero(self._writer.wait)

    def restore(self, engine: Any, average: EngineAverage) -> dict[str, Any] | None:
        """Restore the newest valid checkpoint, after a save has been waited for. Collective: all ranks call it.

        The first call also looks for a newer checkpoint at `checkpoint.resume`, or else at `checkpoint.sync`, and
        starts to upload what `checkpoint.sync` lacks.

        Returns:
            The trainer's state, or None when there is no checkpoint.

        Raises:
            UserError: The checkpoint is of another run or model; nothing was changed.
        """
        self.wait()
        path = on_rank_zero(self._choose)
        if path is None:
            return None
        shapes = {name: tuple(tensor.shape) for name, tensor in average.gathered().items()}
        on_all_ranks(lambda: check_tensors(path, shapes, self.optimizer))
        state = files.read_state(path)
        set_tensors(engine, files.read_tensors(path / WEIGHTS), files.read_tensors(path / OPTIMIZER), state["step"])
        average.load(files.read_tensors(path / AVERAGE))
        return state

    def best_average(self) -> dict[str, Any] | None:
        """The averaged weights of the best validation, from this machine or the URL; None if they are lost."""
        if self.retention.best is None:
            return None
        path = self.folder / files.name_of(self.retention.best)
        if self.source and not path.exists():
            with suppress(Damaged, UserError):
                Remote(self.source).fetch(path.name, self.folder)
        try:
            files.check_checkpoint(path)
        except Damaged:
            return None
        return files.read_tensors(path / AVERAGE)

    def summary(self) -> dict[str, float]:
        """What the saves of this process cost, for rank 0's summary.

        Returns:
            `saves`, how many were written, and the mean seconds of each: `save_s`, in which training stood still, and
            `write_s`, until the checkpoint was on the disk, while training continued. Then the mean seconds of a step:
            `step_s_in_writes` of those that began in a write, and `step_s_otherwise`; absent where there was none.
        """
        if not self._times:
            return {"saves": 0}
        stopped, written = (round(sum(seconds) / len(seconds), 3) for seconds in zip(*self._times, strict=True))
        steps = {"step_s_in_writes": self._steps[True].mean_s, "step_s_otherwise": self._steps[False].mean_s}
        slowed = {name: mean_s for name, mean_s in steps.items() if mean_s is not None}
        return {"saves": len(self._times), "save_s": stopped, "write_s": written, **slowed}

    def close(self) -> None:
        """Wait for the last save, report what is not saved, and wait for the upload for `checkpoint.sync_wait_s`.

        Not collective, since a run that ends by an error may have lost its other ranks.
        """
        try:
            if self._writing:
                self.unsaved = self._writer.wait()
        except UserError as error:  # the run ends by another one already
            say(f"the last checkpoint is not saved: {error}")
        if self.rank == 0 and self.unsaved is not None:
            say(f"the state of step {self.unsaved} is not saved; {self._remaining()}")
        if self.uploader:
            self.uploader.close(self.settings.sync_wait_s)

    def _write(self, step: int, state: dict[str, Any], stopped_s: float) -> int | None:
        """Write the copy as a checkpoint, then remove old ones; returns the step if it could not be written."""
        self.retention.best = state["best"] and state["best"]["step"]
        started = time.monotonic()
        try:
            write_checkpoint(self.folder, step, self._copy.files, state)
        except OSError as error:
            if error.errno in NO_ROOM:
                why = (error.strerror or str(error)).lower()
                say(f"the checkpoint of step {step} is not saved ({why}); {self._remaining()}")
                return step
            raise UserError(explain(error)) from error
        self._times.append((stopped_s, time.monotonic() - started))
        # A checkpoint that is being uploaded stays until it is uploaded.
        with self.uploader.holding() if self.uploader else nullcontext(frozenset[str]()) as busy:
            names = self._names()
            for name in set(names) - self.retention.kept(names) - busy:
                files.remove_checkpoint(self.folder / name)
        with suppress(OSError):  # on a full disk the folders' names must do
            write_json(self.folder / files.POINTERS, self.retention.pointers(self._names()))
            save_s, write_s = (round(seconds, 3) for seconds in self._times[-1])
            mean_s = self._steps_in_write.mean_s
            slowed = {} if mean_s is None else {"step_s": mean_s}
            self.log({"kind": "save", "step": step, "save_s": save_s, "write_s": write_s, **slowed})
        if self.uploader:
            self.uploader.notify()
        return None

    def _choose(self) -> Path | None:
        """The checkpoint to resume from, on this machine."""
        files.recover(self.folder)
        name = self._newest_valid()
        if self.source and not self._looked:
            newer = self._fetch_newer(name)
            name, self.fetched = newer or name, newer is not None
        path = None if name is None else self.folder / name
        if path is not None:
            state = files.read_state(path)
            if state.get("sampler") != VERSION:
                raise UserError(
                    f"{path / STATE} is of a run that was begun by a version whose epochs have other photos in another "
                    "order; finish it with that version, or choose another --train.run and checkpoint.sync to start "
                    "anew"
                )
            changed = differences(state["config"], self.run)
            if changed:
                raise UserError(
                    f"{path / STATE} is of a run with {changed[0]}; give the same value to resume it, or another "
                    "--train.run and checkpoint.sync to start anew"
                )
            self.retention.best = state["best"] and state["best"]["step"]
        if self.uploader and not self._looked:
            self.uploader.start(new=path is None)
        self._looked = True
        return path

    def _newest_valid(self) -> str | None:
        for name in self._names():
            try:
                files.check_checkpoint(self.folder / name)
            except Damaged as damage:
                say(f"checkpoint {self.folder / name} is damaged ({damage}); trying the one before it")
                self._set_aside(name)
            else:
                return name
        return None

    def _set_aside(self, name: str) -> None:
        """Keep a damaged checkpoint under another name, so that it does not count among those that stay."""
        aside = self.folder / f"{name}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self.folder / name, aside)

    def _fetch_newer(self, than: str | None) -> str | None:
        """Fetch the newest valid checkpoint at the URL if it is newer than this machine's; returns its name."""
        try:
            return Remote(self.source).fetch_newest(self.folder, -1 if than is None else files.step_of(than))
        except UserError as error:
            if than is None or self.settings.resume:
                raise
            say(f"only this machine's checkpoints are used: {error}")
            return None

    def _names(self) -> list[str]:
        return files.newest_first(path.name for path in self.folder.iterdir()) if self.folder.exists() else []

    def _remaining(self) -> str:
        names = self._names()
        return (
            f"the newest checkpoint is that of step {files.step_of(names[0])}" if names else "there is no earlier one"
        )


def _comparable(config: Config) -> dict[str, Any]:
    """The part of a configuration that a resumed run must share, as it comes back from JSON."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    del values["checkpoint"]
    return {
        room: {key: value for key, value in keys.items() if key not in FREE_KEYS.get(room, ())}
        for room, keys in values.items()
    }


def check_tensors(path: Path, shapes: dict[str, tuple[int, ...]], optimizer: str) -> None:
    """Compare a checkpoint's names, shapes and types with those of the model and optimizer in training.

    Raises:
        UserError: The checkpoint is of another model or optimizer.
    """
    moments = {f"{name}/{kind}": shape for name, shape in shapes.items() for kind in MOMENTS[optimizer]}
    # The weights first: where only the optimizer's tensors differ, the model is the same.
    for file, expected, what in (
        (WEIGHTS, shapes, "model"), (AVERAGE, shapes, "model"), (OPTIMIZER, moments, "optimizer"),
    ):  # fmt: skip
        problem = files.difference(path / file, expected)
        if problem is not None:
            raise UserError(f"{path / file} is of another {what} ({problem}); choose another --train.run")
