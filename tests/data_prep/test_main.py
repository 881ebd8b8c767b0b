"""`python -m data_prep`: exit statuses and what stands on stdout."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_prep.examples import city_rows, jpeg, write_folder, write_table

ROOT = Path(__file__).parents[2]


def data_prep(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["data_prep", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("data_prep", run_name="__main__")
    assert isinstance(end.value.code, int)
    return end.value.code


def test_shard_and_verify_end_with_the_path_of_their_summary(monkeypatch, tmp_path, capsys):
    source, out = write_folder(tmp_path / "in", city_rows(1, 3)), tmp_path / "out"
    assert data_prep(monkeypatch, "shard", "--source", source, "--out", out, "--workers", 1) == 0
    assert capsys.readouterr().out == f"{(out / 'summary.json').resolve()}\n"
    assert data_prep(monkeypatch, "verify", "--shards", out, "--workers", 1) == 0
    assert capsys.readouterr().out == f"{(out / 'verify' / 'summary.json').resolve()}\n"
    (out / "train-00000.tar").unlink()
    assert data_prep(monkeypatch, "verify", "--shards", out, "--workers", 1) == 3


def nothing(folder: Path) -> None:
    pass


def empty(folder: Path) -> None:
    folder.mkdir()


def absent_pictures(folder: Path) -> None:
    folder.mkdir()
    write_table(folder / "metadata.csv", [{"file_name": "a.jpg"}, {"file_name": "b.jpg"}])


def maybe(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(0))
    write_table(folder / "metadata.csv", [{"file_name": "a.jpg", "label": "maybe"}])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (nothing, "is not a folder"),
        (empty, "no photos in"),
        (
            absent_pictures,
            "nothing to write: 2 of 2 inputs were rejected: 2 the photo is missing (first 'a.jpg')",
        ),
        (maybe, "no label can be read from the column 'label': label 'maybe' is not 0 or 1 (a.jpg)"),
    ],
)
def test_the_users_mistakes_are_one_sentence_and_leave_nothing(monkeypatch, tmp_path, capsys, make, sentence):
    make(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    assert data_prep(monkeypatch, "shard", "--source", tmp_path / "in", "--out", tmp_path / "out", "--workers", 1) == 2
    out, err = capsys.readouterr()
    error = err.splitlines()[-1]
    assert out == ""
    assert error.startswith("error: ")
    assert sentence in error
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_flag_is_answered_with_the_nearest_one(monkeypatch, tmp_path, capsys):
    assert data_prep(monkeypatch, "shard", "--source", tmp_path, "--out", tmp_path, "--max_reject", 1) == 2
    assert "did you mean 'max_rejects'" in capsys.readouterr().err


def test_help_does_not_wait_for_the_libraries_that_do_the_work():
    script = """if True:
        import contextlib, runpy, sys
        from data_prep.__main__ import COMMANDS
        for name in COMMANDS:
            sys.argv = ["data_prep", name, "--help"]
            with contextlib.suppress(SystemExit):
                runpy.run_module("data_prep", run_name="__main__")
        print(*{"torch", "transformers", "deepspeed", "pandas", "scipy", "sklearn"}.intersection(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert sum(line.startswith("usage: ./launch.sh prep ") for line in lines) == 7
    assert lines[-1] == ""
