"""The demo's steps, and what becomes of signals and failures between and in them."""

import itertools
import os
import shlex
import signal
import subprocess
import sys

import pytest

from pipeline.errors import Stopped
from pipeline.launch import demo
from pipeline.launch.demo import SIGNALS, Steps, steps_of


@pytest.fixture(autouse=True)
def handlers():
    """Put the signals' handlers back."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def child(monkeypatch):
    """Let a step run a Python script, which gets the step's words; returns how to set it."""
    usual = subprocess.Popen

    def run(script):
        def start(command, **options):
            return usual([sys.executable, "-c", script, *command[4:]], **options)

        monkeypatch.setattr(demo.subprocess, "Popen", start)

    return run


def test_a_step_is_printed_as_something_that_anybody_may_type(child, capsys, tmp_path):
    child("")
    words = ["predict", "--input", "scenes/*0.jpg"]
    Steps("demo").run("prediction", words)
    line = capsys.readouterr().err.strip()
    assert line == "== prediction: ./launch.sh predict --input 'scenes/*0.jpg'"
    assert shlex.split(line.partition("./launch.sh ")[2]) == words


@pytest.mark.parametrize(
    ("script", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_step_that_fails_ends_the_demo_with_its_status(child, script, status):
    child(script)
    with pytest.raises(SystemExit) as ended:
        Steps("demo").run("audit", ["prep", "audit"])
    assert ended.value.code == status


def test_a_signal_between_two_steps_counts(child):
    child("raise SystemExit('the second step started')")
    steps = Steps("./launch.sh demo")
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match=r"\./launch\.sh demo resumes here"):
        steps.run("audit", ["prep", "audit"])
    assert steps.process is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_handed_on_to_the_step(child, tmp_path, number):
    """A step in a group of its own, as a terminal's Ctrl-C reaches this process only; here the step asks for it."""
    child(f"""if True:
        import os, signal, sys, time
        assert os.getpgid(0) == os.getpid()
        def got(number, frame):
            open({str(tmp_path / "got")!r}, "w").write(str(number))
            sys.exit(75)
        signal.signal({int(number)}, got)
        os.kill(os.getppid(), {int(number)})
        time.sleep(60)
    """)
    with pytest.raises(Stopped):
        Steps("demo").run("audit", ["prep", "audit"])
    assert (tmp_path / "got").read_text() == str(int(number))


def test_a_signal_that_was_ignored_stays_so(child):
    """As nohup wants it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    steps = Steps("demo")
    os.kill(os.getpid(), signal.SIGHUP)
    child("")
    steps.run("audit", ["prep", "audit"])
    assert steps.asked is None


def test_the_steps_stay_in_the_run_folder(tmp_path):
    for quick in (False, True):
        for _, words in steps_of(tmp_path, quick):
            assert {"--out", "--run", "--shards", "--output"} & set(words)
            for flag, value in itertools.pairwise(words):
                if flag in ("--out", "--run", "--shards", "--output", "--source", "--model", "--data.features"):
                    assert value.startswith(str(tmp_path))
