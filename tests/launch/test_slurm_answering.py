"""The batch script of `slurm predict` and `slurm evaluate`, with an `sbatch` and an `srun` that only take notes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.launch.slurm_answering import main
from tests.launch.test_slurm import calls, directives, executable, login_node
from tests.launch.test_slurm_train import start
from tests.small_run import make_backbone, make_model, make_run, make_shards, noisy_photo

__all__ = ["login_node"]  # a fixture

ODD = """it's "my" 50% answers.csv"""
CPU = ("--nodes", "2", "--gpus-per-node", "0")
PREDICT = ("--model", "run/model", "--input", "photos", "--output")


@pytest.fixture
def place(login_node) -> Path:
    """A folder with a run and photos."""
    make_shards(login_node / "shards", {"train": [0, 1], "val": [0, 1]})
    model = make_model(make_backbone(login_node / "backbone"))
    make_run(login_node / "run", model, login_node / "shards")
    (login_node / "photos").mkdir()
    (login_node / "photos" / "a.jpg").write_bytes(noisy_photo(0))
    return login_node


def test_each_node_starts_the_command_with_every_value_as_it_was_given(place, monkeypatch):
    """Bash is the judge: what would be Python says its words."""
    monkeypatch.setattr(sys, "executable", str(executable(place / "py'thon" / "py", "printf '%s\\n' \"$@\"")))
    summary = main(["predict", *PREDICT, ODD, *CPU, "--processes-per-node", "3", "--time", "01:00:00"])
    assert summary == place / f"{ODD}.slurm" / "summary.json"
    script = place / f"{ODD}.slurm" / "predict.sbatch"
    done = start(script, 'while [[ $1 != bash ]]; do shift; done; "$@"', SLURM_PROCID="1")
    words = done.communicate()[0].splitlines()
    assert done.returncode == 0
    assert words[:3] == ["-m", "pipeline.launch.answering", "predict"]
    assert {"--num_machines=2", "--num_processes=6", "--machine_rank=1", "--main_process_ip=10.0.0.1"} <= set(words)
    assert "--cpu" in words
    given = [*PREDICT, ODD]
    first = words.index("--model")
    assert words[first : first + len(given)] == given


def test_the_script_asks_for_a_process_per_gpu_and_notice(place, capsys, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    main(["predict", *PREDICT, "x.csv", "--gpus-per-node", "8", "--workers", "5", "--partition", "long"])
    asked = directives(place / "x.csv.slurm" / "predict.sbatch")
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("1", "1", "8")
    assert (asked["cpus-per-task"], asked["partition"], asked["signal"]) == ("48", "long", "B:USR2@300")
    assert (asked["job-name"], asked["requeue"]) == ("roadwork-predict", "")
    assert asked["output"] == f"{place}/x.csv.slurm/predict-%j.log"
    main(["evaluate", "--run", "run", "--gpus-per-node", "2"])
    script = place / "run-evaluate.slurm" / "evaluate.sbatch"
    assert directives(script)["cpus-per-task"] == "16"
    assert "pipeline.launch.answering evaluate" in script.read_text()
    assert "--num_processes=2" in script.read_text()
    assert [call[:1] for call in calls(place)] == [["sbatch"], ["sbatch"]]


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (1, False), (0, False)])
def test_a_prediction_that_was_stopped_queues_again(place, status, requeued):
    main(["predict", *PREDICT, "x.csv", *CPU])
    done = start(place / "x.csv.slurm" / "predict.sbatch", f"exit {status}")
    said, _ = done.communicate()
    assert done.returncode == status
    assert f"predict ended with status {status}" in said
    assert (["scontrol", "requeue", "7"] in calls(place)) == requeued


def test_a_dry_run_shows_the_script_and_what_is_amiss_and_writes_nothing(place, capsys, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    before = sorted(place.rglob("*"))
    assert main(["predict", *PREDICT, "x.csv", "--gpus-per-node", "4", "--dry-run"]) is None
    shown = capsys.readouterr().err
    for part in ("has no CUDA", "#SBATCH --gpus-per-node=4", "--num_processes=4", "--output x.csv"):
        assert part in shown
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["predict", *PREDICT, "x.csv", "--inputs", "a"], "unknown option 'inputs'; did you mean 'input'?"),
        (["predict", *PREDICT, "x.parquet"], "--output is 'x.parquet'"),
        (["predict", *PREDICT, "x.csv", "--input", "none"], "--input 'none' leads to no photo"),
        (["predict", *PREDICT, "x.csv", "--list", "none"], "--list 'none' cannot be read"),
        (["predict", "--model", "shards", "--input", "photos", "--output", "x.csv"], "no model in shards"),
        (["predict", *PREDICT, "x.csv", "--config-file", "none.yaml"], "no accelerate configuration none.yaml"),
        (["evaluate", "--run", "none"], "no run at none"),
        (["evaluate", "--run", "run", "--shards", "nowhere"], "no shards in nowhere"),
        (["evaluate", "--run", "run", "--processes-per-node", "0"], "--processes_per_node is 0"),
    ],
)
def test_a_mistake_is_found_before_anything_is_submitted(place, words, sentence):
    with pytest.raises(UserError) as error:
        main([*words, *CPU])
    assert sentence in str(error.value)
    assert not (place / "calls").exists()


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_help_names_the_options_of_the_job(capsys, command):
    assert main([command]) is None
    shown = capsys.readouterr().out
    assert "--gpus_per_node" in shown
    assert "or 8 for each GPU" in " ".join(shown.split())
    assert "Nodes of the job" in shown
