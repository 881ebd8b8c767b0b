"""`predict` and `evaluate` in several processes, and `predict` after an end that nobody wanted: the bytes of one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_run import make_backbone, make_model, make_run, make_shards, noisy_photo, telling_labels
from tests.warm import python

ROOT = Path(__file__).parents[1]
BATCH, PHOTOS = 4, 21
THREAD = {"OMP_NUM_THREADS": "1"}  # other numbers of threads add in another order


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run, photos of which one is broken, and as `whole.csv` the answers of one process without interruption."""
    folder = tmp_path_factory.mktemp("several")
    model = make_model(make_backbone(folder / "backbone"))
    labels = {"val": telling_labels(model, "val", 30, 0), "test": telling_labels(model, "test", 61, 1)}
    make_shards(folder / "shards", {"train": [0, 1], **labels})
    make_run(folder / "run", model, folder / "shards")
    (folder / "photos").mkdir()
    for number in range(PHOTOS):
        (folder / "photos" / f"{number:02d}.jpg").write_bytes(noisy_photo(number) if number != 5 else b"no image")
    done = subprocess.run([python(), "-m", "pipeline", "predict", *words(folder / "whole.csv")], cwd=folder,
                          env={**os.environ, **THREAD}, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def words(output: Path) -> list[str]:
    flags = {"model": "run/model", "input": "photos", "output": output, "batch_size": BATCH, "workers": 0}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def faulty(place: Path, fault: str, output: Path, *program: str) -> subprocess.Popen[str]:
    """Start a prediction with a fault."""
    start = program or (sys.executable,)  # which is killed: `python()` would leave a process of its own
    environment = {**os.environ, **THREAD, "FAULT": fault, "MARKER": f"{output}.marker", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*start, str(ROOT / "tests" / "faulty_predict.py"), *words(output)],
        cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def two_faulty(place: Path, fault: str, output: Path) -> tuple[int, str]:
    """The status and the words of a prediction in two processes with a fault."""
    code = "import sys; from pipeline.launch.launcher import *; "
    code += "sys.exit(supervise([*launch_words(None, 2), *sys.argv[1:]], goes_on='after them'))"
    process = faulty(place, fault, output, python(), "-c", code)
    _, err = process.communicate(timeout=180)
    return process.returncode, err


def resumed(place: Path, output: Path, *options: str) -> dict:
    """The summary of the same prediction, given again."""
    done = subprocess.run([python(), "-m", "pipeline", "predict", *words(output), *options], cwd=place,
                          env={**os.environ, **THREAD}, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not output.with_name(f".{output.name}.partial").exists()
    return dict(json.loads(output.with_suffix(".summary.json").read_text()))


def test_a_killed_prediction_goes_on_at_a_batch_and_ends_with_the_same_bytes(place):
    output = place / "killed.csv"
    killed = faulty(place, "kill 0 3", output)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    assert resumed(place, output)["resumed"] == 3 * BATCH
    assert output.read_bytes() == (place / "whole.csv").read_bytes()


def test_a_request_to_stop_ends_in_one_line_and_keeps_the_answers(place):
    output = place / "stopped.csv"
    process = faulty(place, "wait 0 2", output)
    while not Path(f"{output}.marker").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert err.splitlines()[-1] == "stopped: the answers so far are kept; the same command goes on after them"
    assert "Traceback" not in err
    assert resumed(place, output)["resumed"] == 2 * BATCH
    assert output.read_bytes() == (place / "whole.csv").read_bytes()


@pytest.mark.dist
def test_two_processes_of_which_one_is_killed_keep_their_answers_and_three_finish_with_the_bytes_of_one(place):
    output = place / "two.csv"
    status, err = two_faulty(place, "kill 1 1", output)
    assert status == 1
    assert "failed: rank 1 on " in err
    assert "was killed by SIGKILL" in err
    assert err.splitlines()[-1].endswith("goes on after them, and with --max-restarts N it does so by itself")
    summary = resumed(place, output, "--num_processes", "3")
    assert summary["processes"] == 3
    assert summary["resumed"] >= BATCH
    assert output.read_bytes() == (place / "whole.csv").read_bytes()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fault", "status", "sentence"),
    [
        ("memory 1 0", 2, "error: CUDA out of memory. Tried to allocate 2.00 GiB; choose a smaller --batch_size"),
        ("raise 1 0", 1, "ZeroDivisionError: a bug"),
    ],
)
def test_a_process_that_fails_ends_the_others_and_gives_the_reason(place, fault, status, sentence):
    found, err = two_faulty(place, fault, place / f"{fault[0]}.csv")
    assert found == status, err
    assert sentence in err
    assert ("Traceback" in err) == (status == 1)


@pytest.mark.dist
def test_two_processes_evaluate_with_the_bytes_of_one_also_where_one_has_nothing_to_do(place):
    run = shutil.copytree(place / "run", place / "two" / "run")
    done = subprocess.run(
        [python(), "-m", "pipeline", "evaluate", "--run", str(run), "--num-processes=2", "--batch_size", "30"],
        cwd=place, env={**os.environ, **THREAD}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run / 'summary.json'}\n"
    done = subprocess.run(
        [python(), "-m", "pipeline", "evaluate", "--run", str(place / "run"), "--batch_size", "30"],
        cwd=place, env={**os.environ, **THREAD}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("predictions.csv", "report.html"):
        assert (run / name).read_bytes() == (place / "run" / name).read_bytes()
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (place / "run", run))
    for summary in (one, two):
        assert summary["evaluation"].pop("wall_s") > 0
        assert summary["evaluation"].pop("images_per_s") > 0
    assert one == two
