"""`train`, and `prep features`: start processes on the hardware at hand, and turn their outcome into an exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import yaml

from pipeline.cli import help_of, parse_own
from pipeline.config import ACCELERATE_CONFIGS, ROOT, find_configuration, find_recipe, parse_config, print_help
from pipeline.devices import CPU_ONLY, gpu_count, refuse_idle_gpu, uses_gpu
from pipeline.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USER,
    STARTED_VARIABLE,
    STATE_FILE_VARIABLE,
    UserError,
    typed,
)
from pipeline.launch.rank_logs import LOG_FOLDER_VARIABLE
from pipeline.progress import say

# After a request to stop, workers have this long to reach a step boundary and save.
SHUTDOWN_S = 120
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
# Starts of the last line of `pipeline.errors.run`. The lines around it are the launcher's, about its workers' end.
OUTCOMES = ("error: ", "stopped: ", "failed: ")
# The second appears where machine 0 ends before this one, which is no fault.
CHATTER = re.compile(r"torch/distributed/elastic/.*(failed|[Ss]ignal)|TCPStore.cpp.*recvValueWithTimeout failed")


@dataclass(frozen=True)
class LaunchOptions:
    """The launcher's own options; all others go to the program that it launches."""

    config_file: Path | None = None
    """An accelerate configuration; by default the hardware decides."""
    cpu: bool = False
    """Compute on the CPU even if there is a GPU."""
    num_processes: int | None = None
    """Processes over all machines; by default the accelerate configuration decides."""
    max_restarts: int = 0
    """Largest number of restarts from the last checkpoint, after a process died or hung."""
    num_machines: int = 1
    """Machines, each with a launcher of its own."""
    machine_rank: int = 0
    """This machine's number, from 0."""
    main_process_ip: str = "127.0.0.1"
    """Address of machine 0."""
    main_process_port: int = 29500
    """A free port on machine 0."""
    log_folder: Path | None = None
    """Folder in which each rank but 0 writes its own log file."""


def main(arguments: Sequence[str]) -> int:
    """Run `accelerate launch pipeline/train.py` for a recipe; returns the exit status that `--help` promises."""
    prog = typed("train")
    if {"-h", "--help"} & set(arguments):
        print(
            help_of(LaunchOptions, prog, f"{prog} RECIPE [options] [--epochs N] [--dry-run] [--section.key VALUE ...]")
        )
        print_help(prog)
        return EXIT_OK
    try:
        own, rest = parse_own(LaunchOptions, list(arguments), prog)
        recipe = rest.pop(0) if rest and not rest[0].startswith("-") else None
        words = ["--config", str(find_recipe(recipe)), *rest]
        parse_config(words, prog)  # a mistake is said once, before there are processes
        launch = launch_words(own.config_file, own.num_processes, own.cpu) + machine_words(own)
        command = [*launch, str(ROOT / "pipeline" / "train.py"), *words]
    except UserError as error:
        say(f"error: {error}")
        return EXIT_USER
    if own.log_folder is not None:
        own.log_folder.mkdir(parents=True, exist_ok=True)
        os.environ[LOG_FOLDER_VARIABLE] = str(own.log_folder.resolve())
    return supervise(command, restarts=own.max_restarts)


def prep(arguments: Sequence[str]) -> int:
    """Run `accelerate launch -m data_prep COMMAND` for a command that runs in several processes; see `main`."""
    prog = typed(f"prep {arguments[0]}")
    if {"-h", "--help"} & set(arguments):
        print(help_of(LaunchOptions, prog, f"{prog} [options]"), flush=True)
        return subprocess.run([sys.executable, "-m", "data_prep", arguments[0], "--help"], check=False).returncode
    try:
        own, rest = parse_own(LaunchOptions, list(arguments), prog)
        command = [*launch_words(own.config_file, own.num_processes, own.cpu), "-m", "data_prep", *rest]
    except UserError as error:
        say(f"error: {error}")
        return EXIT_USER
    return supervise(
        command, "and keeping the files that are finished", own.max_restarts, "after the files that are finished"
    )


