"""Commands in processes of their own, each with a log and a time limit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Bench, finish
from pipeline.config import ROOT


def finished(bench: Bench, name: str, work: Callable[..., object], *arguments: Any) -> None:
    """Run `work(*arguments)` in a process of its own, whose output goes to a log and then to stderr.

    Raises:
        TimeoutError: It took longer than `Sizes.run_limit_s`, and was killed.
        RuntimeError: It failed; the message has the end of its log.
    """
    log = bench.place / f"{name}.log"
    status = finish(get_context("fork").Process(target=_logged, args=(log, work, arguments)), bench.sizes.run_limit_s)
    said = log.read_text(errors="replace")
    print(f"== {name}\n{said}", file=sys.stderr, flush=True)
    if status is None:
        raise TimeoutError(f"longer than {bench.sizes.run_limit_s:.0f} s; it said last: {said[-300:]}")
    if status:
        raise RuntimeError(f"status {status}: {said[-500:]}")


def _logged(log: Path, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    with log.open("wb") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    work(*arguments)


def module(name: str, *words: str) -> None:
    """Replace this process by `python -m NAME WORDS`."""
    os.chdir(ROOT)
    os.execv(sys.executable, (sys.executable, "-m", name, *words))


def answer(bench: Bench, name: str, command: str, *words: str) -> None:
    """Run `./launch.sh COMMAND`, an `evaluate` or `predict`, in one process for each GPU; two in a rehearsal."""
    hardware = ("--cpu",) if bench.dry else ()
    launch = ("--num_processes", str(bench.several), *hardware)
    finished(bench, name, module, "pipeline.launch.answering", command, *words, *launch)
