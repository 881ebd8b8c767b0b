import json
import os
import sys
from pathlib import Path
from typing import Literal

import pytest

from pipeline.cli import command, commands
from pipeline.errors import AuditFailed, Stopped, UserError
from pipeline.files import write_summary


def paint(out: Path, colour: Literal["red", "blue"] = "red", max_coats: int = 2) -> Path:
    """Paint a folder.

    Args:
        out: Folder to paint.
        colour: Which paint.
        max_coats: Most coats.
    """
    print("libraries talk")
    return write_summary(out, {"colour": colour, "coats": max_coats})


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["prog", *words])
    return commands({"paint": f"{__name__}:paint"}, "prog", "Paints.")


def test_the_last_line_of_stdout_is_the_summary_and_nothing_else(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "paint", "--out", str(tmp_path), "--colour=blue", "--max-coats", "3") == 0
    out = capsys.readouterr().out
    assert out == f"{tmp_path.resolve() / 'summary.json'}\n"
    assert json.loads(Path(out.strip()).read_text()) == {"colour": "blue", "coats": 3}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pant"], "unknown command 'pant'; did you mean 'paint'?"),
        (["paint"], "arguments are required: out"),
        (["paint", "--out"], "expected one argument"),
        (["paint", "--out", "x", "--color", "red"], "did you mean 'colour'"),
        (["paint", "--out", "x", "--colour", "green"], "colour: expected"),
        (["paint", "--out", "x", "stray"], "unknown option 'stray'"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(monkeypatch, capsys, words, sentence):
    assert run(monkeypatch, *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_help_tells_commands_and_options(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    assert "paint      Paint a folder." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(monkeypatch, "paint", "--help")
    assert "Most coats." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("no"), 2),
        (AuditFailed("two shards differ", Path("s.json")), 3),
        (Stopped("later"), 75),
        (KeyboardInterrupt(), 75),
        (FloatingPointError("the loss is nan"), 1),
    ],
)
def test_each_end_has_its_status_and_leaves_it_for_the_launcher(monkeypatch, tmp_path, error, status):
    def fail() -> Path:
        """Fail."""
        raise error

    monkeypatch.setenv("ROADWORK_STATE_FILE", str(tmp_path / "state.json"))
    monkeypatch.setattr(sys, "argv", ["prog"])
    assert command(fail) == status
    assert json.loads((tmp_path / "state.json").read_text())["exit_status"] == status


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "error: no space left on device; what is done so far is kept"),
        (PermissionError(13, "Permission denied", "/closed/x"), "error: /closed/x: permission denied; fix that"),
    ],
)
def test_what_the_system_refuses_for_a_reason_that_users_can_mend_is_one_sentence(monkeypatch, capsys, error, sentence):
    def fail() -> Path:
        """Fail."""
        raise error

    monkeypatch.setattr(sys, "argv", ["prog"])
    assert command(fail) == 2
    assert capsys.readouterr().err.startswith(sentence)


def test_another_error_of_the_system_is_a_bug(monkeypatch):
    def fail() -> Path:
        """Fail."""
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(OSError, match="Bad file"):
        command(fail)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail() -> Path:
        """Fail."""
        raise RuntimeError("bug")

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(RuntimeError):
        command(fail)


def test_other_ranks_leave_the_word_to_rank_zero(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert run(monkeypatch, "paint", "--out", str(tmp_path)) == 0
    assert capsys.readouterr().out == ""


def test_a_mistake_is_one_line_whatever_a_name_holds():
    assert str(UserError("no photo a\nb\r\nc\x0bd; choose another")) == "no photo a b c d; choose another"
