"""Which shards the audit can read, and where it can write."""

from __future__ import annotations

import json
import os

import pytest

from data_prep.audit import audit
from data_prep.audit import photos as audited
from data_prep.shards import shard
from pipeline.errors import AuditFailed, UserError
from tests.data_prep.photos import city_rows, encode, jpeg, pixels, write_folder


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
    source = tmp_path / "in"
    source.mkdir()
    for split, name, data in (
        ("train", b"\xff00.jpg", jpeg(0)),
        ("test", b"\xff00.jpg", encode(pixels(0), quality=40)),
        ("test", b"01.jpg", jpeg(1)),
    ):
        folder = source / split
        folder.mkdir(exist_ok=True)
        with open(os.fsencode(folder) + b"/" + name, "wb") as stream:
            stream.write(data)
    shard(source, tmp_path / "out", workers=1, splits="random", val_share=0, test_share=0.4)
    make_leak(tmp_path / "out")
    with pytest.raises(AuditFailed) as failed:
        audit(tmp_path / "out", workers=1)
    page = (tmp_path / "out" / "audit" / "audit.html").read_bytes()
    assert rb"\udcff00.jpg" in page
    page.decode("utf-8")
    lines = (tmp_path / "out" / "audit" / "findings.jsonl").read_bytes().decode("ascii").splitlines()
    sources = {photo["source"] for photo in json.loads(lines[0])["photos"]}
    assert sources == {"train/\udcff00.jpg", "test/\udcff00.jpg"}
    assert json.loads(failed.value.summary.read_bytes())["look_alikes"]["count"] == 1
