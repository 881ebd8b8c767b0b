"""The command `shard` with broken input, kills and old output: nothing is lost, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards import job
from data_prep.shards.command import shard
from data_prep.work.workplace import Workplace
from pipeline.data.index import read_index
from pipeline.errors import UserError
from tests.data_prep.examples import (
    city_rows,
    content,
    encode,
    jpeg,
    pixels,
    read,
    write_folder,
    write_table,
)


def test_a_finished_folder_is_kept_when_only_the_files_times_changed(tmp_path):
    source = write_folder(tmp_path / "in", city_rows(2, 3))
    shard(source, tmp_path / "out", workers=1)
    before = content(tmp_path / "out")
    (source / "Oslo-0.jpg").touch()
    shard(source, tmp_path / "out", workers=1)
    assert content(tmp_path / "out") == before
    (source / "Oslo-0.jpg").write_bytes(jpeg(99))
    with pytest.raises(UserError, match="holds shards of other photos or masks"):
        shard(source, tmp_path / "out", workers=1)
    assert content(tmp_path / "out") == before
    assert not list(tmp_path.glob(".*partial*"))


def test_other_content_is_never_overwritten(tmp_path):
    source = write_folder(tmp_path / "in", city_rows(1, 3))
    shard(source, tmp_path / "out", workers=1)
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match="made with --seed 0, not 3"):
        shard(source, tmp_path / "out", workers=1, seed=3)
    assert content(tmp_path / "out") == before
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no finished shards"):
        shard(source, tmp_path / "book", workers=1)
    assert (tmp_path / "book" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("train-00000.tar", "damaged"),
        ("summary.json", "no finished"),
        ("index.json", "no finished"),
    ],
)
def test_a_damaged_folder_is_not_taken_for_finished(tmp_path, name, sentence):
    source = write_folder(tmp_path / "in", city_rows(1, 3))
    shard(source, tmp_path / "out", workers=1)
    (tmp_path / "out" / name).unlink()
    with pytest.raises(UserError, match=sentence):
        shard(source, tmp_path / "out", workers=1)


def test_faults_are_counted_rejects_and_the_rest_is_written(tmp_path):
    rows = city_rows(3, 4)
    source = write_folder(tmp_path / "in", rows)
    whole = jpeg(50)
    (source / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "empty.jpg").write_bytes(b"")
    (source / "tiny.jpg").write_bytes(encode(np.zeros((1, 1, 3), dtype=np.uint8)))
    (source / "really.jpg").write_bytes(encode(pixels(51), "PNG"))
    (source / "Ünïcode 東京.jpg").write_bytes(jpeg(52))
    (source / "unsure.jpg").write_bytes(jpeg(53))
    (source / "no-row.jpg").write_bytes(jpeg(54))
    names = [
        "truncated.jpg",
        "empty.jpg",
        "tiny.jpg",
        "really.jpg",
        "Ünïcode 東京.jpg",
        "gone.jpg",
        rows[0]["file_name"],
    ]
    rows += [{"file_name": name, "label": "1", "gps": "nan", "city_name": ""} for name in names]
    rows.append({"file_name": "unsure.jpg", "label": "maybe"})
    write_table(source / "metadata.csv", rows)
    summary = json.loads(shard(source, tmp_path / "out", workers=1).read_text())
    assert summary["rejected"] == {
        "cannot be decoded": 1,
        "the file is empty": 1,
        "a side is under 32 px": 1,
        "the photo is missing": 1,
        "an earlier row names the same photo": 1,
        "label 'maybe' is not 0 or 1": 1,
        "no row in metadata.csv": 1,
    }
    assert (summary["inputs"], summary["written"]) == (21, 14)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {(r["path"], r["stage"]) for r in rejects} == {
        ("truncated.jpg", "decode"),
        ("empty.jpg", "decode"),
        ("tiny.jpg", "decode"),
        ("gone.jpg", "source"),
        (rows[0]["file_name"], "source"),
        ("unsure.jpg", "metadata"),
        ("no-row.jpg", "source"),
    }
    index = read_index(tmp_path / "out")
    assert index.rejected == summary["rejected"]
    written = {r.source: members for samples in read(tmp_path / "out", index).values() for r, members in samples}
    assert written["really.jpg"]["png"] == (source / "really.jpg").read_bytes()
    assert "Ünïcode 東京.jpg" in written


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"file_name": "gone.jpg"}], "nothing to write: 1 of 2 inputs|nothing to write: 2 of 2 inputs"),
        ([{"file_name": "a.jpg", "label": "maybe"}], "column 'label': label 'maybe' is not 0 or 1"),
    ],
)
def test_a_table_of_which_nothing_is_usable_is_the_users_mistake(tmp_path, rows, sentence):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg(0))
    write_table(tmp_path / "in" / "metadata.csv", rows)
    with pytest.raises(UserError, match=sentence):
        shard(tmp_path / "in", tmp_path / "out", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("limit", "stops"), [(0, True), (0.1, True), (1, True), (2, False), (0.5, False), (None, False)]
)
def test_too_many_rejects_stop_the_run(tmp_path, limit, stops):
    source = write_folder(tmp_path / "in", city_rows(2, 2))
    for name in ("Oslo-0.jpg", "Lyon-1.jpg"):
        (source / name).write_bytes(b"")
    if stops:
        with pytest.raises(UserError, match="--max_rejects"):
            shard(source, tmp_path / "out", workers=1, max_rejects=limit)
        # What was found out is kept for the next try, with another limit.
        assert [path.name for path in (tmp_path / ".out.partial").iterdir()] == ["journal.jsonl"]
    else:
        shard(source, tmp_path / "out", workers=1, max_rejects=limit)


@pytest.mark.parametrize(
    "wrong",
    [
        {"val_share": -0.1},
        {"val_share": 0.5, "test_share": 0.5},
        {"distance_m": -1},
        {"clusters": -1},
        {"temper": 1.5},
        {"balance": -0.1},
        {"shard_mb": 0},
        {"seed": -1},
        {"workers": -1},
        {"max_rejects": -1},
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        shard(tmp_path, tmp_path / "out", **wrong)


def start_shard(source: Path, out: Path) -> subprocess.Popen[bytes]:
    words = ["shard", "--source", str(source), "--out", str(out), "--workers", "1", "--shard_mb", "0.05"]
    return subprocess.Popen([sys.executable, "-m", "data_prep", *words], stderr=subprocess.PIPE)


def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_one_repairs_it(tmp_path):
    source, out = write_folder(tmp_path / "in", city_rows(40)), tmp_path / "out"
    process = start_shard(source, out)
    partial = tmp_path / ".out.partial"
    while not list(partial.glob("*.tar")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial / "train-99999.tar").write_bytes(b"of a run with other arguments")
    assert not out.exists()
    shard(source, out, workers=1, shard_mb=0.05)
    assert not partial.exists()
    shard(source, tmp_path / "again", workers=1, shard_mb=0.05)
    assert content(out) == content(tmp_path / "again")


def test_an_output_inside_the_source_is_refused(tmp_path):
    source = write_folder(tmp_path / "in", city_rows(1, 3))
    for out in (source, source / "shards", source / ".." / "in" / "shards"):
        with pytest.raises(UserError, match="lies inside --source"):
            shard(source, out, workers=1)


def test_two_runs_of_one_folder_do_not_meet(tmp_path):
    source = write_folder(tmp_path / "in", city_rows(1, 3))
    sentence = rf"another process \(process {os.getpid()} on .*\) is writing {tmp_path}/out at this moment"
    with Workplace(str(tmp_path / "out"), None).locked(), pytest.raises(UserError, match=sentence):
        shard(source, tmp_path / "out", workers=1)
    shard(source, tmp_path / "out", workers=1)


def test_a_mask_that_changes_between_the_passes_stops_the_run(tmp_path, monkeypatch):
    rows = [{**row, "mask": "m.png"} if row["file_name"] == "Oslo-0.jpg" else row for row in city_rows(1, 3)]
    source = write_folder(tmp_path / "in", rows)
    mask = np.full((64, 96), 2, dtype=np.uint8)
    (source / "m.png").write_bytes(encode(mask, "PNG"))
    shard(source, tmp_path / "out", plan=True, workers=1)
    decide = job.decide

    def change_the_mask(*arguments):
        (source / "m.png").write_bytes(encode(mask + 1, "PNG"))
        return decide(*arguments)

    (source / "m.png").touch()
    monkeypatch.setattr(job, "decide", change_the_mask)
    with pytest.raises(UserError, match=r"the mask of Oslo-0\.jpg changed while"):
        shard(source, tmp_path / "out", workers=1)


def test_a_damaged_summary_is_one_sentence(tmp_path):
    source = write_folder(tmp_path / "in", city_rows(1, 3))
    shard(source, tmp_path / "out", workers=1)
    for text in ("{", "[]", "{}"):
        (tmp_path / "out" / "summary.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            shard(source, tmp_path / "out", workers=1)


def test_a_photo_that_changes_between_the_passes_stops_the_run(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "in", city_rows(1, 3))
    decide = job.decide

    def change_a_photo(*arguments):
        (source / "Oslo-0.jpg").write_bytes(jpeg(77))
        return decide(*arguments)

    monkeypatch.setattr(job, "decide", change_a_photo)
    with pytest.raises(UserError, match=r"Oslo-0\.jpg changed while"):
        shard(source, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
