"""The command `verify`: whole shards pass, and every kind of damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.shards import shard
from data_prep.verification import verify
from pipeline.data.index import read_index
from pipeline.errors import EXIT_AUDIT, AuditFailed, run
from pipeline.files import sha256_of
from tests.data_prep.photos import city_rows, write_folder


@pytest.fixture
def shards(tmp_path) -> Path:
    source = write_folder(tmp_path / "in", city_rows(3, 4))
    shard(source, tmp_path / "out", workers=1, shard_mb=0.01)
    return tmp_path / "out"


def edit_index(shards: Path, edit) -> None:
    path = shards / "index.json"
    values = json.loads(path.read_text())
    edit(values["splits"]["train"])
    path.write_text(json.dumps(values))


def problems(shards: Path) -> list[str]:
    with pytest.raises(AuditFailed) as caught:
        verify(shards, workers=1)
    return json.loads(caught.value.summary.read_text())["problems"]


def test_whole_shards_pass(shards, tmp_path):
    summary = json.loads(verify(shards, tmp_path / "report", workers=1).read_text())
    assert (summary["samples"], summary["problems"]) == (12, [])
    assert summary["shards"] == sum(len(split.shards) for split in read_index(shards).splits.values())
    assert verify(shards, workers=1) == (shards / "verify" / "summary.json").resolve()


def test_one_flipped_bit_in_a_photo_is_found_twice(shards):
    sample = read_index(shards).splits["train"].samples[0]
    path = shards / "train-00000.tar"
    data = bytearray(path.read_bytes())
    data[sample.members["jpg"][0] + 100] ^= 1
    path.write_bytes(data)
    assert problems(shards) == [
        "train-00000.tar has another sha256 than the index says",
        f"train-00000.tar, {sample.key}: the photo is not the one of its record",
    ]


def test_a_photo_swapped_together_with_the_shards_hash_is_found(shards):
    path = shards / "train-00000.tar"
    sample = read_index(shards).splits["train"].samples[0]
    data = bytearray(path.read_bytes())
    data[sample.members["jpg"][0] + 100] ^= 1
    path.write_bytes(data)
    edit_index(shards, lambda split: split["shards"][0].update(sha256=sha256_of(path)))
    assert problems(shards) == [f"train-00000.tar, {sample.key}: the photo is not the one of its record"]


def test_a_cut_or_absent_tar_is_found(shards):
    (shards / "train-00000.tar").write_bytes((shards / "train-00000.tar").read_bytes()[:-512])
    (shards / "train-00001.tar").unlink()
    found = problems(shards)
    assert "bytes long" in found[0]
    assert found[1] == "train-00001.tar cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda split: split["samples"][0].update(label=1 - split["samples"][0]["label"]),
            "the index differ",
        ),
        (lambda split: split["samples"].pop(0), "samples, the index lists"),
        (lambda split: split["samples"][0]["members"].pop("jpg"), "it has 0 photos"),
        (lambda split: split["samples"][0]["members"].update(json=[0, 100]), "its record cannot be read"),
    ],
)
def test_an_index_that_says_something_else_is_found(shards, edit, expected):
    edit_index(shards, edit)
    found = problems(shards)
    assert len(found) == 1
    assert expected in found[0]


def test_findings_end_with_status_3_and_the_summarys_path(shards, capsys):
    (shards / "train-00000.tar").unlink()
    assert run(lambda: verify(shards, workers=1)) == EXIT_AUDIT
    out, err = capsys.readouterr()
    assert out.strip() == str((shards / "verify" / "summary.json").resolve())
    assert "train-00000.tar cannot be read" in err
