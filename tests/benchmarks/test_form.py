"""The form of all benchmarks: ratios, intervals, turns, one core, JSON."""

import json
import os
import re
import threading
import time
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from benchmarks import form
from benchmarks.form import Goal, Report, compare, interleave, machine, one_core, publish, ratio_interval, timed

ROW_KEYS = ["what", "against", "ours", "theirs", "unit", "ratio", "interval", "goal", "met", "note"]


def report() -> Report:
    rows = (
        compare("reading", "tarfile", [1200.0, 1300.0], [400.0, 400.0], "images/s", Goal(1.5), "both check SHA-256"),
        compare("step", "bare loop", [1.21, 1.2], [1.0, 1.1], "s", Goal(1.05, at_most=True)),
        compare("size", "weights", [10.0, 10.0], [8.0, 8.0], "MB"),
    )
    return Report("loader", {"name": "cpu-2core-x86_64", "cpu": "a CPU"}, {"numpy": "2.0"}, 7, rows)


def test_a_constant_ratio_is_certain_however_much_the_rounds_differ():
    ratio, (low, high) = ratio_interval([2.0, 20.0, 6.0], [1.0, 10.0, 3.0])
    assert (ratio, low, high) == pytest.approx((2.0, 2.0, 2.0))


def test_the_interval_is_that_of_the_paired_t_test_on_logarithms():
    generator = np.random.default_rng(3)
    ours, theirs = generator.lognormal(1.0, 0.2, 7), generator.lognormal(0.5, 0.3, 7)
    paired = stats.ttest_rel(np.log(ours), np.log(theirs)).confidence_interval(0.95)
    ratio, interval = ratio_interval(ours.tolist(), theirs.tolist())
    assert interval == pytest.approx((np.exp(paired.low), np.exp(paired.high)))
    assert ratio == pytest.approx(np.prod(ours / theirs) ** (1 / 7))


def test_the_ratio_of_a_row_is_that_of_its_two_sides():
    row = compare("reading", "tarfile", [3.0, 12.0], [2.0, 8.0], "images/s")
    assert row.ours == pytest.approx(6.0)
    assert row.theirs == pytest.approx(4.0)
    assert row.ratio == pytest.approx(1.5)
    assert (row.goal, row.met) == (None, None)


@pytest.mark.parametrize(
    ("goal", "low", "high", "met"),
    [
        (Goal(1.5), 1.5, 2.0, True),
        (Goal(1.5), 1.4, 2.0, False),
        (Goal(1.05, at_most=True), 0.9, 1.05, True),
        (Goal(1.05, at_most=True), 0.9, 1.06, False),
    ],
)
def test_a_goal_is_met_by_a_whole_interval_only(goal, low, high, met):
    assert goal.met_by(low, high) is met


def test_goals_say_which_side_is_good():
    assert [row.goal for row in report().rows] == [">= 1.5", "<= 1.05", None]
    assert [row.met for row in report().rows] == [True, False, None]


def test_arms_take_turns_and_no_arm_always_follows_the_same_one():
    calls: list[str] = []

    def arm(name: str):
        return lambda: calls.append(name) or calls.count(name)

    results = interleave({name: arm(name) for name in "abc"}, rounds=6, seed=1)
    rounds = [tuple(calls[start : start + 3]) for start in range(0, 18, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) > 2
    assert results == {name: [1, 2, 3, 4, 5, 6] for name in "abc"}
    first = calls.copy()
    calls.clear()
    interleave({name: arm(name) for name in "abc"}, rounds=6, seed=1)
    assert calls == first


def test_waiting_takes_the_wall_clock_but_no_core():
    timing = timed(lambda: time.sleep(0.2))
    assert timing.wall_s >= 0.2
    assert timing.core_s < 0.1


def test_one_core_holds_threads_that_were_there_before_and_lets_go_afterwards():
    before, seen, go, done = os.sched_getaffinity(0), [], threading.Event(), threading.Event()

    def look():
        go.wait(10)
        seen.append(os.sched_getaffinity(threading.get_native_id()))
        done.set()

    thread = threading.Thread(target=look)
    thread.start()
    with one_core():
        go.set()
        assert done.wait(10)
        seen.append(os.sched_getaffinity(0))
    thread.join()
    assert seen == [{max(before)}] * 2
    assert os.sched_getaffinity(0) == before


def test_the_machine_has_a_name_for_files():
    found = machine()
    assert re.fullmatch(r"[a-z0-9_-]+", found["name"])
    assert {"name", "cpu", "cores", "memory_gb", "gpus"} <= set(found)


def test_the_json_has_the_common_form_and_comes_back_as_it_was(tmp_path):
    path = publish(report(), tmp_path, quick=False)
    assert path == tmp_path / "loader.json"
    values = json.loads(path.read_text())
    assert list(values) == ["name", "machine", "versions", "seed", "rows", "module"]
    assert [list(row) for row in values["rows"]] == [ROW_KEYS] * 3
    assert form.read_report(path) == report()


def test_without_a_folder_a_full_run_is_a_result_and_a_quick_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(form, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    assert publish(report(), None, quick=False) == tmp_path / "results" / "cpu-2core-x86_64-loader.json"
    assert publish(report(), None, quick=True) == tmp_path / "runs" / "benchmarks" / "loader.json"


def test_the_table_shows_every_row_and_its_note_on_stderr(capsys):
    form.print_table(report())
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("1,249", "3.12 (1.88 to 5.19)", ">= 1.5", "yes", "<= 1.05", "no", "tarfile: both check SHA-256"):
        assert text in captured.err
    assert asdict(report())["rows"][0]["note"] == "both check SHA-256"
