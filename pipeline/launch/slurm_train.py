"""`slurm RECIPE`: train on several nodes of a cluster, resuming after preemptions and time limits."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import help_of, parse_own
from pipeline.config import ACCELERATE_CONFIGS, USUAL_WORKERS, Config, find_configuration, find_recipe, parse_config
from pipeline.errors import EXIT_STOPPED, EXIT_USER, UserError, require, run, typed
from pipeline.files import render
from pipeline.launch.slurm import Job, Resources, submit
from pipeline.progress import say

PROG = typed("slurm")
# SLURM gives notice this long before the time limit or a preemption; a step and a checkpoint must fit into it.
NOTICE_S = 300
# Once the first launcher has ended, the others have this long to end: they may wait for something that never comes.
LAST_WAIT_S = 60

JOB = Path(__file__).with_name("train_job.sh")


@dataclass(frozen=True)
class SlurmOptions:
    """Write a batch script that trains a recipe on several nodes, and submit it.

    When SLURM takes the nodes away, the job saves a checkpoint, queues again and resumes.
    """

    nodes: int = 1
    """Nodes of the job."""
    gpus_per_node: str = "1"
    """GPUs per node, each with its own process, as a number or as SLURM's TYPE:NUMBER, such as h100:8; 0 to train on
    the CPU."""
    gres: str | None = None
    """The same for clusters that count GPUs as generic resources, such as gpu:h100:8; it replaces gpus_per_node."""
    processes_per_node: int = 1
    """Processes per node when training on the CPU."""
    cpus_per_task: int | None = None
    """Cores per node; by default one per process and one for each of its data.workers."""
    config_file: Path | None = None
    """An accelerate configuration; by default accelerate_configs/multi_node.yaml, and on CPUs cpu_2.yaml."""
    mem: str | None = None
    """Memory per node, such as 200G; by default the cluster's, as for time, partition, account and qos."""
    time: str | None = None
    """Time limit of the job, such as 04:00:00; it may be shorter than training, which resumes after a requeue."""
    partition: str | None = None
    """Partition in which the job runs."""
    account: str | None = None
    """Account that the job is charged to."""
    qos: str | None = None
    """Quality of service."""
    requeue: bool = True
    """Queue again when stopped by preemption or the time limit; --no-requeue turns it off."""
    dry_run: bool = False
    """Print the script and the command that would submit it, and do nothing."""

    @property
    def gpus(self) -> int:
        """GPUs per node.

        Raises:
            UserError: The options do not say how many.
        """
        if self.gres is not None:
            found = [word for word in self.gres.split(",") if word.partition(":")[0] == "gpu"]
            fits = len(found) == 1 and re.fullmatch(r"gpu(:[A-Za-z][\w.-]*)?(:[1-9][0-9]{0,3})?", found[0])
            require(bool(fits), "--gres", self.gres, "SLURM's gpu:NUMBER or gpu:TYPE:NUMBER, perhaps beside others")
            number = found[0].rpartition(":")[2]
            return int(number) if number.isdigit() else 1
        fits = re.fullmatch(r"([A-Za-z][\w.-]*:)?[0-9]{1,4}", self.gpus_per_node)
        require(bool(fits), "--gpus_per_node", self.gpus_per_node, "0 or more, or TYPE:NUMBER such as h100:8")
        return int(self.gpus_per_node.rpartition(":")[2])

    def gpu_request(self) -> dict[str, str]:
        """The job's request for GPUs, by the name of `sbatch`'s option; empty on the CPU."""
        if self.gres is not None:
            return {"gres": self.gres}
        return {"gpus_per_node": self.gpus_per_node} if self.gpus else {}


