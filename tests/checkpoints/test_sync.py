"""Copies behind a URL: on a disk, and on a real S3 server that this test starts, stops and starts again."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from pipeline.checkpoints import sync
from pipeline.checkpoints.files import (
    AVERAGE,
    IN_ORDER,
    MARKER,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    check_checkpoint,
)
from pipeline.checkpoints.retention import Retention
from pipeline.checkpoints.sync import Remote, Uploader
from pipeline.config import CheckpointConfig, parse_config
from pipeline.errors import UserError
from tests.checkpoints.examples import Run, names, process_group, write
from tests.checkpoints.s3_server import BUCKET, s3, wait_until  # noqa: F401  (a fixture)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(sync, "FIRST_WAIT_S", 0.05)


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    """An empty place."""
    if request.param == "file":
        return f"file://{tmp_path}/remote"
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/runs/x"


@pytest.fixture
def s3_url(s3):  # noqa: F811
    return f"s3://{BUCKET}/runs/x"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a run, by default always in the same folder."""
    runs = []
    with process_group(tmp_path / "store"):

        def begin(folder="checkpoints", **settings):
            runs.append(Run(tmp_path / folder, monkeypatch, **settings))
            return runs[-1]

        yield begin
        for run in runs:
            run.checkpoints.settings.sync_wait_s = 0
            run.checkpoints.close()


def files(url: str) -> set[str]:
    """All files below a URL."""
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    return {path[len(root) + 1 :] for path in fs.find(root)}


def whole(*steps: int) -> set[str]:
    """The files that these checkpoints make, and the list of names."""
    return {f"step-{step:08d}/{name}" for step in steps for name in IN_ORDER} | {"names.json"}


def lose(folder: Path) -> None:
    """What a machine takes along when it dies."""
    folder.rename(folder.with_name(f"{folder.name}.lost.{time.monotonic_ns()}"))


def test_what_is_synced_is_restored_on_a_machine_that_has_nothing(start, url, tmp_path):
    run = start(sync=url, sync_wait_s=60)
    run.save(1, best=1)
    run.save(2, best=1)
    run.checkpoints.close()
    assert files(url) == whole(1, 2)
    lose(tmp_path / "checkpoints")
    again = start(sync=url)
    assert again.state["step"] == 2
    assert again.holds(2)
    assert again.checkpoints.fetched
    assert again.checkpoints.best_average() is not None  # fetched too, for the best model of the run


def test_resume_takes_the_newer_of_what_is_here_and_there(start, url):
    source = start("a", sync=url, sync_wait_s=60)
    source.save(5)
    source.checkpoints.close()
    run = start("b")
    run.save(3)
    assert start("b", resume=url).state["step"] == 5
    run.save(7)
    again = start("b", resume=url)
    assert again.state["step"] == 7
    assert not again.checkpoints.fetched


def test_retention_there_is_retention_here(start, url):
    run = start(sync=url, sync_wait_s=60, keep=1, keep_every=3)
    for step in range(1, 8):
        run.save(step, best=min(step, 2))
        assert run.checkpoints.uploader.wait(120)
    run.checkpoints.close()
    assert files(url) == whole(2, 3, 6, 7)
    assert fsspec.open(f"{url}/names.json").open().read().split() == (
        b'{ "last": "step-00000007", "best": "step-00000002" }'.split()
    )


def test_a_save_never_waits_for_the_upload_and_the_newest_goes_first(start, tmp_path, monkeypatch):
    gate, order = threading.Event(), []
    real = Remote.upload

    def slow(remote, path):
        order.append(path.name)
        assert gate.wait(120)
        real(remote, path)

    monkeypatch.setattr(Remote, "upload", slow)
    run = start(sync=f"file://{tmp_path}/remote", sync_wait_s=60, keep=2)
    run.save(1)
    wait_until(lambda: order)
    for step in (2, 3, 4):
        run.save(step)  # would hang here
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000003", "step-00000004"]  # 1 is under way
    gate.set()
    run.checkpoints.close()
    assert order == ["step-00000001", "step-00000004", "step-00000003"]