def launch_words(config_file: Path | None, num_processes: int | None, cpu: bool = False) -> list[str]:
    """`accelerate launch` for the GPUs of this machine, or else for two processes on its CPU."""
    if cpu:
        os.environ |= CPU_ONLY
    config_file, num_processes = choose_launch(config_file, num_processes)
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
    words += ["--num_processes", str(num_processes)] if num_processes else []
    # Accelerate's usual port would be taken for the second of two launches on one machine. A configuration for several
    # machines names a port that all of them know.
    return words if names_a_port(config_file) else [*words, f"--main_process_port={free_port()}"]


def names_a_port(config_file: Path) -> bool:
    """Whether an accelerate configuration names the port at which its processes meet."""
    try:
        settings = yaml.safe_load(config_file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False  # accelerate reports what is wrong with it
    return isinstance(settings, dict) and settings.get("main_process_port") is not None


def free_port() -> int:
    """A TCP port of this machine that is not in use now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def choose_launch(
    config_file: Path | None, num_processes: int | None, idle_gpu: bool = False
) -> tuple[Path, int | None]:
    """Choose the accelerate configuration, by the hardware unless one is given, and the number of processes.

    Args:
        config_file: The user's choice, or None.
        num_processes: The user's choice, or None.
        idle_gpu: Whether a GPU that torch cannot use may be ignored.

    Returns:
        The configuration, and the number of processes; None for the configuration's own.

    Raises:
        UserError: There is no such file, or there is a GPU that torch cannot use.
    """
    if not idle_gpu:
        refuse_idle_gpu()
    if config_file is not None:
        found = find_configuration(config_file)
        if not found.is_file():
            raise UserError(f"there is no accelerate configuration {config_file}; see {ACCELERATE_CONFIGS}")
        return found, num_processes
    if uses_gpu():
        return ACCELERATE_CONFIGS / "gpu.yaml", num_processes or gpu_count()
    cores = len(os.sched_getaffinity(0))
    return ACCELERATE_CONFIGS / ("cpu_2.yaml" if cores > 1 else "cpu_1.yaml"), num_processes


def machine_words(own: LaunchOptions) -> list[str]:
    """Accelerate's options for one of several machines; `--num_processes` is then the sum over all of them."""
    if own.num_machines == 1:
        return []
    if not own.num_processes or own.num_processes % own.num_machines:
        raise UserError(
            f"--num_processes is {own.num_processes}, but must be a multiple of the {own.num_machines} machines"
        )
    names = ("num_machines", "machine_rank", "main_process_ip", "main_process_port")
    words = [f"--{name}={getattr(own, name)}" for name in names]
    # `standard` starts this machine's processes only; the default would start all of them over ssh.
    return [*words, "--same_network", "--deepspeed_multinode_launcher=standard"]


class StopRequest:
    """Passes a request to stop on to the running launch, once; a second Ctrl-C kills it."""

    def __init__(self, while_stopping: str):
        """Start to listen; `while_stopping` completes the message "stopping ..." and says how the workers end."""
        self.while_stopping, self.asked = while_stopping, False
        self.process: subprocess.Popen[str] | None = None
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # what nohup wants
                signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        if self.process is None:  # between two attempts
            self.asked = True
        elif self.asked and number == signal.SIGINT:
            os.killpg(self.process.pid, signal.SIGKILL)
        elif not self.asked:
            self.asked = True
            say(f"stopping {self.while_stopping}; Ctrl-C again kills")
            self.process.send_signal(signal.SIGTERM)


def supervise(
    command: list[str],
    while_stopping: str = "at the next step boundary, with a checkpoint",
    restarts: int = 0,
    goes_on: str = "from the last checkpoint",
) -> int:
    """Run a launch to its end, and restart it where one of its processes died or hung; returns the exit status.

    Args:
        command: The launch's command line.
        while_stopping: How the workers end on a request to stop, for the message.
        restarts: How many times the launch may be restarted.
        goes_on: Where the same command then goes on, for the message.
    """
    os.environ.setdefault(STARTED_VARIABLE, str(time.time()))
    stop = StopRequest(while_stopping)
    for left in reversed(range(restarts + 1)):
        status, cause = _launch_once(command, stop)
        if status in (EXIT_OK, EXIT_USER, EXIT_STOPPED):
            return status
        if status == -signal.SIGTERM and stop.asked:
            say("stopped: before it began")
            return EXIT_STOPPED
        if cause is None or stop.asked or not left:
            break
        say(f"{cause}; starting again {goes_on} ({left} restart{'s' if left > 1 else ''} left)")
    if cause is not None:
        say(f"failed: {cause}; the same command goes on {goes_on}, and with --max-restarts N it does so by itself")
    return EXIT_FAILED


def _launch_once(command: list[str], stop: StopRequest) -> tuple[int, str | None]:
    """Run a launch once; returns its status, and which worker was the first to fail and how.

    The second value is None where a worker has given the reason: a new attempt would then end in the same way.

    Accelerate's launcher loses the workers' exit status: it returns 1 and prints a traceback of its own. So workers
    leave their status in a file. Where that file, or the launcher's line about the first worker to fail, explains the
    end, the rest of its output is dropped. When a worker dies, the launcher asks the others to stop, and they say so in
    that file: without a request to stop, what the line says of the first one counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        state_file = Path(folder) / "state.json"
        environment = {
            # Without a GPU there are as many processes as cores; with one, a process's host only copies and gathers.
            "OMP_NUM_THREADS": "4" if uses_gpu() else "1",
            "PET_SHUTDOWN_TIMEOUT": str(SHUTDOWN_S),
            **os.environ,
            STATE_FILE_VARIABLE: str(state_file),
            "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",
        }
        aside: list[str] = []
        said: set[str] = set()
        # In a session of its own, so that a terminal's Ctrl-C arrives here only and does not count as two requests.
        with subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        ) as process:
            stop.process = process
            if stop.asked:  # while the process started
                process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            for line in process.stderr:
                outcome = line.startswith(OUTCOMES)
                if not outcome and (aside or CHATTER.search(line)):
                    aside.append(line)
                elif line not in said:  # each outcome once, though several ranks report it
                    said |= {line} if outcome else set()
                    sys.stderr.write(line)
                    sys.stderr.flush()
        stop.process = None
        status = process.returncode
        explained = state_file.exists()
        if explained:
            state = json.loads(state_file.read_text())
            status, message = int(state["exit_status"]), state.get("message")
            if message and message not in {line.rstrip("\n") for line in said}:  # a rank with a log of its own
                say(message)
    cause = cause_of("".join(aside))
    if explained and (stop.asked or status != EXIT_STOPPED or cause is None):
        cause = None
    elif explained:
        status = EXIT_FAILED
    if status not in (EXIT_OK, EXIT_USER, EXIT_STOPPED) and not explained and cause is None:
        sys.stderr.writelines(aside)
    return status, cause


def cause_of(words: str) -> str | None:
    """Which worker failed first, and how, from the last output of `accelerate launch`; None if none did."""
    found = re.search(r"Root Cause.*?host\s+: (\S+).*?rank\s+: (\d+).*?exitcode\s+: (-?\d+)", words, flags=re.DOTALL)
    if found is None:
        return None
    host, rank, status = found.group(1), found.group(2), int(found.group(3))
    if status == EXIT_STOPPED:
        return None
    if status >= 0:
        return f"rank {rank} on {host} ended with status {status}, for the reason that it gives above"
    reason = " (probably by the system, which had no memory left)" if -status == signal.SIGKILL else ""
    return f"rank {rank} on {host} was killed by {signal.Signals(-status).name}{reason}"


def end(status: int) -> NoReturn:
    """End this process, which then takes no more signals: Python has no handlers during its shutdown."""
    for number in SIGNALS:  # a repeated notice would kill it
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(status)


if __name__ == "__main__":
    words = sys.argv[1:]
    end(prep(words[1:]) if words[:1] == ["prep"] else main(words))
