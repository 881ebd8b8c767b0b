"""A `shard` that is cut off at any moment and started again ends with the bytes of one that was not."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.shards import writer
from data_prep.shards.command import shard
from data_prep.shards.plan import Plan
from data_prep.work.workplace import Workplace
from pipeline.errors import UserError
from pipeline.files import write_json
from tests.data_prep.examples import city_rows, content, encode, pixels, write_folder

ARGUMENTS = {"shard_mb": 0.2, "clusters": 3}
PER_CITY = 30


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Photos that take some milliseconds each."""
    folder = write_folder(tmp_path_factory.mktemp("resume") / "in", city_rows(PER_CITY))
    for seed, path in enumerate(sorted(folder.glob("*.jpg"))):
        path.write_bytes(encode(pixels(seed, 640, 480), quality=90))
    return folder


@pytest.fixture(scope="module")
def whole(source) -> Path:
    out = source.parent / "whole"
    shard(source, out, workers=1, **ARGUMENTS)
    return out


def start(source: Path, out: Path, workers: int = 2) -> subprocess.Popen[bytes]:
    flags = [word for name, value in ARGUMENTS.items() for word in (f"--{name}", str(value))]
    words = ["shard", "--source", str(source), "--out", str(out), "--workers", str(workers), *flags]
    return subprocess.Popen([sys.executable, "-m", "data_prep", *words], stderr=subprocess.PIPE)


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    while not ready():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_killed_while_it_checks_does_not_look_at_the_same_photos_again(source, whole, tmp_path, monkeypatch):
    out, journal = tmp_path / "out", tmp_path / ".out.partial" / "journal.jsonl"
    kill_when(start(source, out), lambda: lines(journal) > 60)
    assert not out.exists()
    with journal.open("ab") as stream:
        stream.write(b'{"key": "torn by a power c')
    known = lines(journal) - 1
    looked_at = []
    from data_prep.shards import intake

    inspect = intake.inspect
    monkeypatch.setattr(intake, "inspect", lambda name, *rest: looked_at.append(name) or inspect(name, *rest))
    shard(source, out, workers=1, **ARGUMENTS)
    assert len(looked_at) == 8 * PER_CITY - known
    assert content(out) == content(whole)


def test_a_run_killed_while_it_writes_does_not_write_finished_tars_again(source, whole, tmp_path, capsys):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    kill_when(start(source, out), lambda: len(list(partial.glob("receipts/*.json"))) >= 5)
    assert not out.exists()
    finished = {path.stem: path for path in partial.glob("receipts/*.json")}
    times = {name: (partial / f"{name}.tar").stat().st_mtime_ns for name in finished}
    shard(source, out, workers=1, **ARGUMENTS)
    assert f"resuming: {len(finished)} of" in capsys.readouterr().err
    assert {name: (out / f"{name}.tar").stat().st_mtime_ns for name in times} == times
    assert content(out) == content(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_byte(source, whole, tmp_path):
    """The moments are shares of the time that an uninterrupted run takes, its start not counted."""
    begun, partial = time.monotonic(), tmp_path / ".timed.partial"
    process = start(source, tmp_path / "timed")
    while not partial.exists():
        time.sleep(0.002)
    first = time.monotonic() - begun
    process.communicate()
    last, chosen = time.monotonic() - begun, random.Random(3)
    out, hidden, kills = tmp_path / "out", tmp_path / ".out.partial", 0
    while kills < 10:
        process, moment = start(source, out), chosen.uniform(0, last - first)
        while not hidden.exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moment / 3)  # it has a third left to do, or less
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if out.exists():  # begin anew, with the next kills
            assert content(out) == content(whole)
            out.rename(tmp_path / f"done-{kills}")
    assert start(source, out).wait() == 0
    assert content(out) == content(whole)


