"""A checkpoint on a disk or in an object store: its files, how they are written whole, and how damage is found.

A checkpoint is a folder `step-00001234`. Its files are safetensors and JSON, so reading one never runs code from it,
and they do not depend on the processes that wrote them:

    weights.safetensors      fp32 master weights by parameter name
    optimizer.safetensors    `<parameter>/exp_avg` and `<parameter>/exp_avg_sq`, with Sophia `<parameter>/hessian`
    average.safetensors      the average of the weights, by the same names
    state.json               the trainer's state
    manifest.json            bytes and SHA-256 of each of the four
    complete.json            SHA-256 of the manifest; written last: without it a checkpoint is incomplete
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from pipeline.files import sha256_of, sync, whole_file
from pipeline.parsing.typed_json import Malformed, Whole, parse_json

T = TypeVar("T")
Tensors = Mapping[str, torch.Tensor]

WEIGHTS, OPTIMIZER, AVERAGE = (f"{name}.safetensors" for name in ("weights", "optimizer", "average"))
STATE, MANIFEST, MARKER = "state.json", "manifest.json", "complete.json"
POINTERS = "names.json"  # beside the checkpoints: what `last` and `best` are; object stores have no links
FILES = (WEIGHTS, OPTIMIZER, AVERAGE, STATE)
IN_ORDER = (*FILES, MANIFEST, MARKER)
FORMAT = 1
DTYPE = "F32"  # as safetensors calls it
HEADER_ALIGNMENT = 8  # of a safetensors file, in bytes
UNFINISHED, REPLACED = "tmp", "old"  # `.step-00001234.KIND`: being written, and moved aside by a new one of that step


class Damaged(Exception):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Entry:
    """A file's entry in the manifest."""

    bytes: Whole
    sha256: str


@dataclass(frozen=True)
class _Marker:
    manifest_sha256: str


@dataclass(frozen=True)
class _Manifest:
    format: int
    files: dict[str, Entry]


@dataclass(frozen=True)
class _Best:
    step: Whole
    loss: float | None = None


@dataclass(frozen=True)
class _State:
    """What is read of the trainer's state; other keys are what the trainer likes."""

    step: Whole
    config: dict[str, dict[str, Any]] | None = None
    best: _Best | None = None
    validations_since_best: Whole = 0
    validated_step: Whole = 0
    wall_s: float = 0.0
    skips: Whole = 0
    rollbacks: Whole = 0