def test_no_upload_begins_while_old_checkpoints_are_removed(tmp_path, monkeypatch):
    began = threading.Event()
    monkeypatch.setattr(Remote, "upload", lambda remote, path: began.set())
    write(tmp_path / "checkpoints", 1)
    uploader = Uploader(Remote(f"file://{tmp_path}/remote"), tmp_path / "checkpoints", Retention(2, 0))
    with uploader.holding() as busy:
        assert not busy
        uploader.start(new=False)
        assert not began.wait(0.5)
    assert began.wait(120)
    uploader.close(120)


@pytest.mark.parametrize("at", [OPTIMIZER, STATE, MARKER])
def test_an_upload_that_is_cut_off_is_not_taken_and_is_completed_later(start, url, tmp_path, monkeypatch, capsys, at):
    first = start(sync=url, sync_wait_s=60)
    first.save(1)
    first.checkpoints.close()
    real = sync._put

    def fail(there, path, entry):
        if path.name == at:
            raise UserError("the cable was pulled")
        real(there, path, entry)

    with monkeypatch.context() as patch:
        patch.setattr(sync, "_put", fail)
        patch.setattr(sync, "ATTEMPTS", 2)
        run = start(sync=url, sync_wait_s=60)
        run.save(2)
        run.checkpoints.close()
    told = capsys.readouterr().err
    assert "the upload of checkpoints waits for the next one: the cable was pulled" in told
    assert f"not in {url}: step-00000002" in told
    assert not {"step-00000002/complete.json"} & files(url)
    assert start("elsewhere", resume=url).state["step"] == 1
    assert "step-00000002 is damaged (complete.json is missing)" in capsys.readouterr().err
    later = start(sync=url, sync_wait_s=60)
    assert later.state["step"] == 2
    later.checkpoints.close()
    assert files(url) == whole(1, 2)
    assert start("third", resume=url).state["step"] == 2


