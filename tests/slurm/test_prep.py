"""`./launch.sh slurm prep` on a SLURM that runs: the bytes of one local run, whatever happens to a job."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from data_prep.scenes.data_set import scenes
from data_prep.shards.command import shard
from tests.data_prep.examples import content
from tests.slurm.cluster import JOB_TIMEOUT_S, Cluster, wait_until
from tests.warm import python

ROOT = Path(__file__).parents[2]
ODD = """it's "my" 50%u $HOME #1"""  # %u is the name of the user to SLURM
PARTS = 3

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with photos and, as `whole`, the shards of one local run."""
    folder = tmp_path_factory.mktemp("prep")
    scenes(folder / f"{ODD} photos", images=36, size="320x240", workers=2)
    shard(folder / f"{ODD} photos", folder / "whole", shard_mb=0.08, workers=1)
    assert len(list((folder / "whole").glob("*.tar"))) > PARTS
    return folder


def slurm_prep(cluster: Cluster, place: Path, out: str, parts: int) -> subprocess.CompletedProcess[str]:
    words = ["--source", f"{ODD} photos", "--out", out, "--shard_mb", "0.08"]
    words += ["--parts", str(parts), "--cpus-per-task", "1", "--time", "10"]
    return subprocess.run(
        [python(), "-m", "pipeline", "slurm", "prep", *words],
        cwd=place, env=cluster.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def submit(cluster: Cluster, place: Path, out: str) -> dict[str, str]:
    """Submit with relative paths; returns the numbers of the jobs."""
    done = slurm_prep(cluster, place, out, PARTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{place / f'{out}.slurm' / 'summary.json'}\n"
    return dict(json.loads(Path(done.stdout.strip()).read_text())["jobs"])


def said(place: Path, out: str) -> str:
    """All that the jobs said."""
    return "\n".join(f"== {log.name}\n{log.read_text()}" for log in sorted((place / f"{out}.slurm").glob("*.log")))


def test_three_parts_on_a_cluster_give_the_bytes_of_one_local_run(cluster, place):
    out = f"{ODD} shards"
    jobs = submit(cluster, place, out)
    states = cluster.wait(*jobs.values())
    tasks = [f"{jobs['parts']}_{number}" for number in range(1, PARTS + 1)]
    assert states == dict.fromkeys([jobs["plan"], *tasks, jobs["merge"]], "COMPLETED"), said(place, out)
    assert content(place / out) == content(place / "whole")
    logs = {f"plan-{jobs['plan']}.log", f"merge-{jobs['merge']}.log", *(f"parts-{task}.log" for task in tasks)}
    assert {path.name for path in (place / f"{out}.slurm").glob("*.log")} == logs
    assert {path.name for path in place.iterdir() if out in path.name} == {out, f"{out}.slurm"}


def test_a_task_that_is_requeued_while_it_runs_changes_no_byte(cluster, place):
    out = "requeued"
    jobs = submit(cluster, place, out)
    task = f"{jobs['parts']}_2"
    wait_until(lambda: cluster.states(task).get(task) == "RUNNING", JOB_TIMEOUT_S, lambda: said(place, out))
    cluster.run("scontrol", "requeue", task)
    states = cluster.wait(*jobs.values())
    assert set(states.values()) == {"COMPLETED"}, said(place, out)
    assert "DUE TO JOB REQUEUE" in (place / f"{out}.slurm" / f"parts-{task}.log").read_text()
    assert content(place / out) == content(place / "whole")


def test_when_a_job_fails_none_is_left_waiting_for_it(cluster, place):
    jobs = submit(cluster, place, "failed")
    cluster.run("scancel", jobs["plan"])
    assert set(cluster.wait(*jobs.values()).values()) == {"CANCELLED"}
    assert not (place / "failed").exists()


def test_what_sbatch_refuses_is_one_sentence_and_leaves_no_job(cluster, place):
    done = slurm_prep(cluster, place, "refused", parts=5000)  # SLURM's limit is 1,000
    assert (done.returncode, done.stdout) == (2, "")
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: sbatch refused ")
    assert error.endswith("Batch job submission failed: Invalid job array specification")
    wait_until(lambda: not cluster.run("squeue", "--noheader"), JOB_TIMEOUT_S, lambda: cluster.run("squeue"))
