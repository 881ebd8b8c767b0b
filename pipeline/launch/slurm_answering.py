"""`slurm predict` and `slurm evaluate`: the GPUs of one node or of several answer, after preemptions too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cli import Parser, help_of, parse, parse_own
from pipeline.config import ACCELERATE_CONFIGS, find_configuration
from pipeline.errors import UserError, require, run, typed
from pipeline.launch.slurm import Job, Resources, submit
from pipeline.launch.slurm_train import NOTICE_S, SlurmOptions, missing_cuda, script
from pipeline.progress import say

# A GPU answers as fast as several cores decode; on CPUs the passes need the cores themselves.
CORES_PER_GPU, CORES_PER_CPU_PROCESS = 8, 2


@dataclass(frozen=True)
class AnsweringOptions(SlurmOptions):
    """Write a batch script that predicts or evaluates in one process per GPU, and submit it.

    When SLURM takes the nodes away, the job queues again. A prediction then goes on after the answers that are kept.
    """

    cpus_per_task: int | None = None
    """Cores per node; by default one per process and one for each of its --workers, or 8 for each GPU."""


def main(words: Sequence[str]) -> Path | None:
    """Check all that would end the job only after its wait in the queue, then submit it.

    Args:
        words: `predict` or `evaluate`, and the arguments.

    Returns:
        Path of the summary, which has the job's number; None after a dry run.
    """
    command, *arguments = words
    prog = typed(f"slurm {command}")
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_of(AnsweringOptions, prog, f"{prog} --nodes N --gpus-per-node G [options]"))
        print(f"All other options are the command's; `{typed(command)} --help` lists them.")
        return None
    own, rest = parse_own(AnsweringOptions, arguments, prog)
    require(own.nodes >= 1, "--nodes", own.nodes, "1 or more")
    processes = own.gpus or own.processes_per_node
    require(processes >= 1, "--processes_per_node", processes, "1 or more")
    # By name, since commands lie above the rooms that they use.
    values = parse(Parser(prog=prog), [getattr(importlib.import_module(f"pipeline.{command}"), command)], rest)
    for problem in find_problems(command, values, own.gpus):
        if not own.dry_run:
            raise UserError(problem)
        say(f"note: {problem}")
    usual = ACCELERATE_CONFIGS / ("multi_node.yaml" if own.gpus else "cpu_2.yaml")
    accelerate = find_configuration(own.config_file) if own.config_file else usual
    if not accelerate.is_file():
        raise UserError(f"there is no accelerate configuration {accelerate}; see {ACCELERATE_CONFIGS}")
    launch = [
        sys.executable, "-m", "pipeline.launch.answering", command, f"--config_file={accelerate}",
        f"--num_machines={own.nodes}", f"--num_processes={own.nodes * processes}",
        *([] if own.gpus else ["--cpu"]), *rest,
    ]  # fmt: skip
    usual_cores = CORES_PER_GPU if own.gpus else CORES_PER_CPU_PROCESS
    cores = usual_cores if values["workers"] is None else 1 + values["workers"]
    resources = Resources(
        cpus_per_task=own.cpus_per_task or processes * cores,
        nodes=own.nodes, ntasks_per_node=1, signal=f"B:USR2@{NOTICE_S}", **own.gpu_request(),
        **{name: getattr(own, name) for name in ("mem", "time", "partition", "account", "qos")},
    )  # fmt: skip
    made = Path(values["output"] if command == "predict" else f"{values['run']}-evaluate").resolve()
    folder = made.with_name(f"{made.name}.slurm")
    job = Job(command, script(launch, folder, own.requeue, command, command), resources, requeue=own.requeue)
    return submit([job], folder, own.dry_run)


def find_problems(command: str, values: dict[str, Any], gpus_per_node: int) -> list[str]:
    """Problems that would end the job as soon as it starts, though a dry run may still print its script.

    Args:
        command: `predict` or `evaluate`.
        values: Its arguments, by name.
        gpus_per_node: GPUs that the job asks for on each node.
    """
    from pipeline.data.index import read_index
    from pipeline.evaluation.photo_list import check_inputs
    from pipeline.evaluation.prediction import check_output
    from pipeline.model.model_folder import read_values
    from pipeline.training.run_folder import RunFolder

    problems = missing_cuda(gpus_per_node)
    try:
        if command == "predict":
            check_output(values["output"])
            check_inputs(values["input"], values["list"])
            read_values(values["model"])
        else:
            folder = RunFolder.open(values["run"])
            read_values(folder.model)
            read_index(values["shards"] or folder.config().data.shards)
    except UserError as error:
        problems.append(str(error))
    return problems


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(sys.argv[1:])))
