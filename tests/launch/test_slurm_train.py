"""The batch script of training, run by bash with an `srun` that only takes notes; `tests/slurm` has a real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import Config, DataConfig, TrainConfig, to_yaml
from pipeline.errors import UserError
from pipeline.launch.slurm_train import main
from tests.launch.test_slurm import calls, directives, executable, login_node
from tests.small_run import make_shards, small_config

__all__ = ["login_node"]  # a fixture

ODD = """it's "my" 50% run"""
ROOT = Path(__file__).parents[2]
CPU = ("--nodes", "2", "--gpus-per-node", "0")


@pytest.fixture
def recipe(login_node) -> Path:
    """A recipe whose shards are there."""
    make_shards(login_node / "shards", {"train": [0, 1] * 8, "val": [0, 1]})
    values = Config(TrainConfig(batch_size=8), DataConfig(shards="shards", workers=3), small_config("scenes-tiny"))
    (login_node / "recipe.yaml").write_text(to_yaml(values))
    return login_node / "recipe.yaml"


def submitted(recipe: Path, *words: str) -> Path:
    """The script."""
    assert main(["recipe.yaml", *CPU, *words]) is not None
    return next(recipe.parent.rglob("train.sbatch"))


def start(script: Path, srun: str, **environment: str) -> subprocess.Popen[str]:
    """Run a script as the job 7, with a node that does `srun` in bash."""
    bin_folder = Path(os.environ["PATH"].partition(":")[0])
    executable(bin_folder / "srun", srun)
    executable(bin_folder / "scontrol", f"echo \"scontrol $*\" >>'{bin_folder.parent}/calls'")
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "5", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    return subprocess.Popen(
        ["bash", script], cwd="/", env={**os.environ, **job, **environment}, stdout=subprocess.PIPE, text=True
    )


def test_the_script_asks_for_nodes_and_notice_and_is_requeued(recipe):
    script = submitted(recipe, "--processes-per-node", "2", "--time", "04:00:00", "--account=roads")
    asked = directives(script)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["cpus-per-task"]) == ("2", "1", "8")
    assert (asked["signal"], asked["open-mode"], asked["requeue"]) == ("B:USR2@300", "append", "")
    assert (asked["time"], asked["account"]) == ("04:00:00", "roads")
    assert "gpus-per-node" not in asked
    assert calls(recipe.parent) == [["sbatch", "--parsable", str(script)]]
    again = directives(submitted(recipe, "--no-requeue"))
    assert "no-requeue" in again
    assert "requeue" not in again


@pytest.mark.parametrize(("task", "rank"), [("0", "0"), ("1", "1")])
def test_each_node_starts_one_launcher_that_knows_its_place(recipe, monkeypatch, task, rank):
    """Bash is the judge: what would be Python says its words."""
    monkeypatch.setattr(sys, "executable", str(executable(recipe.parent / "py'thon" / "py", "printf '%s\\n' \"$@\"")))
    script = submitted(recipe, "--run", f"out/{ODD}", "--optim.lr", "1e-3", "--processes-per-node", "4")
    # The words before `bash` are srun's.
    done = start(script, 'while [[ $1 != bash ]]; do shift; done; "$@"', SLURM_PROCID=task, SLURM_RESTART_COUNT="2")
    words = done.communicate()[0].splitlines()
    assert done.returncode == 0
    assert words[:3] == ["-m", "pipeline.launch.launcher", "recipe.yaml"]
    assert {f"--machine_rank={rank}", "--num_machines=2", "--num_processes=8"} <= set(words)
    assert {"--main_process_ip=10.0.0.1", "--main_process_port=20009"} <= set(words)
    assert words[words.index("--run") + 1] == f"out/{ODD}"
    assert words[words.index("--optim.lr") + 1] == "1e-3"


@pytest.mark.parametrize(
    ("words", "status", "requeued"), [((), 75, True), (("--no-requeue",), 75, False), ((), 2, False), ((), 0, False)]
)
def test_only_a_run_that_was_stopped_is_requeued_and_the_status_is_the_trainings(recipe, words, status, requeued):
    script = submitted(recipe, *words)
    done = start(script, f"exit {status}")
    done.communicate()
    assert done.returncode == status
    assert (["scontrol", "requeue", "7"] in calls(recipe.parent)) == requeued