def name_of(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The inverse of `name_of`."""
    return int(name.removeprefix("step-"))


def newest_first(names: Iterable[str]) -> list[str]:
    """The names of checkpoints among `names`, newest first."""
    return sorted((name for name in names if re.fullmatch(r"step-\d{8}", name)), reverse=True)


def write_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensors], state: dict[str, Any]) -> Path:
    """Write a checkpoint under a hidden name, and rename it once it is whole and on the disk.

    No second copy of the tensors is made, and the interpreter's lock is free while one is written or hashed, so a
    thread may write while others work.

    Args:
        folder: Folder of all checkpoints.
        step: Optimizer steps taken.
        tensors: File name to fp32 tensors on the CPU.
        state: JSON values.

    Raises:
        OSError: The checkpoint could not be written; nothing of it remains, and older ones are untouched.
    """
    final = folder / name_of(step)
    temporary, old = (folder / f".{final.name}.{kind}" for kind in (UNFINISHED, REPLACED))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        entries = {name: _write(temporary / name, _safetensors(values)) for name, values in tensors.items()}
        entries[STATE] = _write(temporary / STATE, [to_json({"step": step, **state})])
        manifest = {"format": FORMAT, "files": {name: asdict(entry) for name, entry in entries.items()}}
        listed = _write(temporary / MANIFEST, [to_json(manifest)])
        _write(temporary / MARKER, [to_json({"manifest_sha256": listed.sha256})])
        sync(temporary)
        if final.exists():  # of a step that a resumed run takes again
            os.rename(final, old)
        os.rename(temporary, final)
        sync(folder)
    except OSError:
        recover(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return final


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint under a hidden name, so that a kill leaves no part of it under its own; nothing is raised."""
    hidden = path.with_name(f".{path.name}.{UNFINISHED}")
    with suppress(OSError):
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def recover(folder: Path) -> None:
    """Undo what failed or killed writes and removals left: bring back what was moved aside, remove what is unfinished.

    Args:
        folder: Folder of all checkpoints, in which nothing is being written; it need not exist.
    """
    for old in folder.glob(f".step-*.{REPLACED}"):
        final = old.with_name(old.name.removeprefix(".").removesuffix(f".{REPLACED}"))
        if not final.exists():
            os.rename(old, final)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.glob(f".{POINTERS}.[0-9]*.tmp"):  # of `write_json`
        leftover.unlink()


def to_json(values: dict[str, Any]) -> bytes:
    """Indented JSON; NaN and infinities, which JSON lacks, are refused."""
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def _safetensors(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of fp32 tensors on the CPU, without a copy of them.

    The library's `save` copies all tensors twice, and its `save_file` reports a full disk without an error number.
    """
    header, end = {}, 0
    ordered = sorted(tensors.items())
    for name, tensor in ordered:
        assert tensor.dtype == torch.float32
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> Entry:
    digest, size = hashlib.sha256(), 0
    with whole_file(path) as stream:
        for part in parts:
            stream.write(part)
            digest.update(part)
            size += len(part)
    return Entry(size, digest.hexdigest())


def read_manifest(read: Callable[[str], bytes]) -> dict[str, Entry]:
    """Read the manifest: file name to entry.

    Args:
        read: Reads a file of the checkpoint by name.

    Raises:
        Damaged: The checkpoint is incomplete, or its manifest is not the one that was written.
    """
    marker, manifest = (_present(name, read) for name in (MARKER, MANIFEST))
    if _parse(MARKER, marker, _Marker).manifest_sha256 != hashlib.sha256(manifest).hexdigest():
        raise Damaged(f"{MANIFEST} has another SHA-256 than {MARKER} says")
    found = _parse(MANIFEST, manifest, _Manifest)
    if found.format != FORMAT or found.files.keys() != set(FILES):
        raise Damaged(f"{MANIFEST} is not that of a checkpoint of this version")
    return found.files


def _present(name: str, read: Callable[[str], bytes]) -> bytes:
    try:
        return read(name)
    except FileNotFoundError as error:
        raise Damaged(f"{name} is missing") from error


def _parse(name: str, data: bytes, kind: type[T]) -> T:
    try:
        return parse_json(data, kind)
    except Malformed as error:
        raise Damaged(f"{name} cannot be read: {error}") from error


def check_checkpoint(path: Path) -> None:
    """Read every byte of a checkpoint and compare it with the manifest; nothing is unpickled.

    Raises:
        Damaged: A file is missing, cut off, changed, replaced, or does not belong there.
    """
    try:
        entries = read_manifest(lambda name: (path / name).read_bytes())
        strangers = sorted({file.name for file in path.iterdir()} - set(IN_ORDER))
        if strangers:
            raise Damaged(f"{strangers[0]} does not belong to a checkpoint")
        for name, entry in entries.items():
            check_file(path / name, entry)
        if read_state(path)["step"] != step_of(path.name):
            raise Damaged(f"{STATE} is of another step")
    except OSError as error:
        raise Damaged(str(error)) from error


def check_file(path: Path, entry: Entry) -> None:
    """Compare a file with its line of the manifest.

    Raises:
        Damaged: The file differs.
    """
    if not path.is_file():
        raise Damaged(f"{path.name} is missing")
    if path.stat().st_size != entry.bytes:
        raise Damaged(f"{path.name} has {path.stat().st_size} of {entry.bytes} bytes")
    if sha256_of(path) != entry.sha256:
        raise Damaged(f"{path.name} has another SHA-256 than {MANIFEST} says")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise Damaged(f"{path.name} is no safetensors file") from error


def read_state(path: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint.

    Raises:
        Damaged: It cannot be read.
    """
    data = (path / STATE).read_bytes()
    _parse(STATE, data, _State)
    return _parse(STATE, data, dict[str, Any])


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file."""
    with safe_open(path, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def difference(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """How the tensors of a safetensors file differ from those expected, or None; reads its header only.

    Args:
        path: The file.
        shapes: Name to shape of every fp32 tensor that must be there.
    """
    with safe_open(path, framework="pt") as tensors:
        found = set(tensors.keys())
        for name in sorted(found ^ shapes.keys()):
            return f"{name} is {'only in it' if name in found else 'not in it'}"
        for name, shape in shapes.items():
            part = tensors.get_slice(name)
            if tuple(part.get_shape()) != shape:
                return f"{name} is {part.get_shape()} in it and {list(shape)} here"
            if part.get_dtype() != DTYPE:
                return f"{name} is {part.get_dtype()} in it and {DTYPE} here"
    return None
