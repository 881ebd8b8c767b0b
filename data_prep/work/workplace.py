"""The hidden folder in which shards are made, and how it becomes the finished one."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.index import INDEX_NAME
from pipeline.data.storage import is_url, open_folder
from pipeline.errors import UserError
from pipeline.files import replace_folder, sync

HEADER_NAME, JOURNAL_NAME = "plan.json", "journal.jsonl"
SUMMARY_NAME, REJECTS_NAME, MAP_NAME = "summary.json", "rejects.jsonl", "map.png"
SPARE_BYTES = 64 << 20  # for the index, logs and others


class Workplace:
    """Where the work for one output is done, and where the output goes.

    An output that is a folder is made in a hidden one beside it, which is renamed at the end. A URL gets each tar when
    it is finished, and the index last.
    """

    def __init__(self, out: str, work: Path | None):
        """Name the folder; nothing is made yet.

        Args:
            out: Folder or URL of the output.
            work: Folder to make the hidden one in; beside the output if None, or in the current folder for a URL.
        """
        self.out = out if is_url(out) else str(Path(out).resolve())
        self.upload = out if is_url(out) else None
        name = self.out.rstrip("/").rpartition("/")[2]
        if work is None and self.upload is None:
            self.path = Path(self.out).parent / f".{name}.partial"
        else:
            # Outputs of one name may share the folder.
            unique = hashlib.sha256(self.out.encode("utf-8", "surrogateescape")).hexdigest()[:8]
            self.path = (work or Path.cwd()).resolve() / f".{name}-{unique}.partial"

    @contextmanager
    def locked(self, shared: bool = False) -> Iterator[Path]:
        """Hold the folder while it is worked in; the lock ends with the process.

        Whatever ends the work leaves what is done for the next run; a user's mistake before anything is planned leaves
        what was found out about photos, if anything was.

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
                    self.clear(keep=frozenset({JOURNAL_NAME}))
                    if not is_worth_keeping(self.path / JOURNAL_NAME):
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
        places = [self.path]
        if self.upload is None:
            places.append(nearest_folder(Path(self.out)))
        for place in places:
            free = shutil.disk_usage(place).free
            if free < needed + SPARE_BYTES:
                raise UserError(
                    f"the disk of {place} has {free / 1e9:.2f} GB free and the shards need "
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
            return
        try:
            replace_folder(out, lambda fresh: shutil.copytree(self.path, fresh, dirs_exist_ok=True))
        except (OSError, shutil.Error) as error:
            raise UserError(
                f"{out} cannot be written ({error}); what is done stays in {self.path}, so give the command again"
            ) from error
        self.remove()


def check_apart(source: str | Path, *places: Path) -> None:
    """Refuse to write inside the source, where the output would be a part of its own input the next time.

    Raises:
        UserError: A place lies in the source, or is it.
    """
    inside = Path(source).resolve()
    for place in places:
        if inside.is_dir() and place.resolve().is_relative_to(inside):
            raise UserError(f"{place} lies inside --source {source}; choose a folder outside of it")


def is_worth_keeping(path: Path) -> bool:
    """Whether a journal has more than its first line."""
    try:
        with path.open("rb") as stream:
            return stream.readline() != b"" != stream.readline()
    except FileNotFoundError:
        return False


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the first one above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