@pytest.mark.parametrize("status", [75, 140])
def test_notice_reaches_the_launcher_of_the_first_node_even_while_it_starts(recipe, status):
    """The first signals are lost on a launcher that does not listen yet; a node that dies of one is no failure."""
    script = submitted(recipe)
    launcher = f"""
    trap '' USR2
    echo $$ >'{script.parent}/launcher-7.pid'
    touch '{recipe.parent}/started'
    sleep 3
    trap 'exit {status}' USR2
    while true; do sleep 0.1; done
    """
    job = start(script, launcher)
    while not (recipe.parent / "started").exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR2)
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 75
    assert "asked to stop" in said
    assert ["scontrol", "requeue", "7"] in calls(recipe.parent)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nodes", "0"], "--nodes is 0, but must be 1 or more"),
        (["--gpus-per-node", "-1"], "--gpus_per_node is '-1', but must be 0 or more, or TYPE:NUMBER such as h100:8"),
        (["--gpus-per-node", "h100"], "--gpus_per_node is 'h100', but must be"),
        (["--gpus-per-node", "8\n#SBATCH --x"], "--gpus_per_node is '8"),
        (["--gres", "nvme:2"], "--gres is 'nvme:2', but must be SLURM's gpu:NUMBER or gpu:TYPE:NUMBER"),
        (["--gres", "gpu:2,gpu:h100:2"], "--gres is 'gpu:2,gpu:h100:2', but must be"),
        (["--processes-per-node", "0"], "--processes_per_node is 0, but must be 1 or more"),
        (["--nodes", "3"], "train.batch_size is 8, which 3 processes cannot share evenly; choose 6 or 9"),
        (["--train.epoch", "3"], "unknown option 'train.epoch'; did you mean 'train.epochs'?"),
        (["--config-file", "none.yaml"], "cannot read none.yaml"),
        (["--shards", "nowhere"], "no shards in nowhere"),
        (["--gpus-per-node", "8", "--nodes", "1"], "has no CUDA"),
    ],
)
def test_a_mistake_is_found_before_anything_is_submitted(recipe, words, sentence, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(UserError) as error:
        main(["recipe.yaml", *CPU, *words])
    assert sentence in str(error.value)
    assert not (recipe.parent / "calls").exists()


def test_a_dry_run_shows_the_script_and_what_is_amiss_and_writes_nothing(recipe, capsys, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    before = sorted(recipe.parent.rglob("*"))
    assert main(["recipe.yaml", "--nodes", "2", "--gpus-per-node", "4", "--dry-run", "--shards", "nowhere"]) is None
    shown = capsys.readouterr().err
    for part in (
        "has no CUDA",
        "no shards in nowhere",
        "#SBATCH --gpus-per-node=4",
        "--num_processes=8",
        "multi_node.yaml",
    ):
        assert part in shown
    assert sorted(recipe.parent.rglob("*")) == before


def test_help_names_the_options_of_the_job(capsys):
    assert main([]) is None
    assert "--gpus_per_node" in capsys.readouterr().out


def test_the_precision_is_what_the_recipe_says_where_the_job_runs(recipe, capsys):
    """The file for one CPU has ZeRO stage 0, which computes in fp32 on a GPU too, and not in bf16."""
    on_gpu = ["recipe.yaml", "--gpus-per-node", "1", "--config_file", "accelerate_configs/cpu_1.yaml", "--dry-run"]
    on_gpu[4] = str(ROOT / on_gpu[4])
    assert main([*on_gpu, "--train.precision", "fp32"]) is None
    assert "--train.precision fp32" in capsys.readouterr().err
    for precision in ("auto", "bf16"):
        with pytest.raises(UserError, match="use stage 1"):
            main([*on_gpu, "--train.precision", precision])
    with pytest.raises(UserError, match=r"train\.precision is 'bf16', but no GPU"):
        main(["recipe.yaml", *CPU, "--dry-run", "--train.precision", "bf16"])


@pytest.mark.parametrize(("words", "directive", "processes"), [
    (["--gpus-per-node", "4"], "gpus-per-node=4", 8), (["--gpus-per-node", "h100:4"], "gpus-per-node=h100:4", 8),
    (["--gpus-per-node=a100_80gb.x:2"], "gpus-per-node=a100_80gb.x:2", 4), (["--gres", "gpu:4"], "gres=gpu:4", 8),
    (["--gres", "gpu:h100:2"], "gres=gpu:h100:2", 4), (["--gres", "gpu"], "gres=gpu", 2),
    (["--gres", "nvme:1,gpu:h100:8"], "gres=nvme:1,gpu:h100:8", 16),
])  # fmt: skip
def test_gpus_are_asked_for_as_clusters_want_it(recipe, capsys, words, directive, processes):
    main(["recipe.yaml", "--nodes", "2", *words, "--dry-run", "--train.batch_size", "16"])
    said = capsys.readouterr().err
    assert f"#SBATCH --{directive}\n" in said
    assert f"--num_processes={processes}" in said
    assert "--cpu " not in said
