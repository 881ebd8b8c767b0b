"""`./launch.sh slurm predict` on a SLURM that runs: two nodes, and the bytes of one process whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import JOB_TIMEOUT_S, Cluster, wait_until
from tests.slurm.test_training import said
from tests.small_run import make_backbone, make_model, noisy_photo
from tests.warm import python

NODES = ("--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "1", "--time", "10")
THREAD = {"OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, and photos that keep two processes busy for a while."""
    folder = tmp_path_factory.mktemp("answering")
    make_model(make_backbone(folder / "backbone")).save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    for number in range(40):
        (folder / "photos" / f"{number}.jpg").write_bytes(noisy_photo(number))
        for copy in range(1, 40):
            os.link(folder / "photos" / f"{number}.jpg", folder / "photos" / f"{number}-{copy}.jpg")
    return folder


def predict(place: Path, environment: dict[str, str], *words: str) -> str:
    """Give the command; returns its last line."""
    flags = ["--model", "model", "--input", "photos", "--batch_size", "2", "--workers", "0"]
    done = subprocess.run([python(), "-m", "pipeline", *words, *flags], cwd=place, env={**environment, **THREAD},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_prediction_on_two_nodes_that_is_asked_to_stop_queues_again_and_ends_with_the_bytes_of_one_process(
    cluster: Cluster, place
):
    job = json.loads(Path(predict(place, cluster.environment, "slurm", "predict", "--output", "two.csv", *NODES))
                     .read_text())["jobs"]["predict"]  # fmt: skip
    part = place / ".two.csv.partial" / "part-00001.jsonl"
    wait_until(lambda: part.exists() and part.stat().st_size > 0, JOB_TIMEOUT_S, lambda: said(place, "two.csv"))
    cluster.run("scancel", "--signal=USR2", "--batch", job)
    assert cluster.wait(job) == {job: "COMPLETED"}, said(place, "two.csv")
    log = said(place, "two.csv")
    assert "stopped: the answers so far are kept" in log
    assert "resuming: " in log
    assert "Traceback" not in log
    summary = json.loads((place / "two.summary.json").read_text())
    assert summary["processes"] == 2
    assert 0 < summary["resumed"] < summary["photos"] == 1600
    predict(place, dict(os.environ), "predict", "--output", "one.csv")
    assert (place / "two.csv").read_bytes() == (place / "one.csv").read_bytes()
