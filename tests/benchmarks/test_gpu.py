"""The GPU's benchmarks, rehearsed on a CPU: every part writes its numbers, and none can end a call."""

import dataclasses
import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.gpu import CALLS, extraction, gpu, parts
from benchmarks.gpu.commands import finished
from benchmarks.gpu.rows import ROWS
from pipeline.devices import CPU_ONLY
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]
LIMIT_S = 10.0
HERE = "tests.benchmarks.test_gpu"
NOT_ON_CPUS = {"attention cudnn", "attention efficient"}
GPU_KEYS = {"mfu", "gpu_peak_gib"}


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


def missing(call: int, found: dict[str, dict[str, dict]]) -> set[tuple[str, str]]:
    """Part and what of the rows of docs/results.md that a call did not write, or has no row for."""
    written = {(part, what) for part, lines in found.items() for what in lines if what != "end"}
    return written ^ {(part, what) for part, rows in ROWS[call].items() for what in rows}


def keys(call: int, found: dict[str, dict[str, dict]]) -> set[tuple[str, str]]:
    """What and key of the numbers of docs/results.md that a rehearsed call did not write; a GPU's own are left out."""
    return {
        (what, key)
        for part, rows in ROWS[call].items()
        for what, wanted in rows.items()
        for key in set(wanted) - GPU_KEYS
        if "failed" not in found[part][what] and key not in found[part][what]
    }


@pytest.mark.slow
def test_the_first_call_runs_every_path_and_measures_extraction_prediction_and_experts(tmp_path):
    found = rehearse(1, tmp_path)
    assert list(found) == ["smoke", "extraction", "prediction", "experts"]
    assert missing(1, found) == keys(1, found) == set()
    smoke, extracted = found["smoke"], found["extraction"]
    failed = {what: line["failed"] for lines in found.values() for what, line in lines.items() if "failed" in line}
    assert set(failed) <= NOT_ON_CPUS, failed
    assert smoke["pruning off"]["kept_views"] == [12] * 4
    assert all(1 < kept < 8 for kept in smoke["pruning dynamic"]["kept_views"])  # it stops early, but not at once
    assert smoke["beside the CPU"]["logits_fp32"] == 0  # both sides are the CPU
    assert 0 < smoke["beside the CPU"]["logits_bf16"] < 0.1
    assert smoke["second derivatives beside the CPU"]["most"] == 0
    assert "product_96_384_tflops" in extracted["ceilings"]
    assert 0 < extracted["attention flash"]["error"] < 0.01
    for name in ("the MLPs", "all products"):
        line = extracted[f"FP8 in {name}, compiled by layer, a pass"]
        assert 0 < line["cosine_distance_of_cls"] < 0.01
        assert 0 < line["cosine_distance_of_patches"] < 0.01
    assert found["prediction"]["`predict`, a process on each GPU"]["equal"]
    assert found["experts"]["experts in one grouped product"]["difference"] < 0.01


@pytest.mark.slow
def test_the_second_call_measures_training_and_compilation(tmp_path):
    found = rehearse(2, tmp_path)
    assert list(found) == ["training", "whole"]
    assert [line for lines in found.values() for line in lines.values() if "failed" in line] == []
    assert missing(2, found) == keys(2, found) == set()
    training = found["training"]
    for name, middle in (("AdamW, ZeRO-2", "step-00000006"), ("train.deterministic", "step-00000003")):
        assert training[f"{name}, the same again"]["equal"]
        assert training[f"{name}, resumed halfway"]["equal"]
        assert training[f"{name}, resumed halfway"]["from"] == middle
    assert training["AdamW, ZeRO-2"]["step"] == 12
    assert training["saves in the background"]["saves"] >= 2
    assert training["memory beside its estimate"]["estimate_gib"] > 0
    assert training["`evaluate`, a process on each GPU"]["photos"] == 6


def hangs(bench: parts.Bench) -> None:
    """A part that starts a process with a session of its own and waits for ever."""
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    bench.write("a number", pid=child.pid)
    time.sleep(1000)


def dies(bench: parts.Bench) -> None:
    """A part whose process is gone of a sudden, as after a fault in a kernel, while a process that it started runs."""
    bench.write("a number", pid=subprocess.Popen(["sleep", "1000"], start_new_session=True).pid)
    time.sleep(2 * parts.LOOK_EVERY_S)
    os._exit(7)


def fails(bench: parts.Bench) -> None:
    """A part with one number that fails among others."""
    bench.attempt("before", dict)
    bench.attempt("division", lambda: {"value": 1 / 0})
    bench.attempt("after", lambda: {"value": 1 / 3})


def test_what_hangs_dies_or_fails_is_written_down_and_the_rest_is_measured(tmp_path):
    names = ("hangs", "dies", "fails")
    found = read(parts.run_parts("gpu-1", {f"{HERE}:{name}": LIMIT_S for name in names}, tmp_path, dry=True))
    assert found["hangs"]["end"]["failed"] == f"took longer than its limit of {LIMIT_S:.0f} s"
    for name in ("hangs", "dies"):
        child = found[name]["a number"]["pid"]
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert found["dies"]["end"]["failed"] == "its process ended with status 7"
    assert found["fails"]["division"]["failed"] == "ZeroDivisionError: division by zero"
    assert found["fails"]["after"]["value"] == 0.3333
    assert "failed" not in found["fails"]["end"]


def test_a_command_over_its_limit_is_killed_and_its_log_is_quoted(tmp_path):
    bench = parts.Bench("training", tmp_path / "x.jsonl", tmp_path, dry=True)
    bench.sizes = dataclasses.replace(parts.DRY, run_limit_s=3.0)

    def talk(status: int) -> None:
        os.write(1, b"so far\n")
        time.sleep(0 if status else 1000)
        os._exit(status)

    with pytest.raises(TimeoutError, match=r"longer than 3 s; it said last: so far"):
        finished(bench, "slow", talk, 0)
    with pytest.raises(RuntimeError, match=r"status 5: so far"):
        finished(bench, "broken", talk, 5)
    assert (tmp_path / "slow.log").read_text() == "so far\n"


def test_a_call_has_a_limit_that_its_last_part_cannot_pass(tmp_path, monkeypatch):
    assert all(sum(limits.values()) <= parts.CALL_LIMIT_S < 8 * 60 for limits in CALLS.values())
    monkeypatch.setattr(parts, "CALL_LIMIT_S", 1.0)
    found = read(parts.run_parts("gpu-1", {f"{HERE}:hangs": 400.0}, tmp_path, dry=True))
    assert found["hangs"]["end"]["failed"].endswith(("limit of 4 s", "limit of 3 s"))


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
