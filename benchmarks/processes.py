"""Work in processes of its own, on the CPU: DeepSpeed's settings stay with a process until its end."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import multiprocessing

from pipeline.devices import CPU_ONLY
from pipeline.distributed.startup import end_process
from pipeline.launch.launcher import free_port
from pipeline.progress import silence_libraries

Found = TypeVar("Found")

LIBRARIES = ("deepspeed", "accelerate", "transformers", "pipeline.trainer")


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Processes that are started inside find no GPU, and compute in one thread."""
    with patch.dict(os.environ, {**CPU_ONLY, "OMP_NUM_THREADS": "1"}):
        yield


def run_apart(work: Callable[..., Found], processes: int, *arguments: Any) -> Found:
    """Call a function of a module in fresh processes that know of one another; returns what rank 0's call returns."""
    with tempfile.TemporaryDirectory(prefix="roadwork-benchmark-") as place:
        answer = Path(place) / "answer"
        start(_process, (free_port(), processes, work, arguments, answer), processes)
        found: Found = pickle.loads(answer.read_bytes())
    return found


def start(function: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    """Call `function(rank, *arguments)` in each of some processes without a GPU, and wait for their ends.

    They are forks of a server that has imported the libraries once; starting anew, each would take seconds for that.
    """
    with on_cpu():
        set_forkserver_preload(list(LIBRARIES))
        multiprocessing.start_processes(function, arguments, processes, start_method="forkserver")


def _process(
    rank: int, port: int, processes: int, work: Callable[..., Any], arguments: tuple[Any, ...], answer: Path
) -> None:
    join(rank, port, processes)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print
        found = work(*arguments)
    if rank == 0:
        answer.write_bytes(pickle.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    end_process(0)


def join(rank: int, port: int, processes: int) -> None:
    """Set up this process as a launcher would, on the CPU with one thread."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **CPU_ONLY}
    torch.set_num_threads(1)
    silence_libraries()
