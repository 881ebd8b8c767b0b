"""What a checkpoint holds, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from pipeline.checkpoints import files
from pipeline.checkpoints.files import (
    AVERAGE,
    IN_ORDER,
    MANIFEST,
    MARKER,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Damaged,
    check_checkpoint,
    difference,
    read_state,
    recover,
    write_checkpoint,
)
from pipeline.checkpoints.retention import Retention
from pipeline.files import sha256_of
from tests.checkpoints.examples import STATE as VALUES
from tests.checkpoints.examples import tensors_of, write


class Bomb:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def agree(folder: Path) -> None:
    """Let manifest and marker say that all is well."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        entry.update(bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / MARKER).write_text(json.dumps({"manifest_sha256": sha256_of(folder / MANIFEST)}))


def test_a_checkpoint_is_safetensors_and_json_of_the_same_tensors(tmp_path):
    (path,) = write(tmp_path, 7)
    assert path.name == "step-00000007"
    assert sorted(file.name for file in path.iterdir()) == sorted(IN_ORDER)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    for name, tensors in tensors_of(7).items():
        found = load_file(path / name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], value) for key, value in tensors.items())
    assert read_state(path) == {"step": 7, **VALUES}
    check_checkpoint(path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_a_file_of_tensors_has_the_bytes_that_the_library_writes(tmp_path):
    tensors = {
        "b.weight": torch.randn(3, 5), "a/exp_avg": torch.randn(2, 3, 4).transpose(0, 2), "none": torch.zeros(0, 7),
        "scalar": torch.tensor(2.5), "Straße": torch.randn(1), "grown": torch.randn(4, requires_grad=True),
    }  # fmt: skip
    path = write_checkpoint(tmp_path, 1, {WEIGHTS: tensors}, VALUES) / WEIGHTS
    assert path.read_bytes() == save({name: tensor.contiguous() for name, tensor in tensors.items()})


def test_a_save_returns_once_the_files_and_the_new_name_are_on_the_disk(tmp_path, monkeypatch):
    flushed, real = [], os.fsync

    def note(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append((path, sorted(os.listdir(path)) if path.is_dir() else None))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_checkpoint(tmp_path, 1, tensors_of(1), VALUES)
    assert flushed[-2:] == [(tmp_path / ".step-00000001.tmp", sorted(IN_ORDER)), (tmp_path, ["step-00000001"])]
    assert len(flushed) == len(IN_ORDER) + 2


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, AVERAGE, STATE])
def test_a_flipped_bit_a_cut_and_a_missing_file_are_refused_by_name(tmp_path, name):
    flipped, short, missing = write(tmp_path, 1, 2, 3)
    flip(flipped / name)
    with pytest.raises(Damaged, match=rf"^{name} has another SHA-256"):
        check_checkpoint(flipped)
    cut(short / name)
    with pytest.raises(Damaged, match=rf"^{name} has \d+ of \d+ bytes"):
        check_checkpoint(short)
    (missing / name).unlink()
    with pytest.raises(Damaged, match=f"^{name} is missing"):
        check_checkpoint(missing)


@pytest.mark.parametrize("name", [MANIFEST, MARKER])
def test_the_manifest_and_the_marker_are_checked_too(tmp_path, name):
    missing, cut_off, changed = write(tmp_path, 1, 2, 3)
    (missing / name).unlink()
    with pytest.raises(Damaged, match=f"^{name} is missing"):
        check_checkpoint(missing)
    cut(cut_off / name)
    with pytest.raises(Damaged):
        check_checkpoint(cut_off)
    (changed / name).write_text('{"files": {}}')
    with pytest.raises(Damaged):
        check_checkpoint(changed)


