"""Copies of the checkpoints at a URL, made by a thread of rank 0 while training continues."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import fsspec
from tenacity import Retrying, sleep_using_event, stop_after_attempt, stop_when_event_set, wait_exponential_jitter

from pipeline.checkpoints import files
from pipeline.checkpoints.files import Damaged, Entry
from pipeline.checkpoints.retention import Retention
from pipeline.data.storage import Folder, explained, open_folder
from pipeline.errors import UserError, explain
from pipeline.files import sync, whole_file, write_json
from pipeline.progress import say

ATTEMPTS, FIRST_WAIT_S, LONGEST_WAIT_S = 6, 1.0, 60.0
BLOCK_BYTES = 1 << 20
LOWEST_PRIORITY = 19
PROBE = "roadwork-write-test"


class Remote:
    """The checkpoints at a URL, each in a folder of its own. Failures raise `UserError`."""

    def __init__(self, url: str):
        """Take the URL; nothing is read yet."""
        self.url = url.rstrip("/")
        self.root = open_folder(self.url)

    def names(self) -> list[str]:
        """Folders of checkpoints, newest first, whole or not."""
        try:
            with explained(self.url):
                fs, path = fsspec.url_to_fs(self.url)
                fs.invalidate_cache()
                return files.newest_first(Path(entry).name for entry in fs.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def marker(self, name: str) -> bytes | None:
        """The completion marker of a checkpoint, None where it has none."""
        try:
            return self._folder(name).read(files.MARKER)
        except FileNotFoundError:
            return None

    def check_writable(self, local: Path) -> None:
        """Write a small file and remove it again, so that a run that cannot be synced fails in its first minute.

        Args:
            local: Folder for the small file on this machine.
        """
        local.mkdir(parents=True, exist_ok=True)
        probe = local / f".{PROBE}"
        probe.write_text("a test of the right to write here\n")
        try:
            self.root.put(probe, PROBE)
            self.root.delete(PROBE)
        finally:
            probe.unlink()

    def upload(self, path: Path) -> None:
        """Upload a checkpoint: its files, read back and compared, then the manifest, then the completion marker.

        Files that an earlier attempt uploaded stay. Without its marker a checkpoint is ignored.
        """
        there = self._folder(path.name)
        entries = files.read_manifest(lambda name: (path / name).read_bytes())
        if there.exists(files.MARKER):
            there.delete(files.MARKER)
        for name in files.FILES:
            _put(there, path / name, entries[name])
        for name in (files.MANIFEST, files.MARKER):
            data = (path / name).read_bytes()
            _put(there, path / name, Entry(len(data), hashlib.sha256(data).hexdigest()))

    def delete(self, name: str) -> None:
        """Remove a checkpoint, the marker first; files that do not belong to a checkpoint stay."""
        there = self._folder(name)
        for file in reversed(files.IN_ORDER):
            there.delete(file)
        with suppress(OSError), explained(there.place):
            fs, path = fsspec.url_to_fs(there.place)
            for file in fs.ls(path, detail=False):  # an interrupted upload's temporary files
                if Path(file).name.startswith(tuple(f".{known}." for known in files.IN_ORDER)):
                    fs.rm_file(file)
            fs.rmdir(path)

    def fetch_newest(self, folder: Path, than: int) -> str | None:
        """Fetch the newest valid checkpoint of a step after `than` into `folder`; returns its name."""
        for name in self.names():
            if files.step_of(name) <= than:
                break
            try:
                self.fetch(name, folder)
            except Damaged as damage:
                say(f"checkpoint {self.url}/{name} is damaged ({damage}); trying the one before it")
            else:
                say(f"fetched checkpoint {self.url}/{name}")
                return name
        return None

    def fetch(self, name: str, folder: Path) -> None:
        """Fetch one checkpoint into `folder`, whole or not at all.

        Raises:
            Damaged: The checkpoint is incomplete, or differs from its manifest.
        """
        there, temporary = self._folder(name), folder / f".{name}.tmp"
        files.read_manifest(there.read)  # before anything large is asked for
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / name).mkdir(parents=True)
        try:
            for file in files.IN_ORDER:
                _download(there, file, temporary / name / file)
            files.check_checkpoint(temporary / name)
            os.rename(temporary / name, folder / name)
            sync(folder)
        except OSError as error:
            raise UserError(explain(error)) from error
        finally:
            shutil.rmtree(temporary)

    def _folder(self, name: str) -> Folder:
        return open_folder(f"{self.url}/{name}")


def _put(there: Folder, path: Path, entry: Entry) -> None:
    """Upload a file, and compare what is read back: a store's own checksum covers what arrived, not what is kept."""
    if _entry(there, path.name) == entry:
        return
    there.put(path, path.name)
    if _entry(there, path.name) != entry:
        raise UserError(f"{there.place}/{path.name} is not what was uploaded")


def _entry(there: Folder, name: str) -> Entry | None:
    digest, size = hashlib.sha256(), 0
    try:
        with there.stream(name) as stream:
            for block in _blocks(stream, there.place):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        return None
    return Entry(size, digest.hexdigest())