def main(words: Sequence[str]) -> Path | None:
    """Check all that would end the job only after its wait in the queue, then submit it.

    Args:
        words: The arguments of `slurm`.

    Returns:
        Path of the summary, which has the job's number; None after a dry run.
    """
    if not words or {"-h", "--help"} & set(words):
        usage = (
            f"{PROG} RECIPE --nodes N --gpus-per-node G [options] [--section.key VALUE ...]\n       "
            f"{PROG} prep --help\n       {PROG} predict --help\n       {PROG} evaluate --help"
        )
        print(help_of(SlurmOptions, PROG, usage))
        print(f"All other options are the configuration's; `{typed('train')} --help` lists them.")
        return None
    from pipeline.distributed.settings import resolve_precision  # seconds that --help does not wait for
    from pipeline.launch.plan import resolve

    own, overrides = parse_own(SlurmOptions, list(words), PROG)
    recipe = find_recipe(overrides.pop(0) if overrides and not overrides[0].startswith("-") else None)
    require(own.nodes >= 1, "--nodes", own.nodes, "1 or more")
    processes = own.gpus or own.processes_per_node
    require(processes >= 1, "--processes_per_node", processes, "1 or more")
    config, _ = parse_config(["--config", str(recipe), *overrides], PROG)
    usual = ACCELERATE_CONFIGS / ("multi_node.yaml" if own.gpus else "cpu_2.yaml")
    accelerate = find_configuration(own.config_file) if own.config_file else usual
    precision = resolve_precision(config.train.precision, bf16=own.gpus > 0)
    resolve(config, accelerate, own.nodes, own.nodes * processes, precision)
    for problem in find_problems(config, own.gpus):
        if not own.dry_run:
            raise UserError(problem)
        say(f"note: {problem}")
    launch = [
        sys.executable, "-m", "pipeline.launch.launcher", str(recipe), f"--config_file={accelerate}",
        f"--num_machines={own.nodes}", f"--num_processes={own.nodes * processes}",
    ]  # fmt: skip
    workers = USUAL_WORKERS if config.data.workers is None else config.data.workers
    resources = Resources(
        cpus_per_task=own.cpus_per_task or processes * (1 + workers),
        nodes=own.nodes, ntasks_per_node=1, signal=f"B:USR2@{NOTICE_S}", **own.gpu_request(),
        **{name: getattr(own, name) for name in ("mem", "time", "partition", "account", "qos")},
    )  # fmt: skip
    folder = Path(config.train.run).resolve()
    folder = folder.with_name(f"{folder.name}.slurm")
    launch += [f"--log_folder={folder / 'ranks'}", *([] if own.gpus else ["--cpu"]), *overrides]
    job = Job("train", script(launch, folder, own.requeue), resources, requeue=own.requeue)
    return submit([job], folder, own.dry_run)


def find_problems(config: Config, gpus_per_node: int) -> list[str]:
    """Problems that would end the job as soon as it starts, though a dry run may still print its script."""
    from pipeline.data.index import read_index
    from pipeline.data.inputs import check_inputs
    from pipeline.training.run_folder import RunFolder

    problems = missing_cuda(gpus_per_node)
    try:
        index = read_index(config.data.shards)
        check_inputs(index, config.model, config.data.allow_leaks)
        if RunFolder(Path(config.train.run)).check(config, index):
            problems.append(f"{config.train.run} is finished already; for another run choose another --train.run")
    except UserError as error:
        problems.append(str(error))
    return problems


def missing_cuda(gpus_per_node: int) -> list[str]:
    """The problem that this installation could use no GPU, if the job asks for any."""
    import torch

    if not gpus_per_node or torch.version.cuda is not None:
        return []
    return [
        f"torch {torch.__version__} of this installation has no CUDA, so GPUs would stand idle; "
        "install a torch that has, or give --gpus_per_node 0"
    ]


def script(launch: list[str], folder: Path, requeue: bool, name: str = "train", what: str = "training") -> str:
    """The part of the batch script below its directives.

    Args:
        launch: The launcher's arguments, without those that are known only inside the job.
        folder: Folder of the logs, absolute.
        requeue: Whether a stopped job queues again, to resume from what it has kept.
        name: Name of the job, for the names of its logs.
        what: What it does, for its messages.
    """
    return render(
        JOB, folder=shlex.quote(str(folder)), folder_pattern=shlex.quote(str(folder).replace("%", "%%")),
        command=shlex.join(launch), wait_s=LAST_WAIT_S, mistake=EXIT_USER, stopped=EXIT_STOPPED, requeue=requeue,
        name=name, what=what,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(sys.argv[1:])))