@pytest.mark.parametrize("file", ["extra.pt", WEIGHTS, STATE])
def test_a_foreign_pickle_is_refused_by_name_and_never_opened(tmp_path, file):
    """Added or put in the place of another file, even where the manifest was made to agree."""
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    path, forged = write(tmp_path, 1, 2)
    for folder in (path, forged):
        (folder / file).write_bytes(bomb)
    agree(forged)
    for folder in (path, forged):
        with pytest.raises(Damaged, match=f"^{file} "):
            check_checkpoint(folder)
    assert not exploded.exists()
    pickle.loads(bomb)
    assert exploded.exists()


def test_a_manifest_that_leads_elsewhere_is_refused(tmp_path):
    (path,) = write(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../../other"] = manifest["files"].pop(STATE)
    (path / MANIFEST).write_text(json.dumps(manifest))
    (path / MARKER).write_text(json.dumps({"manifest_sha256": sha256_of(path / MANIFEST)}))
    with pytest.raises(Damaged, match=r"manifest\.json is not that of a checkpoint"):
        check_checkpoint(path)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path):
    (path,) = write(tmp_path, 1)
    with pytest.raises(Damaged, match=r"state\.json is of another step"):
        check_checkpoint(path.rename(tmp_path / "step-00000002"))


@pytest.mark.parametrize("at", IN_ORDER)
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, at):
    write(tmp_path, 1)
    before = load_file(tmp_path / "step-00000001" / WEIGHTS)
    real = files._write

    def fail(path, parts):
        if path.name == at:
            raise OSError(28, "No space left on device")
        return real(path, parts)

    monkeypatch.setattr(files, "_write", fail)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space"):
            write_checkpoint(tmp_path, step, tensors_of(9), VALUES)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    check_checkpoint(tmp_path / "step-00000001")
    after = load_file(tmp_path / "step-00000001" / WEIGHTS)
    assert all(torch.equal(after[name], value) for name, value in before.items())


class Killed(BaseException):
    """Passes every handler of errors, as kill -9 does."""


@pytest.mark.parametrize("error", [Killed(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("at", [1, 2])
def test_a_step_that_is_saved_again_is_never_lost_between_the_old_and_the_new(tmp_path, monkeypatch, at, error):
    """Whichever of the renames is the last one."""
    write(tmp_path, 1, 2)
    renames, real = [], os.rename

    def fail(source, target):
        renames.append(target)
        if len(renames) == at:
            raise error
        real(source, target)

    folder = tmp_path / "step-00000002"
    before = load_file(folder / WEIGHTS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(type(error)):
            write_checkpoint(tmp_path, 2, tensors_of(9), VALUES)
    assert len(renames) >= at
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    check_checkpoint(folder)
    assert all(torch.equal(load_file(folder / WEIGHTS)[name], value) for name, value in before.items())


def test_tensors_of_another_name_shape_or_type_are_told_apart(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, path)
    assert difference(path, {"a": (2, 3), "b": (4,)}) is None
    assert difference(path, {"a": (2, 3)}) == "b is only in it"
    assert difference(path, {"a": (2, 3), "b": (4,), "c": (1,)}) == "c is not in it"
    assert difference(path, {"a": (3, 2), "b": (4,)}) == "a is [2, 3] in it and [3, 2] here"
    save_file({"a": torch.zeros(2, dtype=torch.bfloat16)}, path)
    assert difference(path, {"a": (2,)}) == "a is BF16 in it and F32 here"


@pytest.mark.parametrize(
    ("latest", "every", "best", "kept"),
    [
        (1, 0, None, {9}),
        (2, 0, None, {8, 9}),
        (2, 0, 3, {3, 8, 9}),
        (2, 4, 3, {3, 4, 8, 9}),
        (1, 3, 7, {3, 6, 7, 9}),
        (1, 0, 12, {9}),
        (99, 0, None, set(range(1, 10))),
    ],
)
def test_the_latest_every_so_many_steps_and_the_best_stay(latest, every, best, kept):
    names = [f"step-{step:08d}" for step in range(1, 10)]
    assert Retention(latest, every, best).kept([*names, "names.json", "step-00000009.damaged"]) == {
        f"step-{step:08d}" for step in kept
    }
