"""Saves that training does not wait for: what is copied when, who waits for whom, and where errors come out."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from pipeline.checkpoints import checkpoints
from pipeline.checkpoints.background import HostCopy
from pipeline.checkpoints.files import WEIGHTS, write_checkpoint
from pipeline.errors import UserError
from tests.checkpoints.examples import Run, names, process_group
from tests.warm import python

PATIENCE_S = 20.0


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a run in the same folder again."""
    with process_group(tmp_path / "store"):
        yield lambda **settings: Run(tmp_path / "checkpoints", monkeypatch, **settings)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing waits for the event in the block; each write that has begun is in the list."""

    @contextmanager
    def hold():
        released, begun = threading.Event(), []

        def write(folder, step, *rest):
            begun.append(step)
            assert released.wait(PATIENCE_S)
            return write_checkpoint(folder, step, *rest)

        monkeypatch.setattr(checkpoints, "write_checkpoint", write)
        try:
            yield released, begun
        finally:
            released.set()

    return hold


def soon(action):
    """The action in a thread of its own, and time enough to end if nothing holds it."""
    future = ThreadPoolExecutor(1).submit(action)
    time.sleep(0.2)
    return future


def test_a_save_returns_before_it_is_written_and_holds_what_was_there_at_that_moment(start, folder, slow_disk):
    run = start()
    with slow_disk() as (released, _):
        run.save(1, wait=False)
        for tensors in run.held.values():
            for tensor in tensors.values():
                tensor.zero_()  # as the steps that follow do, in place
        assert names(folder) == []
        assert run.logged == []
        released.set()
        run.checkpoints.wait()
    assert start().holds(1)


def test_a_save_is_reported_once_it_is_a_checkpoint(start, folder):
    run = start()
    seen = []
    run.checkpoints.log = lambda line: seen.append((names(folder), line))
    run.save(1)
    run.save(2)
    (_, first), (there, second) = seen
    assert there == ["step-00000001", "step-00000002"]
    assert (first["kind"], first["step"], second["step"]) == ("save", 1, 2)
    assert all(0 <= line[key] < PATIENCE_S for line in (first, second) for key in ("save_s", "write_s"))
    summary = run.checkpoints.summary()
    assert summary["saves"] == 2
    assert summary["write_s"] == pytest.approx((first["write_s"] + second["write_s"]) / 2, abs=0.002)
    assert start().checkpoints.summary() == {"saves": 0}


def test_steps_in_a_write_are_timed_apart(start, slow_disk):
    run = start()
    run.checkpoints.add_step(1.0)
    with slow_disk() as (released, _):
        run.save(1, wait=False)
        for seconds in (2.0, 4.0):  # the first began with the write, the second in its middle
            run.checkpoints.add_step(seconds)
        released.set()
        run.checkpoints.wait()
    assert run.logged[0]["step_s"] == 3.0
    for seconds in (6.0, 3.0, 2.0):  # the write ended within the first
        run.checkpoints.add_step(seconds)
    summary = run.checkpoints.summary()
    assert (summary["step_s_in_writes"], summary["step_s_otherwise"]) == (4.0, 2.0)
    run.save(2)
    assert "step_s" not in run.logged[1]  # no step began and ended within that one


@pytest.mark.parametrize("what", ["save", "restore", "close"])
def test_what_follows_a_save_waits_until_it_is_written(start, folder, slow_disk, what):
    run = start()
    with slow_disk() as (released, begun):
        run.save(1, wait=False)
        after = {
            "save": lambda: run.save(2, wait=False),
            "restore": lambda: run.checkpoints.restore(run.held, run.average),
            "close": run.checkpoints.close,
        }
        future = soon(after[what])
        assert not future.done()
        assert begun == [1]
        released.set()
        future.result(PATIENCE_S)
        assert "step-00000001" in names(folder)
        run.checkpoints.wait()


def test_an_error_of_the_thread_is_raised_at_the_next_save_and_then_is_over(start, monkeypatch):
    run = start()

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "runs/x")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_checkpoint", refuse)
        run.save(1, wait=False)
        with pytest.raises(UserError, match="runs/x: permission denied"):
            run.save(2, wait=False)
    run.save(3)
    assert start().state["step"] == 3


def test_a_run_that_ends_by_another_error_still_waits_and_says_what_became_of_its_save(start, monkeypatch, capsys):
    run = start()

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "runs/x")

    monkeypatch.setattr(checkpoints, "write_checkpoint", refuse)
    run.save(1, wait=False)
    run.checkpoints.close()
    assert "the last checkpoint is not saved: runs/x: permission denied" in capsys.readouterr().err


def test_other_ranks_gather_every_tensor_and_keep_none(start, monkeypatch):
    run = start()
    gathered = []

    def one_by_one(engine):
        for name, tensor in engine[WEIGHTS].items():
            yield name, tensor
            gathered.append(name)

    monkeypatch.setattr(checkpoints, "whole_weights", one_by_one)
    run.checkpoints.rank = 1
    run.save(1)
    assert gathered == list(run.held[WEIGHTS])
    assert run.checkpoints._copy.files == {}
    assert not run.checkpoints.folder.exists()


def test_memory_of_a_copy_is_used_again_and_a_forked_process_does_not_keep_the_old_one():
    copy = HostCopy()
    copy.fill("a", [("x", torch.zeros(3, 2)), ("s", torch.tensor(1.0)), ("none", torch.zeros(0, 2))])
    held = copy.files["a"]["x"]
    filled, answer = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(filled[0], 1)
        os.write(answer[1], str(float(held.sum())).encode())
        os._exit(0)
    copy.fill("a", [("x", torch.ones(2, 3).T), ("s", torch.tensor(2.0)), ("none", torch.zeros(0, 2))])
    os.write(filled[1], b".")
    assert os.read(answer[0], 9) == b"6.0"
    os.waitpid(child, 0)
    assert copy.files["a"]["x"] is held
    assert held.is_contiguous()
    assert float(copy.files["a"]["s"]) == 2.0


MEASURED = """
import json, resource, sys, torch
from pathlib import Path
from pipeline.checkpoints.files import write_checkpoint
tensors = {"weights.safetensors": {f"w{i}": torch.ones(1 << 22) for i in range(8)}}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
write_checkpoint(Path(sys.argv[1]), 1, tensors, {})
print(json.dumps([before, peak()]))
"""


def test_writing_makes_no_copy_of_the_tensors(tmp_path):
    """128 MiB of them, in a process of its own."""
    done = subprocess.run([python(), "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert after - before < 32 << 10  # KiB
