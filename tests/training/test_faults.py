"""What a fault on one rank does to a run of two, and how the run comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig, to_yaml
from pipeline.training.faults import FaultPolicy
from pipeline.training.state import TrainState
from tests.small_run import make_backbone, make_shards, random_labels, small_config
from tests.warm import python

ROOT = Path(__file__).parents[2]
STEPS = 6
pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, a backbone and a recipe of six steps on two processes."""
    folder = tmp_path_factory.mktemp("world")
    make_shards(folder / "shards", {"train": random_labels(24, 0), "val": random_labels(9, 1)})
    recipe = Config(
        train=TrainConfig(epochs=2, batch_size=8, micro_batch_size=2, log_every=1, wandb=False, patience=0),
        data=DataConfig(shards=str(folder / "shards"), epoch_share=1.0, workers=0),
        model=small_config(make_backbone(folder / "backbone"), dropout=0.0, metadata_all_dropout=0.0,
                           metadata_field_dropout=0.0, pruning="off"),
        optim=OptimConfig(lr=3e-3),
        checkpoint=CheckpointConfig(every_steps=2, every_minutes=0, keep=9),
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder


def start(world: Path, run: Path, fault: str, *words: str, restarts: int = 0) -> subprocess.Popen[str]:
    code = "import sys; from pipeline.launch.launcher import *; "
    code += "sys.exit(supervise([*launch_words(Path(sys.argv[1]), None), "
    code += "*sys.argv[3:]], restarts=int(sys.argv[2])))"
    command = [
        python(), "-c", code, str(ROOT / "accelerate_configs" / "cpu_2.yaml"), str(restarts),
        str(Path(__file__).with_name("faulty_train.py")), "--config", str(world / "recipe.yaml"), "--run", str(run),
        *words,
    ]  # fmt: skip
    environment = {**os.environ, "FAULT": fault, "PET_SHUTDOWN_TIMEOUT": "10"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str], status: int) -> str:
    _, err = process.communicate(timeout=180)
    assert process.returncode == status, err
    return err


