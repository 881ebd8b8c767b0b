"""A folder of files, on this machine or at any URL that fsspec knows: `s3://`, `gs://`, `abfs://`, `sftp://`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec

from pipeline.errors import UserError
from pipeline.files import sync

# An object store shows an upload once it is complete; anything else gets a temporary name and a move.
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "r2"})
MOST_OPEN_FILES = 256  # per process and folder, far under the usual limit of 1,024


class Folder(Protocol):
    """A flat folder: names have no slashes. Names are trusted, so check those that come from a file before.

    An absent file is a `FileNotFoundError`; all other failures are a `UserError`.
    """

    place: str
    """The path or URL, as the user gave it."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""

    def size(self, name: str) -> int:
        """Size of a file in bytes."""

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Sizes of many files in bytes, asked for concurrently where that is faster; None for an absent one."""
        return [self.size(name) if self.exists(name) else None for name in names]

    def read(self, name: str) -> bytes:
        """A whole file."""

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes from `start` up to `end`; fewer where the file is shorter."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """Fill `buffer` with a file's bytes from `start` on; returns how many there were, fewer at the file's end."""
        data = self.read_range(name, start, start + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def stream(self, name: str) -> BinaryIO:
        """A file to be read from start to end. Reads raise the driver's own exceptions, see `explained`."""

    def put(self, local: Path, name: str) -> None:
        """Copy `local` to the file `name`, whole or not at all; an older file is replaced.

        On the same disk the file is hard-linked instead of copied, so it must not be written to afterwards; it may be
        deleted.
        """

    def delete(self, name: str) -> None:
        """Remove a file; an absent one is no error."""


def is_url(place: Path | str) -> bool:
    """Whether a folder is accessed through fsspec, as `file://` is too."""
    return "://" in str(place)


def open_folder(place: Path | str) -> Folder:
    """The folder at a path or URL; nothing is read yet, and it need not exist.

    Raises:
        UserError: The URL's driver is not installed, or no driver exists.
    """
    return UrlFolder(str(place)) if is_url(place) else LocalFolder(Path(place))


