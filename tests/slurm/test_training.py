"""`./launch.sh slurm RECIPE` on a SLURM that runs: two nodes, and the losses of a local run whatever happens."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pipeline.config import CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig, to_yaml
from tests.slurm.cluster import JOB_TIMEOUT_S, Cluster, wait_until
from tests.small_run import make_backbone, make_shards, random_labels, small_config
from tests.warm import python

ROOT = Path(__file__).parents[2]
STEPS = 60
NODES = ("--nodes", "2", "--gpus-per-node", "0", "--time", "10")

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Shards, a recipe, and as `local` a run of two processes without SLURM."""
    folder = tmp_path_factory.mktemp("training")
    make_shards(folder / "shards", {"train": random_labels(120, 0), "val": random_labels(9, 1)})
    recipe = Config(
        train=TrainConfig(epochs=STEPS // 15, batch_size=8, micro_batch_size=2, log_every=1, wandb=False, patience=0),
        data=DataConfig(shards=str(folder / "shards"), epoch_share=1.0, workers=0),
        model=small_config(make_backbone(folder / "backbone")),
        optim=OptimConfig(lr=3e-3),
        checkpoint=CheckpointConfig(every_steps=20, every_minutes=0),
    )
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    accelerate = ROOT / "accelerate_configs" / "cpu_2.yaml"
    words = ["train", "recipe.yaml", "--config_file", str(accelerate), "--run", "local"]
    subprocess.run([python(), "-m", "pipeline", *words], cwd=folder, capture_output=True, check=True)
    return folder


def submit(cluster: Cluster, place: Path, run: str, *words: str) -> str:
    """Returns the number of the job."""
    done = subprocess.run(
        [python(), "-m", "pipeline", "slurm", "recipe.yaml", "--run", run, *NODES, *words],
        cwd=place, env=cluster.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(json.loads(Path(done.stdout.strip()).read_text())["jobs"]["train"])


def said(place: Path, run: str) -> str:
    """All that a job and its nodes said."""
    return "\n".join(f"== {log.name}\n{log.read_text()}" for log in sorted((place / f"{run}.slurm").rglob("*.log")))


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] in ("train", "val")]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def test_a_job_on_two_nodes_that_is_asked_to_stop_saves_queues_again_and_ends_with_the_losses_of_a_local_run(
    cluster, place
):
    run = "stopped"
    job = submit(cluster, place, run)
    wait_until(lambda: "step 2/" in said(place, run), JOB_TIMEOUT_S, lambda: said(place, run))
    cluster.run("scancel", "--signal=USR2", "--batch", job)
    assert cluster.wait(job) == {job: "COMPLETED"}, said(place, run)
    log = said(place, run)
    assert "stopped: saved at step" in log
    assert "resuming at step" in log
    assert "Traceback" not in log
    assert losses(place / run) == losses(place / "local")
    folder = place / f"{run}.slurm"
    logs = {str(path.relative_to(folder)) for path in folder.rglob("*.log")}
    assert logs == {f"train-{job}.log", f"train-{job}-node0.log", f"train-{job}-node1.log", "ranks/rank-00001.log"}
