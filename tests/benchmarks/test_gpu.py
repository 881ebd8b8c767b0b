"""The GPU's benchmarks, rehearsed on a CPU: every part writes its numbers, and none can end a call."""

import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.gpu import CALLS, extraction, gpu, parts
from pipeline.devices import CPU_ONLY
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]
HERE = "tests.benchmarks.test_gpu"
NOT_ON_CPUS = {"attention cudnn", "attention efficient"}
RATES = {"ms", "views_per_s", "photos_per_s", "tflops"}


def rehearse(call: int, out: Path) -> dict[str, dict[str, dict]]:
    """Part to number to line, of a whole call."""
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", str(call), out, "--dry"], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    file = Path(done.stdout.strip())
    assert file.parent == out
    assert file.name.startswith("dry-cpu-")
    assert (out / f"gpu-{call}.log").read_text() == done.stderr
    return read(file)


def read(file: Path) -> dict[str, dict[str, dict]]:
    """Part to number to line; the first line, about the machine, is left out."""
    about, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert about["dry"]
    assert about["machine"]["gpus"] == []
    assert "no figure here says anything about a GPU" in about["note"]
    assert all(line["dry"] for line in lines)
    found: dict[str, dict[str, dict]] = {}
    for line in lines:
        found.setdefault(line["part"], {})[line["what"]] = line
    return found


def test_the_first_call_runs_every_path_and_measures_extraction(tmp_path):
    found = rehearse(1, tmp_path)
    assert list(found) == ["smoke", "extraction"]
    smoke, extracted = found["smoke"], found["extraction"]
    failed = {what for lines in found.values() for what, line in lines.items() if "failed" in line}
    assert failed <= NOT_ON_CPUS
    assert {f"head {head}, cached" for head in ("roadwork", "single_view", "mean_pool", "attention_mil")} <= set(smoke)
    assert {f"pruning {mode}" for mode in ("scored", "dynamic", "off", "random", "fixed", "oracle")} <= set(smoke)
    assert smoke["pruning off"]["kept_views"] == [12] * 4
    assert all(1 < kept < 8 for kept in smoke["pruning dynamic"]["kept_views"])  # it stops early, but not at once
    assert smoke["beside the CPU"]["logits_fp32"] == 0  # both sides are the CPU
    assert 0 < smoke["beside the CPU"]["logits_bf16"] < 0.1
    assert smoke["second derivatives beside the CPU"]["most"] == 0
    assert {"product_96_384_tflops", "copy_tb_per_s"} <= set(extracted["ceilings"])
    assert 0 < extracted["attention flash"]["error"] < 0.01
    for what in ("eager, 24 views", "compiled by layer", "compiled by layer, from photos to tokens"):
        assert set(extracted[what]) >= RATES
    assert 0 < extracted["FP8 in the MLPs"]["cosine_distance_of_cls"] < 0.01
    assert 0 < extracted["FP8 in all products"]["cosine_distance_of_patches"] < 0.01
    assert "end" in extracted


def test_the_second_call_measures_prediction_compilation_and_training(tmp_path):
    found = rehearse(2, tmp_path)
    assert list(found) == ["prediction", "whole", "training"]
    assert [line for lines in found.values() for line in lines.values() if "failed" in line] == []
    training = found["training"]
    for run in ("AdamW, ZeRO-2", "sophia_g", "sophia_h", "baseline", "online, with a validation", "AdamW, ZeRO-3"):
        assert training[run]["images_per_s"] > 0
    assert training["the same again"]["equal"]
    assert training["resumed halfway"]["equal"]
    assert training["resumed halfway"]["from"] == "step-00000006"
    assert training["AdamW, ZeRO-2"]["step"] == 12
    assert found["prediction"]["16 photos in memory"]["photos_per_s"] > 0
    assert set(found["whole"]["compiled as a whole"]) >= RATES
    assert found["whole"]["first pass of another memory layout"]["s"] > 0


def hangs(bench: parts.Bench) -> None:
    """A part that starts a process with a session of its own and waits for ever."""
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    bench.write("a number", pid=child.pid)
    time.sleep(1000)


def dies(bench: parts.Bench) -> None:
    """A part whose process is gone at once, as after a fault in a kernel."""
    os._exit(7)


def fails(bench: parts.Bench) -> None:
    """A part with one number that fails among others."""
    bench.attempt("before", dict)
    bench.attempt("division", lambda: {"value": 1 / 0})
    bench.attempt("after", lambda: {"value": 1 / 3})


def test_what_hangs_dies_or_fails_is_written_down_and_the_rest_is_measured(tmp_path):
    names = ("hangs", "dies", "fails")
    found = read(parts.run_parts("gpu-1", {f"{HERE}:{name}": 1.0 for name in names}, tmp_path, dry=True))
    assert found["hangs"]["end"]["failed"] == "took longer than its limit of 1 s"
    child = found["hangs"]["a number"]["pid"]
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert found["dies"]["end"]["failed"] == "its process ended with status 7"
    assert found["fails"]["division"]["failed"] == "ZeroDivisionError: division by zero"
    assert found["fails"]["after"]["value"] == 0.3333
    assert "failed" not in found["fails"]["end"]


def test_a_call_has_a_limit_that_its_last_part_cannot_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CALL_LIMIT_S", 1.0)
    found = read(parts.run_parts("gpu-1", {f"{HERE}:hangs": 400.0}, tmp_path, dry=True))
    assert found["hangs"]["end"]["failed"].endswith(("limit of 1 s", "limit of 0 s"))
    assert all(list(limits.values())[-1] > 300 for limits in CALLS.values())


def where(bench: parts.Bench) -> None:
    """A part that tells its process from the one that started it."""
    bench.write("where", started=bench.start, backbone=bench.backbone_config.hidden_size)


def test_on_a_gpu_a_part_has_a_fresh_process_and_the_real_sizes(tmp_path, monkeypatch):
    for name, value in CPU_ONLY.items():
        monkeypatch.setenv(name, value)
    file = parts.run_parts("gpu-1", {f"{HERE}:where": 60.0}, tmp_path, dry=False)
    about, line, end = [json.loads(text) for text in file.read_text().splitlines()]
    assert not about["dry"]
    assert "note" not in about
    assert line["backbone"] == 1280
    assert "dry" not in line
    assert "failed" not in end


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.devices.uses_gpu", lambda: False)
    monkeypatch.setattr("pipeline.devices.refuse_idle_gpu", lambda: None)
    with pytest.raises(UserError, match="there is no GPU here"):
        gpu(1, tmp_path)
    assert not list(tmp_path.iterdir())


def test_views_lie_in_memory_as_those_of_photos_do(tmp_path):
    bench = parts.Bench("extraction", tmp_path / "x.jsonl", tmp_path, dry=True)
    for views in (extraction.random_views(bench, 3), extraction.pinned_rows(bench)[0]["views"]):
        assert views.is_contiguous(memory_format=torch.channels_last)


def test_the_first_run_of_what_is_timed_is_left_out(tmp_path):
    bench, runs = parts.Bench("extraction", tmp_path / "x.jsonl", tmp_path, dry=True), []

    def work() -> None:
        runs.append(None)
        time.sleep(0.2 if len(runs) == 1 else 0.001)

    assert bench.seconds(work) < 0.1
    assert len(runs) == 1 + bench.sizes.repeats
