"""`evaluate` and `predict` on the hardware at hand: one process for each GPU, or else this process alone."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.cli import help_of, parse_own
from pipeline.devices import CPU_ONLY, gpu_count, uses_gpu
from pipeline.errors import EXIT_OK, EXIT_USER, UserError, require, typed
from pipeline.launch.launcher import LaunchOptions, end, launch_words, machine_words, supervise
from pipeline.progress import say

# How a command ends on a request to stop, and what the same command does afterwards.
ENDS = {
    "evaluate": ("without a result", "from the beginning"),
    "predict": ("and keeping the answers so far", "after the answers that are kept"),
}


def main(words: Sequence[str]) -> int:
    """Run `python -m pipeline.evaluate` or `pipeline.predict`, in several processes where there are several GPUs.

    Args:
        words: The command, and its options and the launcher's.

    Returns:
        The exit status.
    """
    command, *arguments = words
    prog = typed(command)
    if {"-h", "--help"} & set(arguments):
        print(help_of(LaunchOptions, prog, f"{prog} [options]"), flush=True)
        return alone(command, ["--help"])
    try:
        own, rest = parse_own(LaunchOptions, arguments, prog)
        if own.cpu:
            os.environ |= CPU_ONLY
        require(own.num_processes is None or own.num_processes >= 1, "--num_processes", own.num_processes, "1 or more")
        processes = own.num_processes or default_processes(rest)
        if processes == 1 and own.config_file is None:
            return alone(command, rest)
        launch = launch_words(own.config_file, processes, own.cpu) + machine_words(own)
    except UserError as error:
        say(f"error: {error}")
        return EXIT_USER
    if not uses_gpu():  # the launcher's own choice is one thread
        here = max(1, processes // own.num_machines)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // here)))
    while_stopping, goes_on = ENDS[command]
    return supervise([*launch, "-m", f"pipeline.{command}", *rest], while_stopping, own.max_restarts, goes_on)


def default_processes(rest: Sequence[str]) -> int:
    """One process for each GPU, unless the command line names a device; one process on a CPU.

    Args:
        rest: The command's own options.
    """
    own, _ = parse_own(_Device, list(rest), "")
    return gpu_count() if uses_gpu() and own.device == "auto" else 1


@dataclass(frozen=True)
class _Device:
    device: str = "auto"


def alone(command: str, arguments: Sequence[str]) -> int:
    """Run a command in this process; returns its exit status."""
    sys.argv[1:] = arguments
    try:
        runpy.run_module(f"pipeline.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return int(ended.code or EXIT_OK)
    return EXIT_OK


if __name__ == "__main__":
    end(main(sys.argv[1:]))
