"""`predict` on a disk that is full, and with a small /dev/shm: real ones, in a mount namespace of the test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import make_backbone, make_model, noisy_photo

ROOT = Path(__file__).parents[2]
DISK_BYTES = 1 << 20
PHOTOS = 120
ALONE = ["unshare", "--mount", "bash", "-euc"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, photos with long names, and the answers of a run with room for all."""
    folder = tmp_path_factory.mktemp("small")
    if subprocess.run([*ALONE, f"mount -t tmpfs tmpfs {folder}"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets us mount nothing")
    make_model(make_backbone(folder / "backbone")).save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    (folder / "disk").mkdir()
    for number in range(PHOTOS):
        (folder / "photos" / f"{number:04d}-{'x' * 160}.jpg").write_bytes(noisy_photo(number % 10))
    status, said = in_namespace(folder, predict(folder / "whole.csv"))
    assert status == 0, said
    return folder


def predict(output: Path, workers: int = 0) -> str:
    # A new Python: a server that has the libraries in memory would see another /dev/shm.
    words = f"--model model --input photos --output {output} --batch_size 4 --workers {workers}"
    return f"{sys.executable} -m pipeline.predict {words}"


def in_namespace(folder: Path, script: str) -> tuple[int, str]:
    done = subprocess.run([*ALONE, script], cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize("free_kb", [40, 92, 100])
def test_a_full_disk_is_one_sentence_and_costs_no_answer(place, free_kb):
    disk = place / "disk"
    status, said = in_namespace(
        place,
        f"""
        mount -t tmpfs -o size={DISK_BYTES} tmpfs {disk}
        head -c {DISK_BYTES - 1024 * free_kb} /dev/zero >{disk}/filler
        {predict(disk / "x.csv")} && echo "status 0" || echo "status $?"
        rm {disk}/filler
        {predict(disk / "x.csv")}
        cmp {disk}/x.csv whole.csv
    """,
    )
    assert status == 0, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == said.count("status 2"), said
    assert said.count("status 0") + said.count("status 2") == 1, said
    assert all("kept" in error or "keeps" in error for error in errors)


@pytest.mark.slow
def test_a_small_dev_shm_is_one_sentence_that_says_what_to_do(place):
    status, said = in_namespace(
        place,
        f"""
        mount -t tmpfs -o size=256k tmpfs /dev/shm
        {predict(place / "y.csv", workers=1)}
    """,
    )
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (status, "Traceback" in said) == (2, False), said
    assert "/dev/shm" in error
    assert "--shm-size" in error
    assert "--workers 0" in error
    assert in_namespace(place, f"{predict(place / 'y.csv')} && cmp y.csv whole.csv")[0] == 0
