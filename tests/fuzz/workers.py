"""Run a function on many cases in forked workers, with a limit of time and memory, and without starting programs."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import psutil

Case = TypeVar("Case")
MEMORY_BYTES = 1_500_000_000
STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.forkpty", "pty.spawn")


@dataclass
class _Worker:
    """A forked process, and the cases that it has not answered for yet."""

    left: list[Any]
    process: Any = None
    answers: Connection | None = None
    since: float = 0.0
    """When its case began: on the clock, and in its processor seconds."""
    cpu_since: float = 0.0


def failures(
    function: Callable[[Case], object],
    cases: Sequence[Case],
    *,
    workers: int | None = None,
    cpu_s: float = 20.0,
    wall_s: float = 180.0,
    memory_bytes: int = MEMORY_BYTES,
) -> dict[Case, str]:
    """What goes wrong, by case: the traceback of an exception, a hang, too much memory, or the death of the worker.

    Args:
        function: Called with each case; it raises if something is wrong. It runs in a fork of this process.
        cases: What to call it with; hashable.
        workers: Processes at a time; None for every core.
        cpu_s: Processor seconds after which a case hangs; a busy machine does not count.
        wall_s: Seconds after which it hangs in any case, since it may wait for something.
        memory_bytes: Memory that a case may take beside what this process has.
    """
    found: dict[Case, str] = {}
    count = workers or len(os.sched_getaffinity(0))
    running = [_Worker(list(cases[number::count])) for number in range(min(count, len(cases)))]
    for worker in running:
        _start(worker, function, memory_bytes)
    try:
        while running:
            ready = multiprocessing.connection.wait([worker.answers for worker in running], timeout=0.5)
            for worker in list(running):
                problem = _take(worker, worker.answers in ready, (cpu_s, wall_s), found)
                if problem is not None:
                    worker.process.kill()
                    worker.process.join()
                    found[worker.left.pop(0)] = problem or f"the worker ended with status {worker.process.exitcode}"
                    _start(worker, function, memory_bytes)
                elif not worker.left:
                    worker.process.join()
                    running.remove(worker)
    finally:
        for worker in running:
            worker.process.kill()
    return found


def _take(worker: _Worker, ready: bool, limits: tuple[float, float], found: dict[Any, str]) -> str | None:
    """Take a worker's next answer, if there is one.

    Returns:
        None if all is well; why the worker must be replaced otherwise, empty where it died.
    """
    assert worker.answers is not None
    if not ready:
        spent = (_cpu_s(worker) - worker.cpu_since, time.monotonic() - worker.since)
        late = bool(worker.left) and any(one > limit for one, limit in zip(spent, limits, strict=True))
        return f"no answer after {spent[0]:.0f} s of processor and {spent[1]:.0f} s of time" if late else None
    try:
        error = worker.answers.recv()
    except EOFError:
        return "" if worker.left else None
    if error:
        found[worker.left[0]] = error
    worker.left.pop(0)
    worker.since, worker.cpu_since = time.monotonic(), _cpu_s(worker)
    return None


def _cpu_s(worker: _Worker) -> float:
    """Processor seconds of a worker so far; 0 for one that has ended."""
    try:
        times = psutil.Process(worker.process.pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _start(worker: _Worker, function: Callable[[Any], object], memory_bytes: int) -> None:
    context = multiprocessing.get_context("fork")
    worker.answers, answers = context.Pipe(duplex=False)
    arguments = (function, list(worker.left), answers, memory_bytes)
    worker.process = context.Process(target=_work, args=arguments, daemon=True)
    worker.since, worker.cpu_since = time.monotonic(), 0.0
    worker.process.start()
    answers.close()


def _work(function: Callable[[Any], object], cases: list[Any], answers: Connection, memory_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    started: list[str] = []
    sys.addaudithook(lambda event, _: started.append(event) if event in STARTS else None)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for case in cases:
        error = ""
        try:
            function(case)
        except MemoryError:
            error = f"more than {memory_bytes / 1e9:g} GB of memory"
        except BaseException:
            error = traceback.format_exc()
        if started:
            error, started[:] = f"a program was started ({started[0]}): {error}", []
        answers.send(error)
