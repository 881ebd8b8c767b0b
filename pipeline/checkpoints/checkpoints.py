"""Checkpoints as named tensors: nothing pickled, and independent of the world size.

`distributed.engine_tensors` gathers the tensors, `files` defines a checkpoint's folder, `retention` decides which
checkpoints stay, and `sync` copies them to a URL.

No random state is stored, since none outlives a step: the order of samples follows from the seed and the epoch, and
dropout and exploration of a step from (seed, step, rank). So any number of processes may resume from any checkpoint,
and on a CPU the same number resumes bit for bit.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.checkpoints import files
from pipeline.checkpoints.files import AVERAGE, OPTIMIZER, STATE, WEIGHTS, Damaged, Tensors, write_checkpoint
from pipeline.checkpoints.retention import Retention
from pipeline.checkpoints.sync import Remote, Uploader
from pipeline.config import FREE_KEYS, Config, differences
from pipeline.data.sampler import VERSION
from pipeline.distributed.agreement import on_all_ranks, on_rank_zero
from pipeline.distributed.engine_tensors import gather_tensors, set_tensors
from pipeline.errors import UserError, explain
from pipeline.files import write_json
from pipeline.optim.config import MOMENTS
from pipeline.optim.ema import WeightAverage
from pipeline.progress import say

# On these errors a checkpoint is given up and training continues; EFBIG is the limit of `ulimit -f`.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG})


class Checkpoints:
    """Saves and restores a DeepSpeed engine, its weight average and the trainer's state; rank 0 writes.

    Attributes:
        unsaved: The step of the last checkpoint if it could not be written, else None.
        fetched: Whether the run resumes from a checkpoint that was fetched from the URL; known to rank 0 alone.
    """

    def __init__(self, folder: Path, config: Config, rank: int):
        """Keep the checkpoints of a run in `folder`, and copy them to the URL that the configuration may name."""
        settings = config.checkpoint
        self.folder, self.rank, self.settings = folder, rank, settings
        self.run, self.optimizer = _comparable(config), config.optim.name
        self.retention = Retention(settings.keep, settings.keep_every)
        self.unsaved: int | None = None
        self.fetched = False
        self.source = settings.resume or settings.sync
        self._looked = False
        self.uploader: Uploader | None = None
        if rank == 0 and settings.sync:
            self.uploader = Uploader(Remote(settings.sync), folder, self.retention)

    def save(self, step: int, engine: Any, average: WeightAverage, state: dict[str, Any]) -> None:
        """Write a checkpoint. Collective: all ranks call it.

        A full or failing disk costs this checkpoint only: the earlier ones stay, and `unsaved` is set.

        Args:
            step: Optimizer steps taken.
            engine: The DeepSpeed engine.
            average: The average of the engine's weights.
            state: JSON values of the trainer; `best` is None or has the `step` of the best validation.
        """
        weights, moments = gather_tensors(engine)
        tensors = {WEIGHTS: weights, OPTIMIZER: moments, AVERAGE: average.gathered()}
        problem = on_rank_zero(lambda: self._write(step, tensors, {**state, "config": self.run, "sampler": VERSION}))
        self.unsaved = None if problem is None else step
        if problem is not None and self.rank == 0:
            say(f"the checkpoint of step {step} is not saved ({problem}); {self._remaining()}")

    def restore(self, engine: Any, average: WeightAverage) -> dict[str, Any] | None:
        """Restore the newest valid checkpoint. Collective: all ranks call it.

        The first call also looks for a newer checkpoint at `checkpoint.resume`, or else at `checkpoint.sync`, and
        starts to upload what `checkpoint.sync` lacks.

        Returns:
            The trainer's state, or None when there is no checkpoint.

        Raises:
            UserError: The checkpoint is of another run or model; nothing was changed.
        """
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

    def close(self) -> None:
        """Report what is not saved, and wait for the upload for at most `checkpoint.sync_wait_s`."""
        if self.rank == 0 and self.unsaved is not None:
            say(f"the state of step {self.unsaved} is not saved; {self._remaining()}")
        if self.uploader:
            self.uploader.close(self.settings.sync_wait_s)

    def _write(self, step: int, tensors: Mapping[str, Tensors], state: dict[str, Any]) -> str | None:
        """Write a checkpoint, then remove old ones; returns why it could not be written, or None."""
        self.retention.best = state["best"] and state["best"]["step"]
        try:
            write_checkpoint(self.folder, step, tensors, state)
        except OSError as error:
            if error.errno in NO_ROOM:
                return (error.strerror or str(error)).lower()
            raise UserError(explain(error)) from error
        # A checkpoint that is being uploaded stays until it is uploaded.
        with self.uploader.holding() if self.uploader else nullcontext(frozenset[str]()) as busy:
            names = self._names()
            for name in set(names) - self.retention.kept(names) - busy:
                shutil.rmtree(self.folder / name, ignore_errors=True)  # failing to remove an old one ends no run
        with suppress(OSError):  # on a full disk the folders' names must do
            write_json(self.folder / files.POINTERS, self.retention.pointers(self._names()))
        if self.uploader:
            self.uploader.notify()
        return None

    def _choose(self) -> Path | None:
        """The checkpoint to resume from, on this machine."""
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)
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
