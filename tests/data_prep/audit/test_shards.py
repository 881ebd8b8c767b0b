"""Which shards the audit can read, and where it can write."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from data_prep.audit.command import audit
from data_prep.shards.command import shard
from pipeline.errors import AuditFailed, UserError
from tests.data_prep.examples import city_rows, encode, jpeg, pixels, write_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    shard(write_folder(folder / "in", city_rows(3)), folder / "out", workers=1)
    return folder / "out"


def without_time(summary: dict) -> dict:
    return {name: value for name, value in summary.items() if name not in ("wall_s", "images_per_s")}


def test_shards_at_a_url_are_audited_as_they_lie(shards, tmp_path):
    there = json.loads(audit(f"file://{shards}/", tmp_path / "there", workers=2).read_text())
    here = json.loads(audit(f"{shards}/", tmp_path / "here", workers=1).read_text())
    assert without_time(there) == without_time(here)
    assert there["samples"] == 24
    for name in ("audit.html", "map.png", "findings.jsonl"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    with pytest.raises(UserError, match="--out is None, but must be a folder of this machine"):
        audit(f"file://{shards}", workers=1)


def test_names_that_are_no_utf_8_are_shown_by_their_bytes(tmp_path):
    source, rows = tmp_path / "in", []
    source.mkdir()
    for name, split, data in (
        (b"\xff00.jpg", "train", jpeg(0)),
        (b"\xff01.jpg", "test", encode(pixels(0), quality=40)),
        (b"02.jpg", "test", jpeg(1)),
    ):
        (source / os.fsdecode(name)).write_bytes(data)
        rows.append({"file_name": os.fsdecode(name), "split": split})
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shard(source, tmp_path / "out", workers=1, splits="keep", val_share=0)
    with pytest.raises(AuditFailed) as failed:
        audit(tmp_path / "out", workers=1)
    report = tmp_path / "out" / "audit"
    assert rb"\udcff01.jpg" in (report / "audit.html").read_bytes()
    assert "02.jpg" not in (report / "audit.html").read_bytes().decode()
    (line,) = (report / "findings.jsonl").read_bytes().decode("ascii").splitlines()
    assert [os.fsencode(photo["source"]) for photo in json.loads(line)["photos"]] == [b"\xff00.jpg", b"\xff01.jpg"]
    assert json.loads(failed.value.summary.read_bytes())["look_alikes"]["count"] == 1


def test_a_report_that_cannot_be_written_is_refused_before_the_work(shards, monkeypatch):
    monkeypatch.setattr("data_prep.audit.job.read_photos", lambda *_: pytest.fail("the photos were read"))
    with pytest.raises(UserError, match=r"cannot be written to /proc/self \(.*\); choose another folder with --out"):
        audit(shards, Path("/proc/self"), workers=1)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda values: values["splits"].pop("val"), "has the splits train, test, not train, val, test"),
        (lambda values: values["splits"]["train"]["samples"][0].update(weight=0.0), "the weight 0.0"),
        (lambda values: values["splits"]["train"]["samples"][0].update(weight=-1.0), "the weight -1.0"),
    ],
)
def test_an_index_without_a_split_or_with_a_weight_of_nothing_is_refused(shards, tmp_path, edit, words):
    values = json.loads((shards / "index.json").read_text())
    edit(values)
    (tmp_path / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=words):
        audit(tmp_path, workers=1)


def test_shards_that_may_not_be_read_are_no_damage(shards, tmp_path, monkeypatch):
    def deny(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pipeline.data.storage.os.pread", deny)
    with pytest.raises(UserError, match="cannot be used: Permission denied; check its name, your rights to it"):
        audit(shards, tmp_path, workers=1)
