"""Whole runs of the real launcher: two gloo processes, DeepSpeed ZeRO-2, on a few noisy photos."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.checkpoints.files import MANIFEST, Damaged, check_checkpoint
from pipeline.config import CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig, to_yaml
from pipeline.model.roadwork import RoadworkModel
from pipeline.training.run_folder import RunFolder
from tests.small_run import make_backbone, make_shards, random_labels, small_config
from tests.warm import python

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.dist
STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, a backbone and a recipe of six steps."""
    folder = tmp_path_factory.mktemp("world")
    make_shards(folder / "shards", {"train": random_labels(24, 0), "val": random_labels(9, 1)})
    recipe = Config(
        train=TrainConfig(epochs=2, batch_size=8, micro_batch_size=2, log_every=1, wandb=False, patience=0),
        data=DataConfig(shards=str(folder / "shards"), epoch_share=1.0, workers=0),
        model=small_config(make_backbone(folder / "backbone"), dropout=0.0, metadata_all_dropout=0.0,
                           metadata_field_dropout=0.0, pruning="off"),
        optim=OptimConfig(lr=3e-3),
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=0),
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder


def launch(
    world: Path, run: Path, *words: str, processes: int = 2, program: str | None = None
) -> subprocess.Popen[str]:
    command = [
        program or python(), "-m", "pipeline.launch.launcher", str(world / "recipe.yaml"),
        "--config_file", str(ROOT / "accelerate_configs" / f"cpu_{processes}.yaml"), "--run", str(run), *words,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=180)
    assert process.returncode == status, err
    return out, err


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    lines = [line for line in metrics(run) if line["kind"] in ("train", "val")]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def train_losses(run: Path) -> dict[int, float]:
    """Those of the steps that this folder has seen."""
    return {line["step"]: line["loss"] for line in metrics(run) if line["kind"] == "train"}


@pytest.fixture(scope="module")
def uninterrupted(world):
    """A run of two processes from beginning to end."""
    run = world / "uninterrupted"
    out, _ = finish(launch(world, run))
    assert out.splitlines()[-1] == str((run / "summary.json").resolve())
    return run


