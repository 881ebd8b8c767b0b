"""Signals and statuses through the door that people use: launch.sh itself."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from pipeline.config import CheckpointConfig, Config, DataConfig, TrainConfig, to_yaml
from tests.small_run import make_backbone, make_shards, random_labels, small_config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.dist


def start(folder: Path, *words: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """launch.sh in a session of its own, as a container or a batch system starts it; `before` stands before it."""
    return subprocess.Popen(
        [*before, str(ROOT / "launch.sh"), *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, env={**os.environ, "WANDB_MODE": "disabled"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe that would train for hours."""
    folder = tmp_path_factory.mktemp("door")
    make_shards(folder / "shards", {"train": random_labels(24, 0)})
    config = Config(
        train=TrainConfig(epochs=10_000, batch_size=8, micro_batch_size=8, log_every=1, wandb=False),
        data=DataConfig(shards=str(folder / "shards"), epoch_share=1.0, workers=0),
        model=small_config(make_backbone(folder / "backbone")),
        checkpoint=CheckpointConfig(every_minutes=0),
    )
    (folder / "recipe.yaml").write_text(to_yaml(config))
    return folder / "recipe.yaml"


def wait_for_steps(run: Path, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"
    end = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.2)


ONE = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2]


@pytest.mark.parametrize(("number", "whom"), [
    *[(number, "launch.sh") for number in ONE], *[(number, "its group") for number in ONE],
    *[(number, "the first process of a container") for number in (signal.SIGTERM, signal.SIGINT)],
])  # fmt: skip
def test_a_signal_saves_and_gives_75(recipe, tmp_path, number, whom):
    one = str(ROOT / "accelerate_configs" / "cpu_1.yaml")
    words = ["train", str(recipe), "--config_file", one, "--run", str(tmp_path / "run"), "--data.workers", "1"]
    namespace = ["unshare", "--fork", "--pid", "--mount-proc"] if "container" in whom else []
    if namespace and subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine gives us no namespace of processes")
    process = start(tmp_path, *words, before=namespace)
    wait_for_steps(tmp_path / "run", process)
    if whom == "its group":
        os.killpg(process.pid, number)
    else:
        (psutil.Process(process.pid).children()[0] if namespace else process).send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped: saved at step " in err
    assert "Traceback" not in err
    names = json.loads((tmp_path / "run" / "checkpoints" / "names.json").read_text())
    assert (tmp_path / "run" / "checkpoints" / names["last"] / "complete.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_demo_ends_the_step_at_hand_and_gives_75(tmp_path, number):
    process = start(tmp_path, "demo", "--quick")
    partial = tmp_path / "runs" / "demo-quick"
    end = time.monotonic() + 180
    while not partial.exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 75, err
    assert "stopped: ./launch.sh demo --quick resumes here" in err
    assert "== shards" not in err
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running()]


def test_a_mistake_keeps_its_status(tmp_path):
    for words, status in ((["paint"], 2), (["demo", "--quik"], 2), (["train", "dmo"], 2), (["--help"], 0)):
        process = start(tmp_path, *words)
        process.communicate(timeout=60)
        assert process.returncode == status, words
