import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data.lock import LOCK_NAME, locked
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]
HOLD = """if True:
    import os, sys, time
    from pathlib import Path
    from pipeline.data.lock import locked
    with locked(Path(sys.argv[1]), "training it", "leave it"):
        if "fork" not in sys.argv:
            print("held", flush=True)
        elif os.fork() == 0:
            print("held", flush=True)
            time.sleep(60)
        sys.stdin.read()
"""


def hold(folder, *words):
    """A process that holds the lock until its stdin ends."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *words], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_refused_by_its_number_and_host(tmp_path):
    process = hold(tmp_path / "run")
    sentence = rf"^another process \(process {process.pid} on {os.uname().nodename}\) is training it at this moment; "
    with (
        pytest.raises(UserError, match=sentence + "wait for it, or leave it$"),
        locked(tmp_path / "run", "training it", "leave it"),
    ):
        pass
    process.communicate()
    with locked(tmp_path / "run", "training it", "leave it") as held:
        assert held
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [[], ["fork"]])
def test_the_lock_of_a_killed_process_is_free_at_once_even_if_its_children_live(tmp_path, words):
    process = hold(tmp_path / "run", *words)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path / "run", "x", "y"):
        assert (tmp_path / "run" / LOCK_NAME).read_text().split()[1] == str(os.getpid())


def test_a_forked_process_that_leaves_the_block_takes_nothing_with_it(tmp_path):
    with locked(tmp_path / "run", "x", "y"):
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            assert (tmp_path / "run" / LOCK_NAME).exists()
    if not child:
        os._exit(0)  # without an error so far
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_goes_after_an_error_too(tmp_path):
    with pytest.raises(ValueError, match="stop"), locked(tmp_path / "run", "x", "y"):
        raise ValueError("stop")
    assert not (tmp_path / "run").exists()


def test_the_folder_stays_where_something_is_in_it(tmp_path):
    with locked(tmp_path / "run", "x", "y"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_shared_locks_stand_together_and_keep_a_single_owner_out(tmp_path):
    with locked(tmp_path, "x", "y", shared=True), locked(tmp_path, "x", "y", shared=True):
        single = locked(tmp_path, "x", "y")
        with pytest.raises(UserError, match="another process"):
            single.__enter__()
    with locked(tmp_path, "x", "y"):
        pass


def test_a_lock_whose_file_is_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """The owner before removes the file between our opening and locking it: that lock would keep nobody out."""
    flock, removed = fcntl.flock, []

    def late(descriptor, operation):
        if not removed:
            removed.append((tmp_path / LOCK_NAME).unlink())
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path, "x", "y"):
        assert (tmp_path / LOCK_NAME).exists()
        with pytest.raises(UserError, match="another process"), locked(tmp_path, "x", "y"):
            pass


def test_a_folder_that_its_owner_removes_meanwhile_is_made_anew(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def late(descriptor, operation):
        if not removed:
            removed.append(shutil.rmtree(tmp_path / "work"))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / "work", "x", "y"):
        assert (tmp_path / "work" / LOCK_NAME).exists()


def test_a_disk_without_locks_is_said_and_worked_on(tmp_path, monkeypatch, capsys):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path, "training it", "y") as held:
        assert not held
    assert "takes no locks (No locks available): see to it that nothing else is training it" in capsys.readouterr().err


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path, "x", "y"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"
