"""In how many processes `evaluate` and `predict` run."""

from __future__ import annotations

import os
import sys

import pytest

from pipeline.launch import answering

PREDICT = ["predict", "--model", "m", "--input", "a.jpg", "b.jpg", "--output", "x.csv"]
EVALUATE = ["evaluate", "--run", "r"]


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """What is started instead of processes, or of the command in this one."""
    found: list[list[str]] = []
    monkeypatch.setattr(answering, "supervise", lambda words, *rest: found.append(["launch", *words]) or 0)
    monkeypatch.setattr(answering, "alone", lambda command, words: found.append(["alone", command, *words]) or 0)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # so that it is as before at the end, whatever is set here
        monkeypatch.delenv(name)
    return found


def machine(monkeypatch, gpus: int) -> None:
    monkeypatch.setattr("pipeline.devices.may_use_gpu", lambda: gpus > 0 and "DS_ACCELERATOR" not in os.environ)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)


@pytest.mark.parametrize("words", [PREDICT, EVALUATE])
@pytest.mark.parametrize("gpus", [2, 8])
def test_several_gpus_have_a_process_each(monkeypatch, started, words, gpus):
    machine(monkeypatch, gpus)
    assert answering.main(words) == 0
    (launch,) = started
    assert launch[:2] == ["launch", sys.executable]
    assert launch[launch.index("--num_processes") + 1] == str(gpus)
    assert launch[launch.index("--config_file") + 1].endswith("gpu.yaml")
    assert launch[launch.index("-m", 4) :] == ["-m", f"pipeline.{words[0]}", *words[1:]]


@pytest.mark.parametrize(
    ("gpus", "options"),
    [(0, []), (1, []), (4, ["--device", "cuda:1"]), (4, ["--device=cpu"]), (4, ["--cpu"]), (4, ["--num_processes=1"])],
)
def test_one_gpu_or_cpu_or_a_device_that_is_named_is_this_process_alone(monkeypatch, started, gpus, options):
    machine(monkeypatch, gpus)
    assert answering.main([*PREDICT, *options]) == 0
    (alone,) = started
    assert alone[:2] == ["alone", "predict"]
    assert alone[2:] == PREDICT[1:] + [word for word in options if word.startswith("--device") or word == "cuda:1"]
    assert (os.environ.get("DS_ACCELERATOR") == "cpu") == (options == ["--cpu"])


def test_the_number_of_processes_and_auto_may_be_said(monkeypatch, started):
    machine(monkeypatch, 4)
    answering.main([*PREDICT, "--device=auto"])
    answering.main([*PREDICT, "--num-processes", "2"])
    assert [launch[launch.index("--num_processes") + 1] for launch in started] == ["4", "2"]


@pytest.mark.parametrize("number", ["0", "-1"])
def test_no_process_is_too_few(started, capsys, number):
    assert answering.main([*PREDICT, f"--num_processes={number}"]) == 2
    assert capsys.readouterr().err == f"error: --num_processes is {number}, but must be 1 or more\n"
    assert not started


def test_processes_on_a_cpu_share_its_cores(monkeypatch, started):
    machine(monkeypatch, 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    answering.main([*EVALUATE, "--num_processes", "2"])
    assert started[0][started[0].index("--config_file") + 1].endswith("cpu_2.yaml")
    assert os.environ["OMP_NUM_THREADS"] == "4"


def test_a_gpu_that_torch_cannot_use_is_refused_before_several_processes_start(monkeypatch, started, capsys):
    machine(monkeypatch, 0)
    monkeypatch.setattr("pipeline.devices.expects_gpu", lambda: True)
    assert answering.main([*EVALUATE, "--num_processes", "2"]) == 2
    assert "this machine has a GPU that torch" in capsys.readouterr().err
    assert not started


def test_help_has_the_options_of_the_launcher_and_of_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    assert answering.main(["predict", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--num_processes" in text
    assert "--batch_size" in text
