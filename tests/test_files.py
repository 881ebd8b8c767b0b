import os

import pytest

from pipeline.files import replace_folder, write_bytes, write_json


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_nan_is_refused_since_json_has_none(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not os.listdir(tmp_path)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    replace_folder(path, lambda folder: (folder / "w").write_text("1"))
    with pytest.raises(RuntimeError):
        replace_folder(path, _fail_half_way)
    assert (path / "w").read_text() == "1"
    replace_folder(path, lambda folder: (folder / "v").write_text("3"))
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "v"]


def _fail_half_way(folder):
    (folder / "w").write_text("2")
    raise RuntimeError
