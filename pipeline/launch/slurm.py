"""Batch scripts for SLURM, submitted as a chain in which each job waits for the one before it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError, require
from pipeline.files import write_summary, write_text
from pipeline.progress import say


@dataclass(frozen=True)
class Resources:
    """The resources that a job asks for, named as in `sbatch`; None leaves a value to the cluster."""

    cpus_per_task: int
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int | None = None
    ntasks_per_node: int | None = None
    gpus_per_node: str | None = None
    gres: str | None = None
    signal: str | None = None

    def __post_init__(self) -> None:
        require(self.cpus_per_task >= 1, "--cpus_per_task", self.cpus_per_task, "1 or more")
        require(self.nodes is None or self.nodes >= 1, "--nodes", self.nodes, "1 or more")


@dataclass(frozen=True)
class Job:
    """One batch script."""

    name: str
    """Name of the script; the job's name has `roadwork-` before it."""
    command: str
    """Bash command that the job runs, its values quoted."""
    resources: Resources
    tasks: int = 0
    """Tasks of an array, numbered from 1 in SLURM_ARRAY_TASK_ID; 0 for a job that is no array."""
    requeue: bool = True
    """Whether SLURM may start the job again, for example after a node failed."""


def python_command(module: str, word: str, options: dict[str, object]) -> str:
    """The shell command that runs `python -m module word` with this Python.

    Args:
        module: Name of the module.
        word: The module's command to run.
        options: Values by flag name; they are quoted here.
    """
    flags = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items()]
    return " ".join([shlex.quote(sys.executable), "-m", module, word, *flags])


def script_of(job: Job, folder: Path, after: Job | None = None) -> str:
    """The text of a job's batch script, which can be submitted by hand too.

    Args:
        job: The job.
        folder: Folder of its log, absolute.
        after: The job that it waits for.

    Raises:
        UserError: A value cannot stand in a batch script.
    """
    # A backslash in a log's name makes SLURM drop it and all patterns.
    require("\\" not in str(folder), "the folder of scripts and logs", str(folder), "without backslashes for SLURM")
    asked = {name.replace("_", "-"): value for name, value in vars(job.resources).items() if value is not None}
    directives = {
        "job-name": f"roadwork-{job.name}",
        # A percent sign in the path must not begin one of SLURM's patterns; %A is an array's number, %a the task's.
        "output": str(folder).replace("%", "%%") + f"/{job.name}-" + ("%A_%a.log" if job.tasks else "%j.log"),
        "open-mode": "append",  # a restarted job keeps its earlier output
        **({"array": f"1-{job.tasks}"} if job.tasks else {}),
        **asked,
    }
    by_hand = ["sbatch", *([_dependency(f"ID_OF_{after.name.upper()}")] if after else []), f"{job.name}.sbatch"]
    lines = [
        "#!/bin/bash",
        f"# By hand: {' '.join(by_hand)}",
        *(f"#SBATCH --{name}={_directive_value(name, value)}" for name, value in directives.items()),
        "#SBATCH --requeue" if job.requeue else "#SBATCH --no-requeue",
        "#SBATCH --kill-on-invalid-dep=yes",
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        job.command,
    ]
    return "\n".join(lines) + "\n"


def submit(jobs: Sequence[Job], folder: Path, dry_run: bool) -> Path | None:
    """Write the scripts of a chain of jobs and submit them: each starts when the one before it has succeeded.

    Args:
        jobs: The jobs, in their order.
        folder: Folder of scripts and logs, on a disk that the nodes share.
        dry_run: Only print what would be written and submitted.

    Returns:
        Path of the summary, which has the jobs' numbers by name; None after a dry run.

    Raises:
        UserError: There is no `sbatch` here, or it refuses a job; no job of the chain stays in the queue then.
    """
    folder = folder.resolve()
    paths = {job.name: folder / f"{job.name}.sbatch" for job in jobs}
    previous = [None, *jobs[:-1]]
    texts = {job.name: script_of(job, folder, after) for job, after in zip(jobs, previous, strict=True)}
    if dry_run:
        for job, after in zip(jobs, previous, strict=True):
            say(f"== {paths[job.name]}, submitted {f'to begin after {after.name}' if after else 'first'}")
            say(texts[job.name])
        say("dry run: nothing was written or submitted")
        return None
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on PATH, so nothing can be submitted; give this command on a cluster's login node, "
            "or with --dry_run to see what it would submit"
        )
    for name, text in texts.items():
        write_text(paths[name], text)
    numbers: list[str] = []
    for path in paths.values():
        numbers.append(_sbatch(path, numbers))
    submitted = dict(zip(paths, numbers, strict=True))
    say(f"submitted: {', '.join(f'{name} {number}' for name, number in submitted.items())}; logs come to {folder}")
    scripts = {name: str(path) for name, path in paths.items()}
    return write_summary(folder, {"jobs": submitted, "scripts": scripts, "logs": str(folder)})


def _sbatch(script: Path, before: list[str]) -> str:
    """Submit a script to run after the last of the jobs before it; returns its job number.

    If the script is refused, the jobs before it are cancelled.
    """
    waits = [_dependency(before[-1])] if before else []
    done = subprocess.run(["sbatch", "--parsable", *waits, script], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip().partition(";")[0]  # the cluster's name may follow
    if before:
        subprocess.run(["scancel", *before], check=False)
    reasons = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines()]
    raise UserError(f"sbatch refused {script} and nothing is submitted: {'; '.join(reasons)}")


def _dependency(number: str) -> str:
    return f"--dependency=afterok:{number}"


def _directive_value(name: str, value: object) -> str:
    """A value as `sbatch` reads it: within double quotes only these and the backslash are special."""
    text = str(value)
    require("\n" not in text, f"--{name}", text, "a single line")
    if re.fullmatch(r"[\w./%:,@+-]*", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
