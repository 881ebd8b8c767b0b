"""Files of photos: which names may be photos, and how their bytes are read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipeline.data.photo_parts import BadPhoto

MAX_FILE_BYTES = 256 << 20  # 100 megapixels are less, even as PNG
READ_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
# Not read, but photos all the same: the user is told about them.
UNREAD_SUFFIXES = (
    ".heic", ".heif", ".hif", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".jxl", ".jp2", ".j2k", ".jpx",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw",
)  # fmt: skip
PHOTO_SUFFIXES = frozenset(READ_SUFFIXES + UNREAD_SUFFIXES)
KINDS = (
    (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)  # fmt: skip


def read_file(path: str | os.PathLike[str], offset: int = 0, size: int | None = None) -> bytes:
    """Read a file, or a part of one; links are followed.

    Args:
        path: The file.
        offset: First byte.
        size: Number of bytes; None for all.

    Raises:
        OSError: The system cannot read it.
        BadPhoto: It is no file, but a FIFO, a socket, a device or a folder, which is not opened; or it has more than
            256 MB.
    """
    _check_kind(os.stat(path).st_mode)
    # Without waiting for a writer, should a FIFO have come into its place.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        status = os.fstat(stream.fileno())
        _check_kind(status.st_mode)
        if size is None:
            size = max(0, status.st_size - offset)
            rest = MAX_FILE_BYTES + 1 - size  # the file may grow meanwhile, and files of the kernel say 0
        else:
            rest = 0
        if size > MAX_FILE_BYTES:
            raise BadPhoto(f"the file is larger than {MAX_FILE_BYTES >> 20} MB")
        stream.seek(offset)
        data = stream.read(size)
        if rest and len(data) == size and (more := stream.read(1)):
            data += more + stream.read(rest - 1)
    if len(data) > MAX_FILE_BYTES:
        raise BadPhoto(f"the file is larger than {MAX_FILE_BYTES >> 20} MB")
    return data


def is_photo_name(name: str) -> bool:
    """Whether a file is a photo by its name, be it one that is read or one that the user has to convert."""
    return Path(name).suffix.lower() in PHOTO_SUFFIXES


def _check_kind(mode: int) -> None:
    kind = next((name for is_kind, name in KINDS if is_kind(mode)), None)
    if kind is not None:
        raise BadPhoto(f"{kind} and not a file")
