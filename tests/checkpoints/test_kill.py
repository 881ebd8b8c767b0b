"""kill -9 at any moment of background saves: what was reported as saved is there, whole, and the run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from pipeline.checkpoints.files import check_checkpoint, name_of
from tests.checkpoints.examples import Run, names, process_group

SAVES = (1, 2, 3, 3, 4)  # the third is saved again, as by a run that was rolled back
CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # Python reports them before they happen
MOMENTS = 24


def saves(folder: Path, store: Path, kill_at: int) -> int:
    """Save in a forked process, which is killed just before its call of this number to the file system.

    Returns:
        How many calls there were; 0 if it was killed.
    """
    ends = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ends[0])
        calls = 0

        def count(event: str, args: tuple) -> None:
            nonlocal calls
            # A folder's files are removed by names that are relative to it.
            if event in CALLS and (event != "open" or str(args[0]).startswith(str(folder))):
                calls += 1
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        def log(line: dict) -> None:
            with (folder.parent / "said").open("a") as said:
                said.write(f"{json.dumps(line)}\n")

        with process_group(store), pytest.MonkeyPatch.context() as patch:
            run = Run(folder, patch)
            run.checkpoints.log = log
            sys.addaudithook(count)
            for step in SAVES:
                run.save(step, wait=False)
            run.checkpoints.wait()
        os.write(ends[1], str(calls).encode())
        os._exit(0)
    os.close(ends[1])
    with os.fdopen(ends[0]) as told:
        calls = int(told.read() or 0)
    _, status = os.waitpid(child, 0)
    assert status == (0 if calls else signal.SIGKILL)
    return calls


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> int:
    """How many calls all saves make."""
    place = tmp_path_factory.mktemp("whole")
    return saves(place / "checkpoints", place / "store", 0)


@pytest.mark.parametrize("part", range(MOMENTS))
def test_what_was_reported_as_saved_survives_a_kill_at_any_moment(tmp_path, monkeypatch, calls, part):
    """A random moment of each of equal parts of the saves."""
    moment = random.Random(part).randint(1 + part * calls // MOMENTS, (part + 1) * calls // MOMENTS)
    folder, said = tmp_path / "checkpoints", tmp_path / "said"
    assert saves(folder, tmp_path / "store", moment) == 0
    lines = said.read_text().splitlines() if said.exists() else []
    promised = max((json.loads(line)["step"] for line in lines), default=0)
    for name in names(folder):
        check_checkpoint(folder / name)
    with process_group(tmp_path / "again"):
        run = Run(folder, monkeypatch)
        found = 0 if run.state is None else run.state["step"]
        assert found >= promised
        assert found == 0 or run.holds(found)
        assert not list(folder.glob(".*"))
        run.save(9)
    assert name_of(9) in names(folder)
