"""`slurm prep`: shards from a cluster. One job plans, an array of jobs writes, a last one merges."""

from __future__ import annotations

import sys
from inspect import signature
from pathlib import Path
from typing import Any

from data_prep.shards.command import shard
from data_prep.shards.merge import merge
from data_prep.shards.options import Arguments, Options
from data_prep.sources.opening import open_source
from pipeline.cli import Parser, parse
from pipeline.data.storage import is_url
from pipeline.errors import require, run, typed
from pipeline.launch.slurm import Job, Resources, python_command, submit

PROG = typed("slurm prep")
MODULE = "data_prep"
OF_THE_JOBS = ("options", "plan", "part")  # parameters that are no options here, since the jobs set them


def prep(
    options: dict[str, Any],
    *,
    parts: int,
    cpus_per_task: int = 4,
    mem: str | None = None,
    time: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    dry_run: bool = False,
) -> Path | None:
    """Submit three SLURM jobs that do what `prep shard` does: plan, write in parts, merge.

    Each job waits for the one before it and may be requeued: it keeps what is written. The same command again resumes
    what a failed job left. Scripts and logs come to a folder beside --out, which ends in .slurm.

    Args:
        options: Options of `shard`, by name, without `plan` and `part`.
        parts: Tasks of the array that writes the tars.
        cpus_per_task: Processor cores for the plan and for each part; --workers follows.
        mem: Memory of each job, such as 8G; this and what follows is the cluster's default if not given.
        time: Time limit of each job, such as 04:00:00.
        partition: Partition in which the jobs run.
        account: Account that the jobs are charged to.
        qos: Quality of service.
        dry_run: Print the scripts and how they would be submitted, and do nothing.
    """
    require(parts >= 1, "--parts", parts, "1 or more")
    # Wrong values are refused here, and not by a job that waited in the queue.
    for kind in (Options, Arguments):
        kind(**{name: options[name] for name in signature(kind).parameters if name in options})
    open_source(options["source"], options["metadata"], options["revision"])
    resources = Resources(cpus_per_task, mem, time, partition, account, qos)
    one_core = Resources(1, mem, time, partition, account, qos)
    defaults = {name: parameter.default for name, parameter in signature(shard).parameters.items()}
    given = {name: value for name, value in options.items() if value != defaults[name]}
    write = python_command(MODULE, "shard", given)
    if "workers" not in given:
        write += ' --workers="$SLURM_CPUS_PER_TASK"'
    join = python_command(MODULE, "merge", {name: given[name] for name in signature(merge).parameters if name in given})
    return submit(
        [
            Job("plan", f"exec {write} --plan", resources),
            Job("parts", f'exec {write} --part="$SLURM_ARRAY_TASK_ID/{parts}"', resources, tasks=parts),
            Job("merge", f"exec {join}", one_core),
        ],
        _scripts_folder(options["out"]),
        dry_run,
    )


def _scripts_folder(out: str | Path) -> Path:
    named = Path.cwd() / str(out).rstrip("/").rpartition("/")[2] if is_url(out) else Path(out).resolve()
    return named.with_name(f"{named.name}.slurm")


def main(words: list[str]) -> Path | None:
    """Read the command line, whose options are those of `prep` and of `shard` together, and submit.

    Args:
        words: What follows `slurm prep` on the command line.
    """
    parser = Parser(prog=PROG, description=(prep.__doc__ or "").partition("\n\n    Args:")[0])
    values = parse(parser, [prep, shard], words or ["--help"], skip=OF_THE_JOBS)
    own = {name: values.pop(name) for name in signature(prep).parameters if name != "options"}
    return prep(values, **own)


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(sys.argv[1:])))
