"""Answers that are kept as they are made, and become the output once all of them are there.

Beside the output lies a hidden folder with the list of photos and with the answers so far: in `work.sqlite` those of
earlier attempts, which only the first process writes, and only while the others wait; in `part-*.jsonl` those of this
attempt, a line per batch, one file for each process. After a kill, all whole lines count. An answer never depends on
which process made it, or in which attempt.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.lock import LOCK_NAME, locked
from pipeline.errors import UserError, explain
from pipeline.evaluation.dealing import Deal, count
from pipeline.evaluation.photo_list import PhotoList, open_to_read, path_of, write_list
from pipeline.progress import say

SYNC_S = 10.0  # a power failure loses the answers of this long at most; a killed process, only those of its batch
TABLES = """
    CREATE TABLE answer (batch INTEGER PRIMARY KEY, rows TEXT NOT NULL);
    CREATE TABLE plan (value TEXT NOT NULL);
"""
Row = dict[str, Any]
Plan = dict[str, Any]


class KeptAnswers:
    """The hidden folder of one output: `begin` and `rows` are for the first process, `missing` and `keep` for all."""

    def __init__(self, output: Path, batch_size: int):
        """Name the folder; nothing is made yet.

        Args:
            output: The file that will hold all answers.
            batch_size: Photos per batch.
        """
        self.output, self.batch_size = output.absolute(), batch_size
        self.folder = self.output.with_name(f".{output.name}.partial")
        self.database = self.folder / "work.sqlite"
        self.photos = PhotoList(self.database)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep others from working in it at the same time; what is in it stays.

        Raises:
            UserError: Another process works in it, or the disk refuses a write.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(explain(error)) from error
        try:
            with locked(self.folder, f"writing {self.output}", "choose another --output"):
                yield
        except sqlite3.OperationalError as error:
            raise UserError(
                f"{self.database}: {error}; fix that and give the same command again, which keeps all answers"
            ) from error

    def begin(self, plan: Plan, inputs: list[str], listed: Path | None, processes: int) -> tuple[int, int]:
        """List the photos, or go on with the list and the answers that are there.

        Args:
            plan: What the answers depend on, by the option that decides it; with another plan the work starts anew.
            inputs: See `check_inputs`.
            listed: See `check_inputs`.
            processes: How many will answer.

        Returns:
            The number of photos, and how many of them have an answer.
        """
        earlier = self._plan()
        different = [name for name in plan if earlier is not None and earlier.get(name) != plan[name]]
        if different:
            say(f"starting anew: the answers in {self.folder} were made with another {' and '.join(different)}")
        if earlier is None or different:
            self._clear()
            with self._write() as database:
                database.executescript(TABLES)
                photos = write_list(database, inputs, listed)
                database.execute("INSERT INTO plan VALUES (?)", [json.dumps(plan)])  # last: it vouches for the list
            answered = 0
        else:
            self._take_parts()
            photos = len(self.photos)
            answered = photos - len(self.missing(photos, 0, 1))
            say(f"resuming: {answered} of {photos} photos, as listed at the first start, have an answer")
        for rank in range(processes):  # here, since over NFS this machine may see for a while only the names it made
            self._part(rank).touch()
        return photos, answered

    def missing(self, photos: int, rank: int, world_size: int) -> Deal:
        """A process's share of the batches without answers, as `begin` left them."""
        connection = open_to_read(self.database)
        done = np.fromiter((batch for (batch,) in connection.execute("SELECT batch FROM answer")), dtype=np.int64)
        connection.close()
        numbers = np.setdiff1d(np.arange(count(photos, self.batch_size)), done)
        return Deal(photos, self.batch_size, numbers[rank::world_size])

    def keep(self, rank: int, batches: Iterable[tuple[int, list[Row]]]) -> None:
        """Append batches, given with their numbers, to the part of this process as they are made."""
        with self._part(rank).open("a") as part:
            synced = time.monotonic()
            for number, rows in batches:
                part.write(json.dumps([number, rows], allow_nan=False) + "\n")
                part.flush()
                if time.monotonic() - synced >= SYNC_S:
                    os.fsync(part.fileno())
                    synced = time.monotonic()
        self.photos.close()

    def rows(self) -> Iterator[tuple[Path, Row]]:
        """The path and the answer of every photo, in the order of the list. All answers must be there."""
        self._take_parts()
        connection = open_to_read(self.database)
        paths = connection.execute("SELECT path FROM photo ORDER BY number")
        batches = connection.execute("SELECT rows FROM answer ORDER BY batch")
        answers = (row for (batch,) in batches for row in json.loads(batch))
        for (path,), row in zip(paths, answers, strict=True):
            yield path_of(path), row
        connection.close()

    def remove(self) -> None:
        """Remove the folder, which the output has made useless; while it is locked, it goes with the lock."""
        self._clear()
        with suppress(OSError):
            self.folder.rmdir()

    def _part(self, rank: int) -> Path:
        return self.folder / f"part-{rank:05d}.jsonl"

    def _plan(self) -> Plan | None:
        """The plan of the answers that are there; None where there is none, or the file is damaged."""
        if not self.database.exists():
            return None
        with suppress(sqlite3.DatabaseError, ValueError), self._write() as database:  # completes a commit, if need be
            row = database.execute("SELECT value FROM plan").fetchone()
            found: Plan | None = json.loads(row[0]) if row else None
            return found
        return None

    def _clear(self) -> None:
        for file in self.folder.iterdir():
            if file.name != LOCK_NAME:
                file.unlink()

    def _take_parts(self) -> None:
        """Move what is in the parts into the database; what a kill cut off is computed again."""
        parts = sorted(self.folder.glob("part-*.jsonl"))
        with self._write() as database:
            for part in parts:
                database.executemany("INSERT OR REPLACE INTO answer VALUES (?, ?)", _whole_lines(part))
        for part in parts:
            part.unlink()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        # Without SQLite's own locks, which some shared disks lack: see `locked`.
        connection = sqlite3.connect(f"{self.database.absolute().as_uri()}?nolock=1", uri=True)
        try:
            with connection:  # commits, unless there was an error
                yield connection
        finally:
            connection.close()


def _whole_lines(part: Path) -> Iterator[tuple[int, str]]:
    """The number and the rows, as JSON, of each batch of a part, up to the first line that is not whole."""
    with part.open() as lines:
        for line in lines:
            try:
                number, rows = json.loads(line)
            except ValueError:
                return
            yield number, json.dumps(rows)
