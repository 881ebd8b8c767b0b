"""The folder in which an output is made, how far the output is, and how it is published."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.data.index import INDEX_NAME, Shard
from pipeline.data.lock import LOCK_NAME, locked
from pipeline.data.storage import is_url, open_folder
from pipeline.errors import UserError, require
from pipeline.files import replace_folder, sync
from pipeline.parsing.typed_json import load_json

if TYPE_CHECKING:
    from pipeline.data.features import FeatureShard

HEADER_NAME, JOURNAL_NAME = "plan.json", "journal.jsonl"
SUMMARY_NAME, REJECTS_NAME, MAP_NAME = "summary.json", "rejects.jsonl", "map.png"
SPARE_BYTES = 64 << 20  # for the index, logs and others

Found = TypeVar("Found")


class Workplace:
    """The folder in which one output is made, and the folder or URL of the output.

    An output that is a folder is made in a hidden folder beside it, which is renamed at the end. A URL gets each file
    when it is finished, and the index last. So an output is in one of these states, the furthest first:

    - finished: the output is there, with its index;
    - assembled: the hidden folder holds the whole output, and only the renaming is missing;
    - planned: the hidden folder holds a plan, and perhaps some of the files, each with a receipt;
    - otherwise nothing is decided yet, or something else is in the output's folder, which is refused.
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

    @property
    def summary_path(self) -> Path | str:
        """Where a user finds the summary of the finished output."""
        return Path(self.out) / SUMMARY_NAME if self.upload is None else f"{self.out}/{SUMMARY_NAME}"

    def is_finished(self) -> bool:
        """Whether the output is there: its index is the last file to be written."""
        folder = open_folder(self.out)
        return folder.exists(INDEX_NAME) and folder.exists(SUMMARY_NAME)

    def finished(self, read: Callable[[str], Found], what: str) -> Found | None:
        """The index of the finished output; None where there is no output yet.

        Args:
            read: Reads the index in a folder.
            what: The kind of output, in a word.

        Raises:
            UserError: Something else is in the output's folder, or its index cannot be read.
        """
        if self.is_finished():
            return read(self.out)
        local = Path(self.out)
        if self.upload is None and local.exists() and (not local.is_dir() or any(local.iterdir())):
            raise self.refused(f"exists and holds no finished {what}")
        return None

    def assembled(self, read: Callable[[str], Found]) -> Found | None:
        """The index of an output that a run completed but did not rename; None where there is none.

        Args:
            read: Reads the index in a folder.
        """
        if not ((self.path / INDEX_NAME).exists() and (self.path / SUMMARY_NAME).exists()):
            return None
        try:
            return read(str(self.path))
        except UserError:
            return None

    def planned(self, from_json: Callable[[dict[str, Any]], Found]) -> Found | None:
        """The plan in the hidden folder; None where there is no plan that can be read."""
        try:
            return from_json(load_json((self.path / HEADER_NAME).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def check_whole(self, files: Iterable[Shard | FeatureShard]) -> None:
        """Refuse a finished output that lacks a file.

        Raises:
            UserError: A file that the index lists is missing, or has another length.
        """
        listed = list(files)
        for file, size in zip(listed, open_folder(self.out).sizes([file.name for file in listed]), strict=True):
            if size != file.bytes:
                raise self.refused(f"is damaged, {file.name} is missing or not {file.bytes} bytes long")

    def refused(self, why: str) -> UserError:
        """The error about an output that must not be overwritten; `why` says what the output is or holds."""
        return UserError(f"{self.out} {why}; choose another --out or remove it")

    @contextmanager
    def locked(self, shared: bool = False) -> Iterator[Path]:
        """Lock the folder while it is worked in; the lock ends with the process.

        However the work ends, what is done is kept for the next run. After a user's mistake before there is a plan,
        only what was found out about photos is kept.

        Args:
            shared: Others may hold the lock too, each for its own part.

        Raises:
            UserError: Another run holds the lock.
        """
        with locked(self.path, f"writing {self.out}", "choose another --out", shared) as held:
            if held and not shared:
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

    def clear(self, keep: frozenset[str] = frozenset()) -> None:
        """Remove all but the lock and the named files; the plan first, since it would vouch for the rest."""
        (self.path / HEADER_NAME).unlink(missing_ok=True)
        for left in self.path.iterdir():
            if left.name in keep or left.name == LOCK_NAME:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()

    def remove(self) -> None:
        """Remove the folder, with its lock."""
        self.clear()
        (self.path / LOCK_NAME).unlink(missing_ok=True)
        self.path.rmdir()

    def check_space(self, needed: int) -> None:
        """Refuse an output that the disk cannot hold.

        Raises:
            UserError: Less than `needed` bytes are free.
        """
        out = Path(self.out)
        nearest = next(folder for folder in (out, *out.parents) if folder.is_dir())
        for folder in (self.path,) if self.upload else (self.path, nearest):
            free = shutil.disk_usage(folder).free
            if free < needed + SPARE_BYTES:
                raise UserError(
                    f"the disk of {folder} has {free / 1e9:.2f} GB free and the shards need "
                    f"{(needed + SPARE_BYTES) / 1e9:.2f} GB; free some space, or choose another --out"
                )

    def publish(self, files: Iterable[Shard | FeatureShard]) -> Path | str:
        """Make the finished output appear once all of it is on the disk; then remove what only the work needed.

        Args:
            files: The files that the index lists.

        Returns:
            The path or URL of the summary, see `summary_path`.
        """
        beside = (MAP_NAME, REJECTS_NAME, SUMMARY_NAME)
        if self.upload is not None:
            target = open_folder(self.upload)
            for name in (*beside, INDEX_NAME):  # with the index there, it is finished
                target.put(self.path / name, name)
            self.remove()
        else:
            self.clear(keep=frozenset({*(file.name for file in files), *beside, INDEX_NAME}))
            self._move(Path(self.out))
        return self.summary_path

    def _move(self, out: Path) -> None:
        """Rename the hidden folder to the output; on another disk, copy it."""
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.path.stat().st_dev == out.parent.stat().st_dev:
            (self.path / LOCK_NAME).unlink(missing_ok=True)
            sync(self.path)
            os.replace(self.path, out)  # over an empty folder too
            sync(out.parent)
            return
        unlocked = shutil.ignore_patterns(LOCK_NAME)
        try:
            replace_folder(out, lambda fresh: shutil.copytree(self.path, fresh, ignore=unlocked, dirs_exist_ok=True))
        except (OSError, shutil.Error) as error:
            raise UserError(
                f"{out} cannot be written ({error}); what is done stays in {self.path}, so give the command again"
            ) from error
        self.remove()


def check_apart(source: str | Path, *folders: Path) -> None:
    """Refuse to write inside the source, where the output would be a part of its own input the next time.

    Raises:
        UserError: A folder is the source, or lies in it.
    """
    inside = Path(source).resolve()
    for folder in folders:
        if inside.is_dir() and folder.resolve().is_relative_to(inside):
            raise UserError(f"{folder} lies inside --source {source}; choose a folder outside of it")


def report_folder(shards: str, out: Path | None, name: str) -> Path:
    """Make the folder for a report about shards, and check that it can be written to, before the work begins.

    Args:
        shards: Folder or URL of the shards.
        out: The folder that the user chose, if any.
        name: The folder's name inside that of the shards, if none was chosen.

    Raises:
        UserError: No folder was chosen for shards at a URL, or the folder cannot be written to.
    """
    require(out is not None or not is_url(shards), "--out", out, "a folder of this machine when the shards are not")
    folder = out or Path(shards) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {folder} ({error.strerror}); choose another folder with --out"
        ) from error
    return folder


def is_worth_keeping(path: Path) -> bool:
    """Whether a journal has more than its first line."""
    try:
        with path.open("rb") as stream:
            return stream.readline() != b"" != stream.readline()
    except FileNotFoundError:
        return False
