"""The demo's steps, and what becomes of signals and failures between and in them."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.__main__ import COMMANDS, module_of
from pipeline.config import parse_config
from pipeline.devices import has_bf16, pick_device
from pipeline.distributed.settings import resolve_precision
from pipeline.errors import Stopped
from pipeline.launch import answering, demo, launcher
from pipeline.launch.demo import SIGNALS, Steps, steps_of
from pipeline.launch.plan import resolve


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


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes this a machine with some GPUs, which may be hidden."""

    def become(gpus, hidden=False):
        (tmp_path / "nvidiactl").touch()
        monkeypatch.setattr("pipeline.devices.DEVICE_FILES", (str(tmp_path / "nvidiactl"),) if gpus else ())
        monkeypatch.setattr("pipeline.devices.OTHER_FILES", ())
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        if not hidden:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        seen = 0 if hidden else gpus
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: seen > 0)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})

    return become


@pytest.fixture
def started(monkeypatch):
    """The command line of each launch, or the command that this process runs alone, instead of running them."""
    found = []
    for module in (launcher, answering):
        monkeypatch.setattr(module, "supervise", lambda words, *rest, **options: found.append(words) or 0)
    monkeypatch.setattr(answering, "alone", lambda command, words: found.append([command, *words]) or 0)
    return found


def run_step(words):
    """Start a step of the demo as `python -m pipeline` does; without what computes nothing on a GPU."""
    module, rest = module_of(words)
    if module == "pipeline.launch.launcher":
        assert (launcher.prep(rest[1:]) if rest[0] == "prep" else launcher.main(rest)) == 0
    elif module == "pipeline.launch.answering":
        assert answering.main(rest) == 0
    else:
        assert module in (COMMANDS["prep"][0], COMMANDS["export"][0])


@pytest.mark.parametrize(("gpus", "hidden", "file", "processes", "precision", "device"), [
    (0, False, "cpu_2.yaml", 2, "fp32", "cpu"), (4, True, "cpu_2.yaml", 2, "fp32", "cpu"),
    (1, False, "gpu.yaml", 1, "bf16", "cuda"), (4, False, "gpu.yaml", 4, "bf16", "cuda"),
])  # fmt: skip
def test_the_steps_choose_what_suits_the_machine(
    machine, started, tmp_path, gpus, hidden, file, processes, precision, device
):
    machine(gpus, hidden)
    launched, alone = {}, {}
    for title, words in steps_of(tmp_path / "run", quick=True):
        assert "--device" not in words
        started.clear()
        run_step(words)
        assert len(started) <= 1
        for command in started:
            (launched if command[0] == sys.executable else alone)[title] = command
    answers = {"baseline's score", "evaluation", "prediction"}
    several = device == "cuda" and processes > 1
    assert launched.keys() == {"features", "baseline", "model"} | (answers if several else set())
    assert alone.keys() == (set() if several else answers)
    assert pick_device("auto").type == device  # of features and answers, which are told none
    for title, command in launched.items():
        accelerate = Path(command[command.index("--config_file") + 1])
        number = int(command[command.index("--num_processes") + 1]) if device == "cuda" else None
        assert (accelerate.name, number) == (file, processes if device == "cuda" else None)
        if title in ("baseline", "model"):
            config, _ = parse_config(command[command.index("--config") :], "train")
            plan = resolve(config, accelerate, None, number, resolve_precision(config.train.precision, has_bf16()))
            assert (plan.world_size, plan.engine.precision, config.train.epochs) == (processes, precision, 1)