def _download(there: Folder, name: str, path: Path) -> None:
    try:
        with there.stream(name) as stream, whole_file(path) as file:
            file.writelines(_blocks(stream, there.place))
    except FileNotFoundError as error:
        raise Damaged(f"{name} is missing") from error


def _blocks(stream: BinaryIO, place: str) -> Iterator[bytes]:
    while True:
        with explained(place):
            block = stream.read(BLOCK_BYTES)
        if not block:
            return
        yield block


class Uploader:
    """Uploads a run's checkpoints to a URL, newest first, from a thread that no step waits for.

    There is no queue that could grow: the thread compares both sides, so that a checkpoint that was replaced meanwhile
    is never sent, and one that an earlier process left half sent is completed.
    """

    def __init__(self, remote: Remote, folder: Path, retention: Retention):
        """Upload the checkpoints in `folder`; `retention` holds for both sides."""
        self.remote, self.folder, self.retention = remote, folder, retention
        self._lock = threading.Lock()
        self._busy: frozenset[str] = frozenset()
        self._synced: set[tuple[str, bytes]] = set()
        self._changed = threading.Condition()
        self._asked = self._answered = 0
        self._given_up = threading.Event()
        # A daemon thread, so that a store that does not answer cannot keep a finished run from ending.
        self._thread = threading.Thread(target=self._loop, name="checkpoint-sync", daemon=True)

    def start(self, new: bool) -> None:
        """Start the thread, first with what an earlier process left undone.

        Args:
            new: Whether this is a new run; a wrong URL ends it at once.

        Raises:
            UserError: A new run cannot write to the URL.
        """
        if new:
            self.remote.check_writable(self.folder)
        self._thread.start()
        self.notify()

    def notify(self) -> None:
        """Tell the thread of a new checkpoint; returns at once."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    @contextmanager
    def holding(self) -> Iterator[frozenset[str]]:
        """Let no upload begin in the block; yields the name of the checkpoint that is being uploaded."""
        with self._lock:
            yield self._busy

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is left to do, for at most `seconds`; returns whether that was reached."""
        with self._changed:
            return self._changed.wait_for(lambda: self._answered == self._asked, seconds)

    def close(self, wait_s: float) -> None:
        """Wait for the uploads for at most `wait_s` seconds, then report what is missing."""
        done = self.wait(wait_s)
        self._given_up.set()
        missing = [path.name for path, marker in self._local() if (path.name, marker) not in self._synced]
        if missing:
            why = "" if done else f" after {wait_s:g} s"
            say(f"not in {self.remote.url}{why}: {', '.join(missing)}; the same command resumes the upload")

    def _loop(self) -> None:
        with suppress(OSError):  # on Linux a thread has its own priority: training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        while not self._given_up.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._answered != self._asked)
                asked = self._asked
            try:
                self._settle()
            except (UserError, Damaged, OSError) as problem:
                say(f"the upload of checkpoints waits for the next one: {problem}")
            with self._changed:
                self._answered = asked
                self._changed.notify_all()

    def _settle(self) -> None:
        """Upload what is missing, then remove what need not stay."""
        while (found := self._next()) is not None:
            path, marker = found
            self._retried(partial(self._bring, path, marker))
            self._synced.add((path.name, marker))
        self._retried(self._tidy)

    def _next(self) -> tuple[Path, bytes] | None:
        """The newest checkpoint that is not known to be at the URL; it is kept here until the next call."""
        with self._lock:
            missing = [(path, marker) for path, marker in self._local() if (path.name, marker) not in self._synced]
            self._busy = frozenset({missing[0][0].name} if missing else ())
            return missing[0] if missing else None

    def _local(self) -> list[tuple[Path, bytes]]:
        """Checkpoints on this machine with their markers, newest first."""
        paths = [self.folder / name for name in files.newest_first(path.name for path in self.folder.iterdir())]
        return [(path, (path / files.MARKER).read_bytes()) for path in paths]

    def _bring(self, path: Path, marker: bytes) -> None:
        if self.remote.marker(path.name) != marker:
            self.remote.upload(path)

    def _tidy(self) -> None:
        """Remove old checkpoints at the URL, and write what `last` and `best` point to.

        Checkpoints of later steps than this run's are not its own and stay.
        """
        with self._lock:
            here = [path.name for path, _ in self._local()]
        if not here:
            return
        there = [name for name in self.remote.names() if name <= here[0]]
        whole = [name for name in there if self.remote.marker(name) is not None]
        kept = self.retention.kept({*whole, *here})
        pointers = self.folder / f".{files.POINTERS}.remote"
        write_json(pointers, self.retention.pointers(whole))
        self.remote.root.put(pointers, files.POINTERS)
        pointers.unlink()
        for name in there:
            if name not in kept or name not in whole:
                self.remote.delete(name)

    def _retried(self, action: Callable[[], None]) -> None:
        """Retry with growing pauses, and stop once the run has ended."""
        retrying = Retrying(
            stop=stop_after_attempt(ATTEMPTS) | stop_when_event_set(self._given_up),
            wait=wait_exponential_jitter(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            sleep=sleep_using_event(self._given_up),
            reraise=True,
        )
        retrying(action)
