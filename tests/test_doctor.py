import json
import subprocess
from pathlib import Path

import pytest

from pipeline.doctor import doctor
from pipeline.errors import AuditFailed
from pipeline.launch.checks import BAD, GOOD
from tests.small_run import make_shards
from tests.warm import python

NODE = Path(__file__).parents[1] / "accelerate_configs" / "node_8.yaml"


def verdicts(path):
    return {finding["about"]: finding["verdict"] for finding in json.loads(path.read_text())["findings"]}


def test_a_sound_machine_passes_and_the_plan_is_told(tmp_path, capsys):
    make_shards(tmp_path / "shards", {"train": [0, 1] * 40, "val": [0, 1]})
    found = verdicts(doctor("demo", str(tmp_path / "shards"), tmp_path))
    assert BAD not in found.values()
    assert {"machine", "packages", "configs", "backbone", "data", "batch", "steps", "lr"} <= set(found)
    assert "photos per optimizer step" in capsys.readouterr().err


def test_shards_at_a_url_are_looked_at_and_a_missing_store_is_a_finding(tmp_path):
    make_shards(tmp_path / "shards", {"train": [0, 1] * 40, "val": [0, 1]})
    assert verdicts(doctor("demo", f"file://{tmp_path}/shards", tmp_path))["data"] == GOOD
    with pytest.raises(AuditFailed, match="data") as caught:
        doctor("demo", "memory://nowhere", tmp_path)
    assert verdicts(caught.value.summary)["data"] == BAD


def test_damaged_shards_are_an_audit_finding(tmp_path):
    make_shards(tmp_path / "shards", {"train": [0, 1]})
    tar = tmp_path / "shards" / "train-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(AuditFailed, match="data") as caught:
        doctor("demo", str(tmp_path / "shards"), tmp_path)
    assert verdicts(caught.value.summary)["data"] == BAD


def findings(path):
    return {finding["about"]: finding["text"] for finding in json.loads(path.read_text())["findings"]}


def test_a_pair_of_configurations_is_resolved_for_a_machine_that_is_elsewhere(tmp_path):
    path = doctor("pretrain_30ep", None, tmp_path, config_file=NODE, num_processes=16, gpu_gib=80.0)
    found = findings(path)
    assert found["batch"] == "64 photos per optimizer step = 16 processes x 4 x 1 accumulated"
    assert found["precision"].startswith("bf16")
    assert "activations of 4 photos" in json.dumps(json.loads(path.read_text())["findings"])
    assert json.loads(path.read_text())["deepspeed"]["train_micro_batch_size_per_gpu"] == 4


def test_a_gpu_that_is_too_small_and_a_pair_that_does_not_work_are_findings(tmp_path):
    with pytest.raises(AuditFailed, match="memory"):
        doctor("pretrain_30ep", None, tmp_path, config_file=NODE, gpu_gib=3.0)
    with pytest.raises(AuditFailed, match="launch") as caught:
        doctor("pretrain_30ep", None, tmp_path, config_file=NODE, num_processes=7, gpu_gib=80.0)
    assert "7 processes cannot share evenly" in findings(caught.value.summary)["launch"]


def test_the_recipe_may_stand_without_its_flag(tmp_path):
    words = ["pretrain_30ep", "--gpu_gib", "80", "--out", str(tmp_path)]
    done = subprocess.run([python(), "-m", "pipeline.doctor", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["recipe"] == "pretrain_30ep"
    assert "the engine gets: {" in done.stderr