def lines(run: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def only(text: str, beginning: str) -> str:
    found = [line for line in text.splitlines() if line.startswith(beginning)]
    assert len(found) == 1, text
    return found[0]


@pytest.fixture(scope="module")
def uninterrupted(world):
    run = world / "uninterrupted"
    end(start(world, run, "nan 0 99 99"), 0)
    return run


def test_a_killed_rank_ends_the_run_with_one_sentence_that_names_it(world):
    began = time.monotonic()
    err = end(start(world, world / "killed", "kill 1 3 3"), 1)
    said = only(err, "failed: ")
    assert "rank 1 on " in said
    assert "was killed by SIGKILL" in said
    assert "--max-restarts" in said
    assert "Traceback" not in err
    assert time.monotonic() - began < 90


def test_an_error_on_one_rank_ends_the_run_at_once_though_its_process_group_would_wait_for_the_others(world):
    began = time.monotonic()
    err = end(start(world, world / "raised", "raise 1 2 2"), 1)
    assert "Traceback (most recent call last)" in err
    assert "RuntimeError: CUDA error: an illegal memory access was encountered" in err
    assert "rank 1 on " in only(err, "failed: ")
    assert time.monotonic() - began < 60


def test_a_gpu_without_memory_is_a_users_mistake_which_no_restart_repeats(world):
    err = end(start(world, world / "memory", "memory 1 2 2", restarts=3), 2)
    said = only(err, "error: ")
    assert said.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11")
    assert said.endswith("GiB of which 1.55 GiB is free; choose a smaller train.micro_batch_size")
    assert "Traceback" not in err
    assert "starting again" not in err


def test_restarts_bring_a_killed_run_back_to_the_losses_of_an_uninterrupted_one(world, uninterrupted, tmp_path):
    run = world / "restarted"
    err = end(start(world, run, f"kill 1 3 3 {tmp_path / 'once'}", restarts=2), 0)
    assert "was killed by SIGKILL" in only(err, "rank 1 on ")
    assert "(2 restarts left)" in err
    assert "resuming at step 3 of 6" in err
    assert [line["loss"] for line in lines(run, "train")] == [line["loss"] for line in lines(uninterrupted, "train")]


def test_a_hung_rank_is_ended_in_time_and_the_stacks_of_all_say_where(world):
    run = world / "hung"
    err = end(start(world, run, "hang 1 2 2", "--train.hang_minutes", "0.1"), 1)
    only(err, "failed: ")
    for rank in (0, 1):
        assert f"rank {rank} made no progress for 6s (train.hang_minutes)" in err
        assert str(run / "stacks" / f"rank-{rank}.txt") in err
    assert "faulty_train.py" in (run / "stacks" / "rank-1.txt").read_text()
    assert "all_reduce" in (run / "stacks" / "rank-0.txt").read_text()


def test_a_step_without_a_finite_loss_changes_nothing_and_names_the_sample(world):
    """On rank 1 alone the loss is not finite, and both skip the step."""
    run = world / "skipped"
    err = end(start(world, run, "nan 1 2 2"), 0)
    (skip,) = lines(run, "skip")
    assert (skip["step"], skip["reason"], skip["in_a_row"]) == (3, "loss", 1)
    assert len(skip["samples"]) == 1
    assert f"step 3 skipped: its loss is not finite; samples: {skip['samples'][0]} (1 in a row" in err
    assert len(lines(run, "train")) == STEPS
    assert [step for step, line in enumerate(lines(run, "train"), 1) if "loss" not in line] == [3]
    assert not list(run.glob("stacks"))


def test_skipped_steps_in_a_row_roll_back_pass_over_their_samples_and_end_the_run_at_last(world):
    run = world / "rolled"
    words = ["--train.max_skips", "2", "--train.max_rollbacks", "1", "--epochs", "4"]
    err = end(start(world, run, "nan 1 3 6", *words), 1)
    assert [line["step"] for line in lines(run, "skip")] == [4, 5, 6, 7]
    assert [(line["step"], line["to"]) for line in lines(run, "rollback")] == [(5, 3)]
    said = only(err, "failed: ")
    assert "2 steps in a row up to step 7 had no finite loss, after 1 roll-backs" in said
    assert "optim.lr" in said
    before, after = (run / "checkpoints" / f"step-{step:08d}" for step in (3, 5))
    for name in ("weights", "optimizer", "average"):
        was, now = (load_file(folder / f"{name}.safetensors") for folder in (before, after))
        assert all(was[key].equal(now[key]) for key in was)


def test_after_a_roll_back_the_optimizer_counts_the_steps_of_the_run_and_not_of_the_checkpoint():
    """As a resumed run does: the corrections of young moments must not differ between the two."""
    count = torch.tensor(5.0)
    engine = SimpleNamespace(basic_optimizer=SimpleNamespace(state={"weight": {"step": count}}))

    def restore(engine, average):
        count.fill_(3)
        return {"step": 3}

    policy = FaultPolicy(
        TrainConfig(max_skips=2), engine, average=None, checkpoints=SimpleNamespace(restore=restore), loader=None,
        agreement=SimpleNamespace(is_first=False, gather=lambda value: [value]),
    )  # fmt: skip
    state = TrainState(8, step=5, skips=2)
    assert policy.after_skip(state, [], [], lambda line: None)
    assert (int(count), state.step, state.skips, state.rollbacks) == (5, 5, 0, 1)


def test_the_deadline_saves_and_ends_with_the_status_of_a_resumable_stop(world):
    run = world / "deadline"
    err = end(start(world, run, "nan 0 99 99", "--max-minutes", "0.001"), 75)
    assert "stopped: train.max_minutes=0.001 is over; saved at step 0 of 6" in err
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000000"]


def test_usr2_saves_through_the_launcher_and_where_accelerate_itself_is_launched(world, uninterrupted):
    """A bare `accelerate launch` dies of the signal; its processes, whose parent it is, save before they end."""
    run, log = world / "bare", world / "bare.txt"
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    words += [str(ROOT / "accelerate_configs" / "cpu_2.yaml"), str(ROOT / "pipeline" / "train.py")]
    words += ["--config", str(world / "recipe.yaml"), "--run", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=stream, stdout=stream)
        family = children_after(process, log, "step 1/")
        process.send_signal(signal.SIGUSR2)
        process.wait(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert "stopped: saved at step" in log.read_text()
    process = start(world, run, "nan 0 99 99")
    end(process, 0)
    assert [line["loss"] for line in lines(run, "train")] == [line["loss"] for line in lines(uninterrupted, "train")]


def children_after(process: subprocess.Popen[bytes], log: Path, words: str) -> list[psutil.Process]:
    """The processes below one, once its log holds certain words."""
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    return psutil.Process(process.pid).children(recursive=True)
