"""One owner for a folder at a time: a lock on a file in it, which also holds between machines that share the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError
from pipeline.progress import say

LOCK_NAME = ".lock"
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL})


@contextmanager
def locked(folder: Path, what: str, way_out: str, shared: bool = False) -> Iterator[bool]:
    """Make a folder, and keep others from working in it at the same time.

    The lock is the kernel's (flock) on a regular file, opened for writing, which NFS and Lustre take to their server; a
    lock on a folder would hold on one machine only. It ends with its process, however that ends, and a process that is
    forked from it does not keep it. The file names host and process; it, and the folder if nothing else is in it, are
    removed at the end.

    Args:
        folder: The folder.
        what: What another process would be doing in it, such as `training runs/first`.
        way_out: What the user does about another process, such as `choose another --run`.
        shared: Others that ask for a shared lock may hold it too.

    Yields:
        Whether the lock is held; False where the disk takes none, which is said in a line.

    Raises:
        UserError: Another process holds the lock; the message names its host and number.
    """
    path = folder / LOCK_NAME
    descriptor = _open(path)
    try:
        held = _take(path, descriptor, what, way_out, shared)
        while held and not _is_at(path, descriptor):  # its owner removed it between the two calls
            os.close(descriptor)
            descriptor = _open(path)
            held = _take(path, descriptor, what, way_out, shared)
        owner = _Owner(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
    except BaseException:
        _close(descriptor, folder)
        raise
    try:
        yield held
    finally:
        if owner.is_here:
            owner.is_here = False
            if not shared:
                path.unlink(missing_ok=True)
            _close(descriptor, folder)


class _Owner:
    """Closes the lock's descriptor in processes that Python forks: they would hold it for longer than its owner lives.

    They leave the file alone, too, however they end.
    """

    def __init__(self, descriptor: int):
        self.descriptor, self.is_here = descriptor, True
        os.register_at_fork(after_in_child=self._leave)

    def _leave(self) -> None:
        if self.is_here:
            self.is_here = False
            os.close(self.descriptor)


def _close(descriptor: int, folder: Path) -> None:
    os.close(descriptor)
    # Only now: over NFS a file that is open stays in its folder under another name.
    with contextlib.suppress(OSError):  # something is in it, or it was renamed or removed
        folder.rmdir()


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def _take(path: Path, descriptor: int, what: str, way_out: str, shared: bool) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        host, _, process = os.pread(descriptor, 256, 0).decode(errors="replace").strip().partition(" ")
        owner = f" (process {process} on {host})" if process else ""
        raise UserError(f"another process{owner} is {what} at this moment; wait for it, or {way_out}") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(f"the disk of {path.parent} takes no locks ({error.strerror}): see to it that nothing else is {what}")
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