def test_a_server_that_goes_away_and_comes_back_is_waited_for(start, s3, s3_url, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(sync, "ATTEMPTS", 30)
    monkeypatch.setattr(sync, "LONGEST_WAIT_S", 0.2)
    run = start(sync=s3_url, sync_wait_s=60)
    real, away = sync._put, threading.Event()

    def cut(there, path, entry):
        if path.name == AVERAGE and not away.is_set():
            s3.stop()
            away.set()
        real(there, path, entry)

    monkeypatch.setattr(sync, "_put", cut)
    run.save(1)
    assert away.wait(120)
    run.save(2)  # while nothing answers
    s3.start()
    run.checkpoints.close()
    assert files(s3_url) == whole(1, 2)
    lose(tmp_path / "checkpoints")
    assert start(resume=s3_url).state["step"] == 2


def test_the_end_waits_for_a_bounded_time_and_says_what_is_missing(start, s3, s3_url, capsys):  # noqa: F811
    run = start(sync=s3_url, sync_wait_s=0.5)
    s3.stop()
    run.save(1)
    started = time.monotonic()
    run.checkpoints.close()
    assert time.monotonic() - started < 5
    assert f"not in {s3_url} after 0.5 s: step-00000001; the same command" in capsys.readouterr().err
    s3.start()


KILLED = """
import sys, time
from pathlib import Path
from pipeline.checkpoints import sync
from pipeline.checkpoints.retention import Retention
folder, url = sys.argv[1:]
real = sync._put
def put(there, path, entry):
    if path.name == "average.safetensors":
        print("half", flush=True)
        time.sleep(600)
    real(there, path, entry)
sync._put = put
uploader = sync.Uploader(sync.Remote(url), Path(folder), Retention(2, 0))
uploader.start(new=False)
uploader.close(600)
"""


@pytest.mark.dist
def test_a_process_that_is_killed_while_it_uploads_leaves_nothing_that_looks_whole(s3_url, tmp_path):
    here = tmp_path / "checkpoints"
    (path,) = write(here, 1)
    words = [sys.executable, "-c", KILLED, str(here), s3_url]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert f"step-00000001/{WEIGHTS}" in files(s3_url)
    assert Remote(s3_url).fetch_newest(tmp_path / "elsewhere", -1) is None
    uploader = Uploader(Remote(s3_url), here, Retention(2, 0))
    uploader.start(new=False)
    uploader.close(60)
    assert Remote(s3_url).fetch_newest(tmp_path / "elsewhere", -1) == path.name
    check_checkpoint(tmp_path / "elsewhere" / path.name)


def test_what_arrives_changed_is_sent_again(tmp_path, monkeypatch):
    url = f"file://{tmp_path}/remote"
    (path,) = write(tmp_path / "here", 1)
    real, spoilt = sync._entry, []

    def spoil(there, name):
        file = tmp_path / "remote" / path.name / name
        if name == WEIGHTS and file.exists() and not spoilt:
            spoilt.append(file.write_bytes(b"?" * file.stat().st_size))
        return real(there, name)

    monkeypatch.setattr(sync, "_entry", spoil)
    with pytest.raises(UserError, match=r"weights\.safetensors is not what was uploaded"):
        Remote(url).upload(path)
    Remote(url).upload(path)
    check_checkpoint(tmp_path / "remote" / path.name)


def test_a_damaged_one_there_is_named_and_the_one_before_it_taken(start, tmp_path, capsys):
    url = f"file://{tmp_path}/remote"
    run = start(sync=url, sync_wait_s=60)
    run.save(1)
    run.save(2)
    run.checkpoints.close()
    path = tmp_path / "remote" / "step-00000002" / AVERAGE
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert start("elsewhere", resume=url).state["step"] == 1
    assert f"checkpoint {url}/step-00000002 is damaged (average.safetensors has another" in capsys.readouterr().err


def test_a_url_that_leads_nowhere_ends_a_new_run_and_not_one_that_goes_on(start, s3, capsys):  # noqa: F811
    nowhere = "s3://no-such-bucket/x"
    with pytest.raises(UserError, match=nowhere):
        start(sync=nowhere)
    run = start()
    run.save(1)
    assert start(sync=nowhere).state["step"] == 1
    with pytest.raises(UserError, match="nonsense"):
        start(resume="nonsense://bucket")


def test_what_is_ahead_of_the_run_and_what_is_not_a_checkpoint_stays(start, tmp_path):
    url, there = f"file://{tmp_path}/remote", tmp_path / "remote"
    write(there, 90)
    (there / "step-00000001").mkdir()
    (there / "step-00000001" / "notes.txt").write_text("mine")
    run = start(sync=url, sync_wait_s=60, keep=1, resume=f"file://{tmp_path}/empty")
    for step in (1, 2):
        run.save(step)
        assert run.checkpoints.uploader.wait(120)
    run.checkpoints.close()
    assert "step-00000001/notes.txt" in files(url)
    assert {name for name in files(url) if name.endswith(MARKER)} >= {f"step-{step:08d}/{MARKER}" for step in (2, 90)}


def test_secrets_are_refused_where_they_would_be_written_down():
    for key in ("sync", "resume"):
        for secret in ("s3://key:hunter2@bucket/x", "https://store/x?X-Amz-Signature=hunter2"):
            with pytest.raises(UserError, match=f"checkpoint.{key} has a password or a signature") as refusal:
                CheckpointConfig(**{key: secret})
            assert "hunter2" not in str(refusal.value)
    with pytest.raises(UserError, match=r"checkpoint\.sync is 'bucket/x', but must be a URL"):
        CheckpointConfig(sync="bucket/x")


def test_the_secret_key_is_in_no_file_and_no_line(start, s3_url, tmp_path, capsys):
    run = start(sync=s3_url, sync_wait_s=60)
    run.save(1)
    run.checkpoints.close()
    assert not any(b"a-secret-key" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "a-secret-key" not in capsys.readouterr().err


def test_resume_is_a_short_form():
    config, _ = parse_config(["--resume", "s3://bucket/x"], "train")
    assert config.checkpoint.resume == "s3://bucket/x"
