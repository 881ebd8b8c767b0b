"""A Python for tests that starts warm: `WarmPython` is its server, `python()` the program to start.

Most of the suite's processes would spend seconds on importing torch, transformers and DeepSpeed. `python()` stands for
`sys.executable`: each process is still one of its own, with its command line, environment, folder, streams, signals
and exit status, but it is a fork of a server that has these libraries in memory. See `server.py`. One difference: when
`python()` is killed, its process ends a moment later. Tests that kill and go on at once start a new Python.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VARIABLE = "ROADWORK_TESTS_PYTHON"
# What libraries read while they are imported: a process that has other values starts cold.
AT_IMPORT = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "HF_HOME", "MPLBACKEND")


def python() -> str:
    """The program to start in the place of `sys.executable`."""
    return os.environ.get(VARIABLE, sys.executable)


class WarmPython:
    """The server of a session of tests, and the program that asks it for processes; workers of xdist share it."""

    def __init__(self) -> None:
        """Start the server, which imports nothing large before it is asked for a process."""
        self.folder = Path(tempfile.mkdtemp(prefix="roadwork-warm-"))
        program, socket = self.folder / "python", self.folder / "socket"
        here = Path(__file__).parent
        client = Path(shutil.copy(here / "client.py", self.folder))
        at_import = {name: os.environ.get(name) for name in AT_IMPORT}
        settings = {"socket": str(socket), "python": sys.executable, "at_import": at_import}
        (self.folder / "settings.json").write_text(json.dumps(settings))
        # -I and -S leave out the site packages: the client needs none, and starts in 15 ms.
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {shlex.quote(str(client))} "$@"\n')
        program.chmod(0o755)
        # The server ends when its input does, however this process ends, and removes the folder.
        words = [sys.executable, str(here / "server.py"), str(socket), str(program)]
        self.server = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
        while not socket.exists():
            assert self.server.poll() is None
            time.sleep(0.005)
        os.environ[VARIABLE] = str(program)

    def close(self) -> None:
        """End the server, which its processes outlive, and which removes the folder."""
        self.server.communicate()
