import json

import pytest

from pipeline.doctor import BAD, GOOD, doctor
from pipeline.errors import AuditFailed
from tests.small_run import make_shards


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
