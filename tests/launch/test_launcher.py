import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.config import find_recipe
from pipeline.errors import UserError
from pipeline.launch.launcher import launch_words, main, supervise

ROOT = Path(__file__).parents[2]


def test_a_recipe_is_found_by_name_or_path(tmp_path):
    assert find_recipe("demo") == ROOT / "pipeline" / "recipes" / "demo.yaml"
    (tmp_path / "mine.yaml").write_text("{}")
    assert find_recipe(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    with pytest.raises(UserError, match="there are cached_30ep, demo"):
        find_recipe("dmo")


def test_the_hardware_decides_unless_the_user_does(monkeypatch):
    monkeypatch.setattr("pipeline.devices.may_use_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert launch_words(None, None)[-4:-1] == [str(ROOT / "accelerate_configs" / "gpu.yaml"), "--num_processes", "4"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert launch_words(None, None)[-2].endswith("cpu_1.yaml")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert launch_words(None, None)[-2].endswith("cpu_2.yaml")
    with pytest.raises(UserError, match=r"absent\.yaml"):
        launch_words(Path("absent.yaml"), None)


def test_two_launches_on_one_machine_meet_at_different_ports(tmp_path):
    ports = [launch_words(None, None)[-1] for _ in range(2)]
    assert ports[0] != ports[1]
    assert all(re.fullmatch(r"--main_process_port=\d{4,5}", port) for port in ports)
    named = ROOT / "accelerate_configs" / "multi_node.yaml"
    assert launch_words(named, None)[-1] == str(named)


@pytest.mark.parametrize("words", [[], ["absent"], ["demo", "--config_file", "absent.yaml"]])
def test_a_mistake_is_status_two_before_anything_starts(words, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def worker(text: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text)]


def test_the_status_is_the_workers_and_the_launchers_words_are_dropped(capsys):
    status = supervise(
        worker("""
            import json, os, sys
            print("error: no shards", file=sys.stderr)
            print("E1 torch/distributed/elastic/api.py failed (exitcode: 2)\\nTraceback", file=sys.stderr)
            json.dump({"exit_status": 2}, open(os.environ["ROADWORK_STATE_FILE"], "w"))
            sys.exit(1)
        """)
    )
    assert status == 2
    assert capsys.readouterr().err == "error: no shards\n"


@pytest.mark.parametrize(("first", "status"), [("-9", 1), ("1", 1), ("75", 75)])
def test_a_worker_that_dies_is_the_reason_though_the_others_say_that_they_were_asked_to_stop(capsys, first, status):
    """By the launcher's own request: it ends the others."""
    found = supervise(
        worker(f"""
            import json, os, sys
            print("stopped: kept", file=sys.stderr)
            print("E1 torch/distributed/elastic/api.py failed\\nRoot Cause:\\n  host      : a\\n  rank      : 1\\n"
                  "  exitcode  : {first}", file=sys.stderr)
            json.dump({{"exit_status": 75, "message": "stopped: kept"}}, open(os.environ["ROADWORK_STATE_FILE"], "w"))
            sys.exit(1)
        """),
        goes_on="after what is kept",
    )
    assert found == status
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "stopped: kept"
    assert len(said) == (1 if status == 75 else 2)
    if status == 1:
        assert said[1].startswith("failed: rank 1 on a ")
        assert "the same command goes on after what is kept" in said[1]


def test_a_crash_keeps_every_word(capsys):
    status = supervise(
        worker("""
            import sys
            print("E1 torch/distributed/elastic/api.py failed (exitcode: -9)\\nrank 1 was killed", file=sys.stderr)
            sys.exit(1)
        """)
    )
    assert status == 1
    assert "rank 1 was killed" in capsys.readouterr().err


def test_a_request_to_stop_is_handed_on_once():
    script = textwrap.dedent("""
        import sys
        from pipeline.launch.launcher import supervise
        code = '''
        import json, os, signal, sys, time
        def stop(*_):
            json.dump({"exit_status": 75}, open(os.environ["ROADWORK_STATE_FILE"], "w"))
            print("stopped: saved", file=sys.stderr)
            sys.exit(1)
        signal.signal(signal.SIGTERM, stop)
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
        '''
        import textwrap
        sys.exit(supervise([sys.executable, "-c", textwrap.dedent(code)]))
    """)
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "stopped: saved" in err
    assert time.monotonic() - start < 20


def test_a_worker_that_dies_after_a_request_to_stop_is_not_started_again():
    code = """if True:
        import signal, sys, time
        def die(*_):
            print("E1 torch/distributed/elastic/api.py failed\\nRoot Cause:\\n  host      : a\\n  rank      : 1\\n"
                  "  exitcode  : -9", file=sys.stderr)
            sys.exit(1)
        signal.signal(signal.SIGTERM, die)
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    """
    script = "import sys; from pipeline.launch.launcher import supervise; "
    script += f"sys.exit(supervise([sys.executable, '-c', {code!r}], restarts=2))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "failed: rank 1 on a was killed by SIGKILL" in err
    assert "starting again" not in err


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGHUP])
def test_a_launch_that_is_asked_to_stop_before_its_workers_listen_is_resumable(number):
    """Nothing has been taken from the last checkpoint, so a queue may start it again."""
    code = "import sys, time; print('ready', file=sys.stderr, flush=True); time.sleep(60)"
    script = "import sys; from pipeline.launch.launcher import supervise; "
    script += f"sys.exit(supervise([sys.executable, '-c', {code!r}]))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "stopped: before it began" in err


def test_a_launch_under_nohup_outlives_its_terminal():
    script = """if True:
        import os, signal, sys
        from pipeline.launch.launcher import supervise
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        sys.exit(supervise([sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"]))
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
