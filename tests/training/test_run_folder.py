import json
import subprocess
from dataclasses import replace

import pytest

from pipeline.config import Config, DataConfig, TrainConfig, read_config
from pipeline.data.index import Index
from pipeline.errors import UserError
from pipeline.optim.config import OptimConfig
from pipeline.training import run_folder
from pipeline.training.run_folder import RunFolder

INDEX = Index({}, (), {}, {}, "1.0", "a" * 64, {}, {})


def config(**train: object) -> Config:
    return Config(train=TrainConfig(**train))  # type: ignore[arg-type]


def test_a_free_folder_is_not_touched_by_the_check(tmp_path):
    assert not RunFolder(tmp_path / "run").check(config(), INDEX)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_settings_that_change_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(config(log_every=10), INDEX, 2)
    assert not folder.check(config(log_every=5, micro_batch_size=4), INDEX)
    moved = Config(data=DataConfig(shards="elsewhere", workers=0))
    assert not folder.check(moved, INDEX)


def test_the_rates_that_an_optimizer_gives_are_those_that_are_left_open(tmp_path):
    """A run's own configuration leaves them open too, so that they follow when it is used for another optimizer."""
    folder = RunFolder(tmp_path)
    folder.create(config(), INDEX, 1)
    known = read_config(tmp_path / "config.yaml").optim
    assert replace(known, name="sophia_h").betas == (0.96, 0.99)
    assert not folder.check(Config(optim=OptimConfig(beta1=0.9, beta2=0.99, eps=1e-8)), INDEX)
    with pytest.raises(UserError, match=r"optim\.eps=1e-08 \(now 1e-06\)"):
        folder.check(Config(optim=OptimConfig(eps=1e-6)), INDEX)


def test_another_setting_or_other_data_is_refused_by_name(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(config(), INDEX, 1)
    with pytest.raises(UserError, match=r"train\.seed=0 \(now 1\)"):
        folder.check(config(seed=1), INDEX)
    with pytest.raises(UserError, match="other shards"):
        folder.check(config(), Index({}, (), {}, {}, "1.0", "b" * 64, {}, {}))


def test_a_summary_with_steps_means_finished(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(config(), INDEX, 1)
    folder.summary.write_text(json.dumps({"steps": 3}))
    assert folder.check(config(), INDEX)


def test_resuming_drops_the_lines_that_will_be_taken_again_and_one_that_was_cut(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log({"kind": "train", "step": step})
    with folder.metrics.open("a") as stream:
        stream.write('{"kind": "tr')
    folder.truncate_metrics(2)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2]


def test_provenance_names_versions_and_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    RunFolder(tmp_path).create(config(), INDEX, 2)
    text = (tmp_path / "provenance.json").read_text()
    assert "secret-key" not in text
    assert {"torch", "deepspeed", "python"} <= set(json.loads(text)["versions"])


def test_a_folder_of_model_files_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="holds model files, not a run; choose another"):
        RunFolder(tmp_path).check(config(), INDEX)


def test_the_revision_says_whether_the_tree_has_changes(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True)

    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    assert run_folder.git_revision() is None
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert run_folder.git_revision() == head
    (tmp_path / "file").write_text("two")
    assert run_folder.git_revision() == f"{head}+"
    monkeypatch.setattr(run_folder, "in_checkout", lambda: False)
    assert run_folder.git_revision() is None
