"""Atomic writes: every file that matters is written under a temporary name, synced and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path, mode: str = "wb", **options: Any) -> Iterator[Any]:
    """A file that gets its name only once the block has ended without an error: a reader never sees a part of it.

    Args:
        path: The file; its folder is made.
        mode: How it is opened.
        options: More arguments of `open`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open(mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically; see `whole_file`."""
    with whole_file(path) as stream:
        stream.write(data)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new folder, then replace `path` by it.

    The old folder stays until the new one is complete on the disk.
    """
    fresh, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    for file in fresh.rglob("*"):
        sync(file)
    if path.exists():
        os.rename(path, old)
    os.rename(fresh, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def render(template: Path, **values: Any) -> str:
    """Fill in a Jinja text template; a missing value is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template.read_text()).render(values)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON; NaN and infinities, which JSON lacks, are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_summary(folder: Path, values: dict[str, Any]) -> Path:
    """Write `folder/summary.json` and return its absolute path, the last line that a command prints."""
    path = (folder / "summary.json").resolve()
    write_json(path, values)
    return path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
