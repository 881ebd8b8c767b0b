"""The server of warm processes: `python server.py SOCKET PROGRAM`.

Each request becomes two processes: one that runs what was asked for, and a keeper, which tells the client how it ended,
and ends it when the client is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
import types
from pathlib import Path
from typing import Any

# What processes of training, evaluation and data preparation import, and nothing that may be what is run.
LIBRARIES = (
    "torch", "torch.distributed.launcher.api", "torch.utils.data", "deepspeed", "accelerate.commands.config",
    "transformers", "transformers.models.dinov3_vit.modeling_dinov3_vit", "sklearn.metrics", "sklearn.cluster",
    "pandas", "matplotlib.pyplot", "jsonargparse", "webdataset", "fsspec", "simplejpeg", "PIL.Image", "rich.progress",
    "tenacity", "yaml", "psutil", "safetensors.torch", "jinja2", "pipeline.trainer", "pipeline.training.validation",
    "pipeline.evaluation.report.page",
)  # fmt: skip


def serve(address: str, program: str) -> dict[str, Any]:
    """Accept requests until the input ends; returns in the forked processes only, with what each is to run."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    warm = False
    while True:
        if 0 in select.select([listener, 0], [], [])[0]:
            shutil.rmtree(Path(address).parent)
            sys.exit()
        connection, _ = listener.accept()
        if not warm:
            for name in LIBRARIES:
                importlib.import_module(name)
            warm = True
            gc.freeze()  # or a collection in each process would copy all that the libraries have made
        if os.fork() == 0:
            listener.close()
            request = keep(connection)
            request["program"] = program
            return request
        connection.close()


def keep(connection: socket.socket) -> dict[str, Any]:
    """Fork the process and stay with it until its end; returns in the process itself."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(connection, 4, 3)
    text = b""
    while len(text) < int.from_bytes(length, "big"):
        text += connection.recv(1 << 20)
    process = os.fork()
    if process == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        request: dict[str, Any] = json.loads(text)
        return request
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(OSError):
        connection.sendall(process.to_bytes(4, "big"))
    ended = os.pidfd_open(process)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:  # the client was killed
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(OSError):
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
    os._exit(0)


def become(request: dict[str, Any]) -> None:
    """Give this process what a new one would have, and run what was asked for."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for limit, soft, hard in request["limits"]:
        resource.setrlimit(limit, (soft, hard))
    for number, ignored in request["signals"]:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if ignored else usual)
    sys.executable = request["program"]
    import torch
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE") == "1"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    run(request["words"])


def run(words: list[str]) -> None:
    """Run what Python would run with these words."""
    option = words.pop(0) if words[0] in ("-u", "-P") else None
    if option == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    given = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [*given, *sys.path[1:]]  # the first is this file's folder
    if option != "-P":
        sys.path.insert(0, {"-m": os.getcwd(), "-c": ""}.get(words[0], str(Path(words[0]).resolve().parent)))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def end(error: BaseException | None) -> None:
    """End this process as Python would, short of freeing a million objects that the server has made."""
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    elif error is not None:
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


if __name__ == "__main__":
    asked = serve(*sys.argv[1:])
    try:
        become(asked)
    except BaseException as error:
        end(error)
    end(None)
