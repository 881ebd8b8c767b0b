"""`shard --plan`, `--part` and `merge`: the same bytes as in one go, whoever writes which tar."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from data_prep.shards.command import shard
from data_prep.shards.merge import merge
from data_prep.sources.content import Location
from data_prep.work.workplace import Workplace
from pipeline.errors import UserError
from tests.data_prep.examples import city_rows, content, jpeg, write_folder

SMALL = {"shard_mb": 0.02, "clusters": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("parts") / "in", city_rows(5))


@pytest.fixture(scope="module")
def whole(source) -> Path:
    out = source.parent / "whole"
    shard(source, out, workers=1, **SMALL)
    return out


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_does_not_change_a_byte(source, whole, tmp_path, workers):
    shard(source, tmp_path / "out", workers=workers, **SMALL)
    assert content(tmp_path / "out") == content(whole)


@pytest.mark.parametrize("work", [None, "elsewhere"])
def test_three_parts_in_any_order_and_a_merge_give_the_bytes_of_one_run(source, whole, tmp_path, work):
    at = {"work": tmp_path / work} if work else {}
    planned = shard(source, tmp_path / "out", plan=True, workers=1, **SMALL, **at)
    assert json.loads(Path(planned).read_text())["inputs"] == 40
    for part in ("2/3", "3/3", "1/3"):
        shard(source, tmp_path / "out", part=part, workers=1, **SMALL, **at)
    assert merge(tmp_path / "out", **at) == tmp_path / "out" / "summary.json"
    assert content(tmp_path / "out") == content(whole)
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path.name not in ("out", work)]
    merge(tmp_path / "out", **at)  # once more does no harm
    assert content(tmp_path / "out") == content(whole)


def test_a_merge_before_the_last_part_says_which_tars_are_missing_and_loses_none(source, whole, tmp_path):
    shard(source, tmp_path / "out", plan=True, workers=1, **SMALL)
    shard(source, tmp_path / "out", part="1/2", workers=1, **SMALL)
    with pytest.raises(UserError, match=r"tars are not there yet \(train-00001"):
        merge(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shard(source, tmp_path / "out", part="2/2", workers=1, **SMALL)
    merge(tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


def test_a_part_of_other_arguments_or_without_a_plan_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="give this command with --plan"):
        shard(source, tmp_path / "out", part="1/2", **SMALL)
    shard(source, tmp_path / "out", plan=True, workers=1, **SMALL)
    with pytest.raises(UserError, match="no plan of these arguments"):
        shard(source, tmp_path / "out", part="1/2", seed=9, **SMALL)


def test_a_tar_that_vanished_after_it_was_written_is_missed_by_the_merge(source, tmp_path):
    at = {"work": tmp_path / "work"}
    shard(source, tmp_path / "out", plan=True, workers=1, **SMALL, **at)
    shard(source, tmp_path / "out", part="1/1", workers=1, **SMALL, **at)
    next(tmp_path.glob("work/*/train-00001.tar")).unlink()
    with pytest.raises(UserError, match=r"1 of \d tars are not there yet \(train-00001"):
        merge(tmp_path / "out", **at)
    shard(source, tmp_path / "out", part="1/1", workers=1, **SMALL, **at)
    merge(tmp_path / "out", **at)


def test_parts_of_one_output_are_not_merged_into_another(source, tmp_path):
    at = {"work": tmp_path / "work"}
    shard(source, f"file://{tmp_path}/a", plan=True, workers=1, **SMALL, **at)
    shard(source, f"file://{tmp_path}/a", part="1/1", workers=1, **SMALL, **at)
    with pytest.raises(UserError, match="nothing to merge"):
        merge(f"file://{tmp_path}/b", **at)
    assert not (tmp_path / "b").exists()


def test_whatever_else_is_in_the_work_folder_stays(source, whole, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    for name in ("a", "b"):
        shard(source, tmp_path / name / "out", work=tmp_path / "precious", workers=1, **SMALL)
        assert content(tmp_path / name / "out") == content(whole)
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("work", [".", "inside"])
def test_work_inside_the_source_is_refused_and_the_photos_stay(source, tmp_path, work):
    before = sorted(source.iterdir())
    with pytest.raises(UserError, match="lies inside --source"):
        shard(source, tmp_path / "out", work=source / work, **SMALL)
    assert sorted(source.iterdir()) == before


def test_plan_and_part_exclude_each_other(source, tmp_path):
    with pytest.raises(UserError, match="absent with --plan"):
        shard(source, tmp_path / "out", plan=True, part="1/2", **SMALL)


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/", "-1/2"])
def test_a_part_that_is_none_is_the_users_mistake(source, tmp_path, part):
    with pytest.raises(UserError, match="--part"):
        shard(source, tmp_path / "out", part=part, **SMALL)


def test_nothing_to_merge_is_said(tmp_path):
    with pytest.raises(UserError, match="nothing to merge"):
        merge(tmp_path / "out")


def test_parts_may_run_at_once_but_not_beside_a_merge(source, tmp_path):
    shard(source, tmp_path / "out", plan=True, workers=1, **SMALL)
    place = Workplace(str(tmp_path / "out"), None)
    with place.locked(shared=True):
        shard(source, tmp_path / "out", part="1/1", workers=1, **SMALL)
        with pytest.raises(UserError, match=r"another process .* is writing"):
            merge(tmp_path / "out")
    merge(tmp_path / "out")


def test_a_url_gets_the_bytes_of_a_folder_and_is_kept_when_finished(source, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    url = f"file://{tmp_path}/bucket/shards"
    assert shard(source, url, workers=2, **SMALL) == f"{url}/summary.json"
    assert content(tmp_path / "bucket" / "shards") == content(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["bucket"]
    shard(source, url, workers=1, **SMALL)
    assert "finished already" in capsys.readouterr().err
    (source / "Oslo-0.jpg").touch()
    shard(source, url, workers=1, **SMALL)
    assert "the same photos" in capsys.readouterr().err
    with pytest.raises(UserError, match="made with --seed 0, not 4"):
        shard(source, url, workers=1, seed=4, **SMALL)
    assert content(tmp_path / "bucket" / "shards") == content(whole)


def test_parts_meet_at_a_url(source, whole, tmp_path):
    url, work = f"file://{tmp_path}/bucket", tmp_path / "work"
    shard(source, url, work=work, plan=True, workers=1, **SMALL)
    for part in ("1/2", "2/2"):
        shard(source, url, work=work, part=part, workers=1, **SMALL)
    assert not (tmp_path / "bucket" / "index.json").exists()
    merge(url, work=work)
    assert content(tmp_path / "bucket") == content(whole)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no second file system")
def test_work_on_another_disk_is_copied_over_at_the_end(source, whole, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert Path(other).stat().st_dev != tmp_path.stat().st_dev
        shard(source, tmp_path / "out", work=Path(other) / "work", workers=1, **SMALL)
        assert not list((Path(other) / "work").iterdir())
    assert content(tmp_path / "out") == content(whole)


def test_a_photo_that_changes_while_it_is_read_stops_its_part(tmp_path, monkeypatch):
    source, real = write_folder(tmp_path / "in", city_rows(2, 3)), Location.read
    shard(source, tmp_path / "out", plan=True, workers=1)

    def read(location):
        if location.path.endswith("Oslo-0.jpg"):
            Path(location.path).write_bytes(jpeg(9))
        return real(location)

    monkeypatch.setattr(Location, "read", read)
    with pytest.raises(UserError, match=r"Oslo-0\.jpg changed"):
        shard(source, tmp_path / "out", part="1/1", workers=1)


def test_a_photo_that_changed_after_the_plan_stops_its_part(tmp_path):
    source = write_folder(tmp_path / "in", city_rows(2, 3))
    shard(source, tmp_path / "out", plan=True, workers=1)
    stat = (source / "Oslo-0.jpg").stat()
    data = bytearray((source / "Oslo-0.jpg").read_bytes())
    data[-3] ^= 1
    (source / "Oslo-0.jpg").write_bytes(bytes(data))
    os.utime(source / "Oslo-0.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time, other bytes
    with pytest.raises(UserError, match=r"Oslo-0\.jpg changed"):
        shard(source, tmp_path / "out", part="1/1", workers=1)
    (source / "Oslo-0.jpg").write_bytes(jpeg(0))
