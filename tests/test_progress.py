"""Progress: plain lines in a log, a bar on a terminal, and the items unchanged."""

import io
import sys

import pytest

from pipeline import progress
from pipeline.progress import format_seconds, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (75.2, "1m15s"), (3725, "1h02m")],
)
def test_seconds_are_written_as_people_do(seconds, text):
    assert format_seconds(seconds) == text


def test_a_log_gets_lines_with_rate_and_time_left_and_one_at_the_end(capsys, monkeypatch):
    clock = iter(range(0, 1000, 8))  # eight seconds for each item
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(track([3, 4, 5], total=12, what="masks", amount=int, note=lambda: "2 rejected")) == [3, 4, 5]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("masks: 7/12, 0.4 images/s, 11s left")
    assert "2 rejected" in first
    assert last.startswith("masks: 12 images in 32s (0.4/s)")


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(track("abc", total=3, what="shards", unit="tars")) == ["a", "b", "c"]
    shown = sys.stderr.getvalue()
    assert "shards" in shown
    assert "3/3" in shown
    assert "tars in" not in shown
