"""Work spread over processes: order, small work without processes, and a word where their start takes long."""

from __future__ import annotations

import os
import sys
import time

import pytest

from data_prep.shards import job
from data_prep.shards.command import shard
from data_prep.work import parallel
from data_prep.work.parallel import Workers
from tests.data_prep.examples import jpeg


def pid_of(item: int) -> tuple[int, int]:
    time.sleep(0.01 * (item % 3))
    return item, os.getpid()


def imported(name: str) -> bool:
    return name in sys.modules


@pytest.mark.parametrize(("items", "alone_up_to", "alone"), [(3, 3, True), (4, 3, False), (1, 0, False), (0, 0, True)])
def test_few_items_are_done_by_this_process_and_all_in_order(items, alone_up_to, alone):
    with Workers(2) as pool:
        results = list(pool.map(pid_of, iter(range(items)), alone_up_to))
    assert results == [(item, (item, pid)) for item, (_, pid) in enumerate(result for _, result in results)]
    assert {pid == os.getpid() for _, (_, pid) in results} <= {alone}


def test_no_process_is_started_before_it_is_needed(monkeypatch):
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("a pool was started"))
    with Workers(2) as pool:
        assert len(list(pool.map(pid_of, range(3), alone_up_to=3))) == 3


def test_items_are_not_all_taken_at_once():
    taken = []
    with Workers(1) as pool:
        results = pool.map(pid_of, (taken.append(item) or item for item in range(100)), alone_up_to=8)
        next(results)
    assert len(taken) <= 9


def test_preloaded_modules_are_there_in_every_process():
    with Workers(2, preload=("colorsys",)) as pool:
        assert all(there for _, there in pool.map(imported, ["colorsys"] * 4))


@pytest.mark.parametrize(("start_s", "said"), [(1.0, True), (0.0, False)])
def test_a_start_that_takes_long_says_so(start_s, said, monkeypatch, capsys):
    usual = Workers._start
    monkeypatch.setattr(Workers, "_start", lambda workers, pool: (time.sleep(start_s), usual(workers, pool)))
    monkeypatch.setattr(parallel, "LATE_S", 0.3 if said else 60.0)
    with Workers(2) as pool:
        assert len(list(pool.map(pid_of, range(2)))) == 2
    assert ("starting 2 processes; they import their libraries first" in capsys.readouterr().err) is said


def test_the_workers_of_shard_share_the_import_of_all_that_they_use(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(0))
    found: list[str] = []
    monkeypatch.setattr(job, "Workers", lambda count, preload: found.extend(preload) or Workers(1))
    shard(tmp_path / "photos", tmp_path / "out")
    assert {"data_prep.shards.intake", "data_prep.shards.writer", "scipy.fft"} <= set(found)
