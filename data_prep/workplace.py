"""The hidden folder in which shards are made, and how it becomes the finished one."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.planning import HEADER_NAME
from pipeline.data.index import INDEX_NAME
from pipeline.data.storage import is_url, open_folder
from pipeline.errors import UserError
from pipeline.files import replace_folder, sync

SUMMARY_NAME, REJECTS_NAME, MAP_NAME = "summary.json", "rejects.jsonl", "map.png"
SPARE_BYTES = 64 << 20  # for the index, logs and others


class Workplace:
    """Where the work for one output is done, and where the output goes.

    An output that is a folder is made in a hidden one beside it, which is renamed at the end. A URL gets each tar when
    it is finished, and the index last.
    """

    def __init__(self, out: str, work: Path | None):
        if not is_url(out):
            out = str(Path(out).resolve())
        self.out = out
        if work is not None:
            self.path = work.resolve()
        else:
            parent = Path.cwd() if is_url(out) else Path(out).parent
            self.path = parent / f".{out.rstrip('/').rpartition('/')[2]}.partial"
        self.upload = out if is_url(out) else None

    @contextmanager
    def locked(self, shared: bool = False) -> Iterator[Path]:
        """Hold the folder while it is worked in; the lock ends with the process.

        A user's mistake before anything is planned leaves nothing behind. Whatever else ends the work leaves what is
        done for the next run.

        Args:
            shared: Others may hold it too, each for its own part.

        Raises:
            UserError: Another run holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another run is writing {self.out} at this moment; wait for it, or choose another --out"
                ) from error
            if not shared:
                for left in self.path.glob(".*.tmp"):
                    left.unlink()
            try:
                yield self.path
            except UserError:
                if self.path.exists() and not (self.path / HEADER_NAME).exists():
                    self.remove()
                raise
        finally:
            os.close(lock)

    def clear(self, keep: frozenset[str] = frozenset()) -> None:
        """Remove everything in the folder but the named files; the plan first, which would vouch for the rest."""
        (self.path / HEADER_NAME).unlink(missing_ok=True)
        for left in self.path.iterdir():
            if left.name in keep:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()

    def remove(self) -> None:
        """Remove the folder."""
        self.clear()
        self.path.rmdir()

    def check_space(self, needed: int) -> None:
        """Refuse to begin what the disk cannot hold.

        Raises:
            UserError: Less than `needed` bytes are free.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed + SPARE_BYTES:
            raise UserError(
                f"the disk of {self.path} has {free / 1e9:.2f} GB free and the shards need "
                f"{(needed + SPARE_BYTES) / 1e9:.2f} GB; free some space, or choose another --out"
            )

    def publish(self, tars: list[str]) -> None:
        """Make the finished output appear, after everything in it is on the disk; then remove what was for the work.

        Args:
            tars: Names of the tars that belong to it.
        """
        beside = (MAP_NAME, REJECTS_NAME, SUMMARY_NAME)
        if self.upload is not None:
            target = open_folder(self.upload)
            for name in (*beside, INDEX_NAME):  # with the index there, it is finished
                target.put(self.path / name, name)
            self.remove()
            return
        self.clear(keep=frozenset({*tars, *beside, INDEX_NAME}))
        out = Path(self.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.path.stat().st_dev == out.parent.stat().st_dev:
            sync(self.path)
            os.replace(self.path, out)  # over an empty folder too
            sync(out.parent)
        else:
            replace_folder(out, lambda fresh: shutil.copytree(self.path, fresh, dirs_exist_ok=True))
            self.remove()