def test_two_processes_train_validate_and_leave_a_run_folder(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert (summary["steps"], summary["samples_seen"], summary["epochs"]) == (STEPS, 48, 2.0)
    assert summary["best"]["val"]["n"] == 9
    curve = losses(uninterrupted)
    assert curve[-2] < curve[0]
    provenance = json.loads((uninterrupted / "provenance.json").read_text())
    assert provenance["hardware"]["processes"] == 2
    assert provenance["versions"]["torch"] == torch.__version__
    assert not RoadworkModel.from_pretrained(uninterrupted / "model").training
    best = summary["best"]["step"]
    saves = [line for line in metrics(uninterrupted) if line["kind"] == "save"]
    assert [line["step"] for line in saves] == list(range(STEPS + 1))
    assert summary["checkpoints"]["saves"] == len(saves)
    assert all(line[key] >= 0 for line in [*saves, summary["checkpoints"]] for key in ("save_s", "write_s"))
    assert summary["checkpoints"]["step_s_in_writes"] > 0  # there is a save before each step
    assert [path.name for path in sorted((uninterrupted / "checkpoints").glob("step-*"))] == [
        f"step-{step:08d}" for step in sorted({best, STEPS - 1, STEPS})
    ]


def test_a_finished_run_returns_at_once_and_other_settings_are_refused(world, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    out, _ = finish(launch(world, uninterrupted, processes=1))
    assert out.splitlines()[-1] == str((uninterrupted / "summary.json").resolve())
    _, err = finish(launch(world, uninterrupted, "--epochs", "3"), status=2)
    assert "error: " in err
    assert "train.epochs=2 (now 3)" in err
    assert "Traceback" not in err
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_second_training_of_a_run_is_refused_while_the_first_lives(world, tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.locked():
        _, err = finish(launch(world, run.path), status=2)
        (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: another process (process {os.getpid()} on ")
        assert error.endswith(f"is training {run.path} at this moment; wait for it, or choose another --train.run")
        assert "Traceback" not in err
        assert [path.name for path in run.path.iterdir()] == [".lock"]


def test_training_refuses_what_doctor_refuses(world, tmp_path):
    """The guards of the DeepSpeed file, through the launcher that trains: each is one sentence and status 2."""
    settings = json.loads((ROOT / "ds_configs" / "zero1.json").read_text())
    launch_file = yaml.safe_load((ROOT / "accelerate_configs" / "cpu_1.yaml").read_text())
    launch_file["deepspeed_config"]["deepspeed_config_file"] = str(tmp_path / "zero.json")
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launch_file))
    words = [str(world / "recipe.yaml"), "--config_file", str(tmp_path / "launch.yaml")]
    for change, sentence in (
        ({"fp16": {"enabled": True}}, "zero.json: fp16 is enabled"),
        ({"zero_allow_untested_optimizer": False}, "zero.json: zero_allow_untested_optimizer must be true"),
    ):
        (tmp_path / "zero.json").write_text(json.dumps({**settings, **change}))
        training = [python(), "-m", "pipeline.launch.launcher", *words, "--run", str(tmp_path / "run")]
        done = subprocess.run(training, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert sentence in done.stderr
        doctor = [python(), "-m", "pipeline.doctor", *words, "--out", str(tmp_path)]
        done = subprocess.run(doctor, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 3, done.stderr
        assert sentence in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_goes_on_to_bitwise_the_same_losses(world, uninterrupted):
    run = world / "stopped"
    process = launch(world, run)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
            break
    _, err = finish(process, status=75)
    assert "Traceback" not in err
    assert not (run / "summary.json").exists()
    taken = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    assert 2 <= taken < STEPS
    _, err = finish(launch(world, run))
    assert f"resuming at step {taken} of {STEPS}" in err
    assert_same_bits(run, uninterrupted)


def assert_same_bits(ours: Path, theirs: Path) -> None:
    """Every loss, and every averaged weight of the best validation."""
    assert losses(ours) == losses(theirs)
    weights, expected = (load_file(run / "model" / "model.safetensors") for run in (ours, theirs))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_deterministic_run_is_bitwise_the_same_on_a_cpu_where_every_run_is(world, uninterrupted):
    """And names no operation that could be none."""
    run = world / "fixed-order"
    _, err = finish(launch(world, run, "--train.deterministic", "true"))
    assert "deterministic" not in err
    assert_same_bits(run, uninterrupted)


def test_a_killed_run_falls_back_to_the_checkpoint_that_is_whole(world, uninterrupted):
    run = world / "killed"
    process = launch(world, run, program=sys.executable)  # all of whose processes are below it
    while len(list((run / "checkpoints").glob("step-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    kill_family(process.pid)
    process.communicate()
    newest = max((run / "checkpoints").glob("step-*"))
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64] + bytes(64))
    with pytest.raises(Damaged, match=r"^weights\.safetensors has another SHA-256"):
        check_checkpoint(newest)
    _, err = finish(launch(world, run))
    assert f"checkpoint {newest} is damaged" in err
    assert losses(run) == losses(uninterrupted)


def test_a_kill_in_the_middle_of_a_write_loses_nothing_that_was_promised(world, uninterrupted):
    run, killed = world / "killed-writing", 4
    code = "import sys; from pipeline.launch.launcher import *; "
    code += "sys.exit(supervise([*launch_words(Path(sys.argv[1]), None), *sys.argv[2:]]))"
    command = [
        python(), "-c", code, str(ROOT / "accelerate_configs" / "cpu_2.yaml"),
        str(Path(__file__).with_name("killed_in_a_write.py")), "--config", str(world / "recipe.yaml"), "--run",
        str(run),
    ]  # fmt: skip
    environment = {**os.environ, "STEP": str(killed), "PET_SHUTDOWN_TIMEOUT": "10"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _, err = finish(process, status=1)
    assert "rank 0 on " in err
    assert "was killed by SIGKILL" in err
    said = max(line["step"] for line in metrics(run) if line["kind"] == "save")
    assert said == killed - 1
    check_checkpoint(run / "checkpoints" / f"step-{said:08d}")
    unfinished = run / "checkpoints" / f".step-{killed:08d}.tmp"
    assert (unfinished / "weights.safetensors").exists()
    assert not (unfinished / MANIFEST).exists()
    _, err = finish(launch(world, run))
    assert f"resuming at step {said} of {STEPS}" in err
    assert "is damaged" not in err
    assert losses(run) == losses(uninterrupted)
    assert list((run / "checkpoints").glob(".*")) == []


def kill_family(pid: int) -> None:
    """kill -9 of a process and all below it."""
    for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        os.kill(process.pid, signal.SIGKILL)


def test_one_process_and_accumulation_take_the_same_steps(world, uninterrupted):
    """Neither world size nor micro-batches change the loss: 1 x 8 against 2 x 2 x 2."""
    run = world / "alone"
    finish(launch(world, run, "--train.micro_batch_size", "8", processes=1))
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=1e-5)


@pytest.fixture(scope="module")
def half(world):
    """A run of two processes that share experts, as it was after its third step."""
    run = world / "half"
    finish(launch(world, run, "--train.expert_parallel", "2", "--checkpoint.keep", str(STEPS)))
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > STEPS // 2:
            shutil.rmtree(path)
    (run / "summary.json").unlink()
    return run


@pytest.mark.parametrize(("processes", "stage", "experts"), [(1, 1, 1), (4, 3, 2)])
def test_a_run_goes_on_in_other_processes_stage_and_placement_of_experts(
    world, half, uninterrupted, processes, stage, experts
):
    run = world / f"on-{processes}"
    shutil.copytree(half, run)
    accelerate = yaml.safe_load((ROOT / "accelerate_configs" / "cpu_2.yaml").read_text())
    accelerate["num_processes"] = processes
    accelerate["deepspeed_config"]["deepspeed_config_file"] = f"ds_configs/zero{stage}.json"
    config = world / f"on-{processes}.yaml"
    config.write_text(yaml.safe_dump(accelerate))
    _, err = finish(launch(world, run, "--config_file", str(config), "--train.expert_parallel", str(experts)))
    assert f"resuming at step {STEPS // 2} of {STEPS}" in err
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=1e-6)


def test_a_dry_run_plans_takes_two_steps_and_writes_nothing(world):
    out, err = finish(launch(world, world / "dry", "--dry-run", processes=1))
    for word in ("batch ", "steps ", "lr ", "parameters ", "memory ", "dry run: 2 steps"):
        assert word in err
    assert out == ""
    assert not (world / "dry").exists()


def test_weights_and_biases_logs_offline_into_the_run_folder(world):
    run = world / "tracked"
    _, err = finish(launch(world, run, "--train.wandb", "true", "--epochs", "1", processes=1))
    assert "logging offline" in err
    assert list(run.glob("wandb/offline-run-*"))


def test_a_run_whose_machine_is_lost_goes_on_elsewhere_from_its_synced_checkpoint(world, uninterrupted):
    """With another number of processes, and with the best weights, which no checkpoint but the best one holds."""
    run, url = world / "lost", f"file://{world}/remote"
    process = launch(world, run, "--checkpoint.sync", url)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGINT)
            break
    finish(process, status=75)
    run.rename(world / "gone")
    taken = max(int(path.name.removeprefix("step-")) for path in (world / "remote").glob("step-*"))
    assert 4 <= taken < STEPS
    _, err = finish(launch(world, run, "--resume", url, processes=1))
    assert f"fetched checkpoint {url}/step-{taken:08d}" in err
    assert f"resuming at step {taken} of {STEPS}" in err
    after, expected = (train_losses(folder) for folder in (run, uninterrupted))
    assert list(after) == list(range(taken + 1, STEPS + 1))
    assert after == pytest.approx({step: expected[step] for step in after}, rel=1e-6)
    best = [json.loads((folder / "summary.json").read_text())["best"]["step"] for folder in (run, uninterrupted)]
    assert best[0] == best[1]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, uninterrupted))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def test_a_disk_without_room_for_checkpoints_does_not_end_a_run(world, uninterrupted):
    """The system lets no file grow to the size of the optimizer's state, but those of the best model fit."""
    newest = max((uninterrupted / "checkpoints").glob("step-*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * (newest / "weights.safetensors").stat().st_size // 2, limits[1]))
    try:
        process = launch(world, world / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _, err = finish(process)
    assert "the checkpoint of step 1 is not saved (file too large); there is no earlier one" in err
    assert f"the state of step {STEPS} is not saved; there is no earlier one" in err
    assert list((world / "full" / "checkpoints").iterdir()) == []
    assert losses(world / "full") == losses(uninterrupted)


def test_a_stop_says_that_its_save_failed_and_not_that_it_was_made(world):
    """Only the thread that writes knows, and the stop waits for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        process = launch(world, world / "stopped-full", "--max-minutes", "0.001")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _, err = finish(process, status=75)
    assert f"train.max_minutes=0.001 is over; not saved at step 0 of {STEPS}" in err