def test_a_tar_that_rotted_before_the_run_went_on_is_written_again(source, whole, tmp_path, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    shard(source, out, plan=True, workers=1, **ARGUMENTS)
    shard(source, out, part="1/2", workers=1, **ARGUMENTS)
    tar = partial / "train-00000.tar"
    data = bytearray(tar.read_bytes())
    data[2000] ^= 1
    tar.write_bytes(bytes(data))
    (partial / "train-00002.tar").unlink()
    shard(source, out, workers=1, **ARGUMENTS)
    assert content(out) == content(whole)


def test_a_run_killed_just_before_the_last_renaming_is_only_published(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(place, tars):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            shard(source, out, workers=1, **ARGUMENTS)
    assert not out.exists()
    Workplace(str(out), None).clear(keep=frozenset(path.name for path in whole.iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.shards.job.take_in", None)  # whoever looks at photos again fails
        shard(source, out, workers=1, **ARGUMENTS)
    assert content(out) == content(whole)


def test_a_plan_of_other_arguments_is_thrown_away_but_what_is_known_of_the_photos_is_not(source, whole, tmp_path):
    out = tmp_path / "out"
    shard(source, out, plan=True, workers=1, seed=5, **ARGUMENTS)
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    before = journal.stat().st_ino, lines(journal)
    shard(source, out, plan=True, workers=1, **ARGUMENTS)
    assert (journal.stat().st_ino, lines(journal)) == before
    shard(source, out, workers=1, **ARGUMENTS)
    assert content(out) == content(whole)


def test_a_photo_that_changed_meanwhile_is_looked_at_again(tmp_path):
    folder = write_folder(tmp_path / "in", city_rows(2, 3))
    shard(folder, tmp_path / "out", plan=True, workers=1)
    (folder / "Oslo-1.jpg").write_bytes(encode(pixels(77)))
    shard(folder, tmp_path / "out", workers=1)
    shard(folder, tmp_path / "fresh", workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_full_disk_is_one_sentence_and_keeps_what_is_done(source, whole, tmp_path, monkeypatch):
    out, partial, written = tmp_path / "out", tmp_path / ".out.partial", []
    write = writer._write

    def full(job):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(job.tar.name)
        write(job)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write", full)
        with pytest.raises(UserError, match="no space is left on the disk"):
            shard(source, out, workers=1, **ARGUMENTS)
    assert len(list(partial.glob("receipts/*.json"))) == 3
    shard(source, out, workers=1, **ARGUMENTS)
    assert content(out) == content(whole)


def test_what_the_disk_cannot_hold_is_not_begun(source, tmp_path, monkeypatch):
    from data_prep.work import workplace

    usage = workplace.shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has 0\.01 GB free and the shards need"):
        shard(source, tmp_path / "out", workers=1, **ARGUMENTS)
    assert not list(tmp_path.glob(".out.partial/*.tar"))


def test_the_summary_counts_what_was_written_before(source, tmp_path):
    out = tmp_path / "out"
    shard(source, out, plan=True, workers=1, **ARGUMENTS)
    summary = json.loads(Path(shard(source, out, workers=1, **ARGUMENTS)).read_text())
    assert summary["written"] == 8 * PER_CITY
    assert sum(values["samples"] for values in summary["splits"].values()) == 8 * PER_CITY


def test_a_plan_keeps_the_keys_by_which_older_and_newer_versions_resume_it(source, tmp_path):
    shard(source, tmp_path / "out", plan=True, workers=1, **ARGUMENTS)
    path = tmp_path / ".out.partial" / "plan.json"
    values = json.loads(path.read_text())
    assert list(values) == [
        "arguments", "version", "source", "source_stamp", "text_encoder", "text_dim", "source_kind", "tars", "clusters",
        "fields", "source_sha256", "rejected", "unknown_words", "summary",
    ]  # fmt: skip
    assert list(values["tars"][0]) == ["name", "split", "samples", "bytes"]
    plan = Plan.from_json(values)
    write_json(path, plan.to_json())
    assert json.loads(path.read_text()) == values
