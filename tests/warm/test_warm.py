"""A process of the warm Python is like one of a new Python; each test runs both."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.warm import python

ABOUT = """
import json, os, resource, sys, torch
from huggingface_hub import constants
found = [sys.argv, os.getcwd(), sys.path[0], os.environ.get("MARK"), torch.get_num_threads(), __name__]
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
print(json.dumps([*found, constants.HF_HUB_OFFLINE, limit, os.getpid() == os.getsid(0)]))
"""

WAITS = """
import time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    exit(3)
"""
# A signal that is ignored at first does nothing, and arrives once the process listens to it.
LISTENS = """
import signal, sys, time
ignored = signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
signal.raise_signal(signal.SIGUSR2)
signal.signal(signal.SIGUSR2, lambda number, frame: sys.exit(4))
print("ignored", ignored, flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["new", "warm"])
def program(request):
    """A Python to start."""
    return sys.executable if request.param == "new" else python()


def run(program, *words, **options):
    return subprocess.run([program, *words], capture_output=True, text=True, check=False, **options)


def test_it_has_the_words_folder_environment_limits_and_threads_that_it_is_given(program, tmp_path):
    (tmp_path / "folder").mkdir()
    script = tmp_path / "folder" / "script.py"
    script.write_text(ABOUT)
    (tmp_path / "module.py").write_text(ABOUT)
    environment = {**os.environ, "MARK": "here", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    limit = (10**6, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    expected = {
        "-c": (["-c", "a"], "", ["-c", ABOUT, "a"]),
        "-m": ([str(tmp_path / "module.py"), "a"], str(tmp_path), ["-m", "module", "a"]),
        "file": (["folder/script.py", "a"], str(tmp_path / "folder"), ["-u", "folder/script.py", "a"]),
    }
    for argv, first, words in expected.values():
        done = run(
            program, *words, cwd=tmp_path, env=environment, start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        )  # fmt: skip
        assert json.loads(done.stdout) == [argv, str(tmp_path), first, "here", 2, "__main__", True, list(limit), True]


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("", 0, ""),
        ("raise SystemExit(75)", 75, ""),
        ("raise SystemExit('no such run')", 1, "no such run"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", -6, ""),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"),
        ("import atexit, sys; atexit.register(print, 'the end', file=sys.stderr)", 0, "the end"),
    ],
)
def test_its_end_is_the_same(program, code, status, said):
    done = run(program, "-c", code)
    assert done.returncode == status
    assert said in done.stderr


def test_signals_arrive(program):
    code = (
        "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    exit(3)"
    )
    with subprocess.Popen([program, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 3
    words = ["sh", "-c", "trap '' USR2; exec \"$@\"", "sh", program, "-c", LISTENS]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ignored True\n"
        process.send_signal(signal.SIGUSR2)
        assert process.wait(timeout=30) == 4


def test_it_ends_when_it_is_killed(program):
    code = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    with subprocess.Popen([program, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        identity = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(identity):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_variables_that_libraries_read_while_they_are_imported_make_it_start_anew():
    done = run(
        python(), "-c", "import sys; print('torch' in sys.modules, sys.executable)", env={**os.environ, "HF_HOME": "x"}
    )
    assert done.stdout.split() == ["False", sys.executable]
    done = run(python(), "-c", "import sys; print('torch' in sys.modules)")
    assert done.stdout == "True\n"


def test_the_server_and_its_folder_go_when_the_tests_are_killed():
    code = """if True:
        import time
        from tests.warm import WarmPython
        warm = WarmPython()
        print(warm.server.pid, warm.folder, flush=True)
        time.sleep(60)
    """
    here = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=here, text=True) as process:
        assert process.stdout is not None
        identity, folder = process.stdout.readline().split()
        server = psutil.Process(int(identity))
        process.kill()
    server.wait(timeout=30)
    assert not Path(folder).exists()