@contextmanager
def explained(place: str, *, may_be_absent: bool = True) -> Iterator[None]:
    """Turn a driver's exceptions into a `UserError` of one sentence, except `FileNotFoundError`.

    Args:
        place: Folder or URL in use, for the message.
        may_be_absent: False turns `FileNotFoundError` too: where a file is written, it is the bucket that is absent.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # drivers have their own exceptions, and few are OSErrors
        if may_be_absent and isinstance(error, FileNotFoundError):
            raise
        text = str(getattr(error, "strerror", None) or next(iter(error.args), "")) or repr(error)
        raise UserError(
            f"{place} cannot be used: {text.splitlines()[0]}; check its name, your rights to it and the network"
        ) from error


class LocalFolder(Folder):
    """A folder on this machine. Files stay open between reads; each process opens its own."""

    def __init__(self, path: Path):
        self.path, self.place = path, str(path)
        self._descriptors: dict[str, int] = {}

    def exists(self, name: str) -> bool:
        """See `Folder`."""
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        """See `Folder`."""
        with explained(self.place):
            return (self.path / name).stat().st_size

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        with explained(self.place):
            return (self.path / name).read_bytes()

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """See `Folder`."""
        with explained(self.place):
            return os.pread(self._descriptor(name), end - start, start)

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """See `Folder`."""
        with explained(self.place):
            return os.preadv(self._descriptor(name), [buffer], start)

    def stream(self, name: str) -> BinaryIO:
        """See `Folder`."""
        with explained(self.place):
            return (self.path / name).open("rb")

    def put(self, local: Path, name: str) -> None:
        """See `Folder`."""
        with explained(self.place):
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.path / f".{name}.{os.getpid()}.tmp"
            temporary.unlink(missing_ok=True)
            try:
                try:
                    os.link(local, temporary)
                except OSError:  # another disk, or one without hard links
                    shutil.copyfile(local, temporary)
                sync(temporary)
                os.replace(temporary, self.path / name)
            finally:
                temporary.unlink(missing_ok=True)
            sync(self.path)
        self._close(name)

    def delete(self, name: str) -> None:
        """See `Folder`."""
        with explained(self.place):
            (self.path / name).unlink(missing_ok=True)
        self._close(name)

    def _descriptor(self, name: str) -> int:
        """Descriptor of an open file; where too many are open, the least recently used one is closed."""
        descriptor = self._descriptors.pop(name, None)
        if descriptor is None:
            descriptor = os.open(self.path / name, os.O_RDONLY)
        self._descriptors[name] = descriptor
        if len(self._descriptors) > MOST_OPEN_FILES:
            self._close(next(iter(self._descriptors)))
        return descriptor

    def _close(self, name: str) -> None:
        descriptor = self._descriptors.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        for name in list(self._descriptors):
            self._close(name)

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors cannot be sent to spawned workers.
        return {**self.__dict__, "_descriptors": {}}


class UrlFolder(Folder):
    """A folder that fsspec accesses. It holds nothing open, so any process can have it; fsspec keeps the connections.

    Every call asks for the file system anew: fsspec returns the one it has, or a new one after a fork, where the old
    one's thread is gone.
    """

    def __init__(self, url: str):
        self.place = url.rstrip("/")
        self._locate("")

    def exists(self, name: str) -> bool:
        """See `Folder`."""
        with self._located(name) as (fs, path):
            return bool(fs.exists(path))

    def size(self, name: str) -> int:
        """See `Folder`."""
        with self._located(name) as (fs, path):
            return int(fs.size(path))

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """See `Folder`."""
        try:
            with self._located("") as (fs, root):
                return list(fs.sizes([f"{root}{name}" for name in names]))
        except FileNotFoundError:  # some are absent; find out which
            return super().sizes(names)

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        with self._located(name) as (fs, path):
            return bytes(fs.cat_file(path))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """See `Folder`."""
        with self._located(name) as (fs, path):
            return bytes(fs.cat_file(path, start=start, end=end))

    def stream(self, name: str) -> BinaryIO:
        """See `Folder`."""
        with self._located(name) as (fs, path):
            stream: BinaryIO = fs.open(path, "rb")
            return stream

    def put(self, local: Path, name: str) -> None:
        """See `Folder`."""
        with self._located(name, may_be_absent=False) as (fs, path):
            if OBJECT_STORES.intersection([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
                fs.put_file(str(local), path)
            else:
                _put_and_move(fs, local, path)
            written, wanted = self.size(name), local.stat().st_size
            if written != wanted:
                raise UserError(f"{self.place}/{name} has {written} of {wanted} bytes after its upload; try again")

    def delete(self, name: str) -> None:
        """See `Folder`."""
        with self._located(name) as (fs, path):
            if fs.exists(path):
                fs.rm_file(path)

    @contextmanager
    def _located(self, name: str, *, may_be_absent: bool = True) -> Iterator[tuple[Any, str]]:
        """The file system, and its path for a name; see `explained`."""
        with explained(self.place, may_be_absent=may_be_absent):
            yield self._locate(name)

    def _locate(self, name: str) -> tuple[Any, str]:
        """The file system, and its path for a name."""
        try:
            fs, root = fsspec.url_to_fs(self.place)
        except ImportError as error:  # the driver's message names the package to install
            raise UserError(f"{self.place} needs a driver that is not installed: {error}") from error
        except ValueError as error:
            raise UserError(f"{self.place} is no folder that can be opened: {error}") from error
        fs.invalidate_cache()  # other processes write here too; an old listing would hide that
        return fs, f"{root}/{name}"


def _put_and_move(fs: Any, local: Path, path: str) -> None:
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.{os.getpid()}.tmp"
    fs.makedirs(folder, exist_ok=True)
    try:
        fs.put_file(str(local), temporary)
        fs.mv(temporary, path)
    finally:
        if fs.exists(temporary):
            fs.rm_file(temporary)
