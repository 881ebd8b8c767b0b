"""A SLURM of two small nodes on this machine, in a folder and on ports of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NODES, CPUS_PER_NODE = 2, 2
START_TIMEOUT_S, JOB_TIMEOUT_S, POLL_S = 30.0, 240.0, 0.1
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

# cred_expire is also how long a requeued job waits, in seconds; SLURM takes 120 for anything below 6.
CONFIGURATION = """\
ClusterName=roadwork-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
KillWait=2
InactiveLimit=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Those of SLURM's programs that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]


class Cluster:
    """A running SLURM; `start` makes one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH_PATH}
        """For whatever talks to it, `sbatch` or a command that calls it."""

    def run(self, *words: str) -> str:
        """Run one of SLURM's commands; returns its stdout."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}\n{self.logs()}"
        return done.stdout

    def states(self, *jobs: str) -> dict[str, str]:
        """The state of each job, or of each task `job_task` of an array that has begun."""
        found = self.run("squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i %T")
        return dict(line.split() for line in found.splitlines())

    def wait(self, *jobs: str) -> dict[str, str]:
        """Wait until jobs, and all tasks of them that are arrays, are over; returns their last states."""
        states: dict[str, str] = {}

        def over() -> bool:
            states.clear()
            states.update(self.states(*jobs))
            return all(state in OVER for state in states.values())

        wait_until(over, JOB_TIMEOUT_S, lambda: f"{states}\n{self.logs()}")
        return states

    def logs(self) -> str:
        """The last lines of the daemons' logs, for the message of a failure."""
        tails = []
        for log in sorted(self.folder.glob("*.log")):
            tails += [f"== {log.name}", *log.read_text(errors="replace").splitlines()[-15:]]
        return "\n".join(tails)


@contextlib.contextmanager
def start(folder: Path) -> Iterator[Cluster]:
    """Start munge, a controller and the nodes; stop them, and every job, at the end."""
    cluster = Cluster(folder)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(_configuration(folder))
    with contextlib.ExitStack() as daemons:
        munge = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        files = [f"--{name}={folder / file}" for name, file in munge.items()]
        daemons.enter_context(_daemon(cluster, "munged", "--foreground", "--force", "--num-threads=2", *files))
        wait_until((folder / "munge.socket").exists, START_TIMEOUT_S, cluster.logs)
        daemons.enter_context(_daemon(cluster, "slurmctld", "-D"))
        for name in _node_names():
            daemons.enter_context(_daemon(cluster, "slurmd", "-D", "-N", name, log=f"slurmd-{name}"))
        wait_until(lambda: _idle_nodes(cluster) == NODES, START_TIMEOUT_S, cluster.logs)
        try:
            yield cluster
        finally:
            cluster.run("scancel", f"--user={getpass.getuser()}")
            wait_until(lambda: not cluster.run("squeue", "--noheader"), START_TIMEOUT_S, cluster.logs)


def wait_until(ready: Callable[[], bool], timeout_s: float, explain: Callable[[], str]) -> None:
    """Wait, and fail with an explanation when it takes too long."""
    last = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < last, f"not within {timeout_s:.0f} s\n{explain()}"
        time.sleep(POLL_S)


def _node_names() -> list[str]:
    return [f"node{number}" for number in range(1, NODES + 1)]


def _configuration(folder: Path) -> str:
    host = socket.gethostname().partition(".")[0]
    controller_port, *node_ports = _free_ports(1 + NODES)
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS_PER_NODE} RealMemory=1000"
        for name, port in zip(_node_names(), node_ports, strict=True)
    )
    return CONFIGURATION.format(
        folder=folder, host=host, user=getpass.getuser(), controller_port=controller_port, nodes=nodes
    )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _idle_nodes(cluster: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split().count("idle")


@contextlib.contextmanager
def _daemon(cluster: Cluster, *words: str, log: str = "") -> Iterator[None]:
    with (cluster.folder / f"{log or words[0]}.log").open("wb") as stream:
        process = subprocess.Popen(words, env=cluster.environment, stdout=stream, stderr=stream)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=START_TIMEOUT_S)
