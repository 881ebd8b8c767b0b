"""The checks of `doctor`: installation, configurations, data, what a launch would do, and whether the machine has room.

Those of the machine itself are in `machine_checks`.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
import yaml
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from packaging.requirements import Requirement
from transformers import AutoConfig, DINOv3ViTConfig

from pipeline.config import ACCELERATE_CONFIGS, RECIPES, Config, read_config
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import Index, read_index
from pipeline.data.inputs import check_inputs, fields_read, leaking_inputs
from pipeline.data.photo import simplejpeg
from pipeline.data.storage import is_url
from pipeline.devices import has_bf16, uses_gpu
from pipeline.distributed.settings import describe_engine, find_deepspeed, read_deepspeed, resolve_precision
from pipeline.errors import UserError, in_checkout, typed
from pipeline.launch.findings import BAD, GIB, GOOD, NOTE, Finding, print_findings
from pipeline.launch.launcher import choose_launch
from pipeline.launch.machine_checks import backbone, cards, host_memory, machine, network, shared_memory
from pipeline.launch.plan import LaunchPlan, resolve
from pipeline.model.backbone import SCENES_TINY, VITH16PLUS, vith16plus_config
from pipeline.training.loader import workers_of
from pipeline.training.memory import copy_bytes, count, need, waiting_bytes
from pipeline.training.plan import describe_sampling, describe_schedule, plan_sampling, plan_schedule

__all__ = ["BAD", "GOOD", "NOTE", "check", "print_findings"]

ROOM = 0.9  # share of a GPU's memory; the context, the allocator's gaps and cuBLAS take the rest


def check(
    config: Config,
    config_file: Path | None,
    num_machines: int | None,
    num_processes: int | None,
    gpu_gib: float | None,
) -> tuple[list[Finding], dict[str, Any]]:
    """Run all checks; see the command `doctor` for the arguments.

    Returns:
        The lines of the table, and the DeepSpeed engine's configuration, empty where no engine can be made.
    """
    elsewhere = gpu_gib is not None and not uses_gpu()
    weights = backbone(config.model.backbone, not elsewhere)
    findings = [*machine(), *installation(), *configurations(), weights, *data(config)]
    gpu_gib = gpu_gib or min((card.total_memory / GIB for card in cards()), default=None)
    try:
        chosen, processes = choose_launch(config_file, num_processes, idle_gpu=True)
        precision = resolve_precision(config.train.precision, elsewhere or has_bf16())
        launch = resolve(config, chosen, num_machines, processes, precision)
        findings += [*plan(config, launch), *memory(config, launch, gpu_gib), *network(launch.machines, not elsewhere)]
        if not elsewhere:
            findings += room(config, launch)
    except UserError as error:
        return [*findings, Finding(BAD, "launch", str(error))], {}
    return findings, launch.engine.deepspeed


def installation() -> Iterator[Finding]:
    """Check Python, and the version of every dependency."""
    yield Finding(GOOD, "python", platform.python_version())
    wrong = []
    for line in requires("roadwork") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, not {requirement.specifier}")
    text = "; ".join(wrong) or f"complete (torch {torch.__version__}, deepspeed {version('deepspeed')})"
    remedy = f"`{typed('setup')}` installs them" if in_checkout() else "install roadwork again with pip"
    yield Finding(BAD if wrong else GOOD, "packages", f"{text}; {remedy}" if wrong else text)
    if simplejpeg is None:
        yield Finding(NOTE, "jpeg", "simplejpeg is missing: Pillow decodes, at about half the speed")


def configurations() -> Iterator[Finding]:
    """Check every accelerate configuration, its DeepSpeed file, and every recipe."""
    problems = []
    for path in sorted(ACCELERATE_CONFIGS.glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        try:
            read_deepspeed(find_deepspeed(settings["deepspeed_config"]["deepspeed_config_file"]))
        except (UserError, KeyError) as error:
            problems.append(f"{path.name}: {error}")
    recipes = sorted(RECIPES.glob("*.yaml"))
    for path in recipes:
        try:
            read_config(path)
        except UserError as error:
            problems.append(f"{path.name}: {error}")
    text = "; ".join(problems) or f"all load; recipes: {', '.join(p.stem for p in recipes)}"
    yield Finding(BAD if problems else GOOD, "configs", text)


def data(config: Config) -> Iterator[Finding]:
    """Check the index, and decode one sample of each split into its views."""
    folder = config.data.shards
    if not is_url(folder) and not Path(folder).exists():
        yield Finding(NOTE, "data", f"no shards at {folder} yet; `{typed('prep shard')}` makes them from photos")
        return
    try:
        index = read_index(folder)
        for name, split in index.splits.items():
            if split.samples:
                _ = ShardDataset(folder, index, name, config.input_spec)[0]
    except UserError as error:
        yield Finding(BAD, "data", str(error))
        return
    counts = ", ".join(f"{name} {len(split.samples)}" for name, split in index.splits.items())
    yield Finding(GOOD, "data", f"{folder}: {counts}; a sample of each split decodes")
    yield inputs(config, index)


def inputs(config: Config, index: Index) -> Finding:
    """Check that the shards have the metadata that the model reads, and whether it leaks the label."""
    try:
        check_inputs(index, config.model, config.data.allow_leaks)
    except UserError as error:
        return Finding(BAD, "metadata", str(error))
    leaks = leaking_inputs(index, config.model)
    named = [f"{name} (leaks the label)" if name in leaks else name for name in fields_read(config.model)]
    return Finding(NOTE if leaks else GOOD, "metadata", f"the model reads {', '.join(named) or 'none'}")


def plan(config: Config, launch: LaunchPlan) -> Iterator[Finding]:
    """What `train` would do with the recipe and the configurations."""
    yield Finding(GOOD, "launch", str(launch))
    yield from (Finding(GOOD, *line) for line in describe_engine(launch.engine, config))
    yield from (Finding(NOTE, "launch", note) for note in launch.engine.notes)
    try:
        split = read_index(config.data.shards).split("train")
    except UserError:
        return  # `data` says so
    schedule, sampling = plan_schedule(config, len(split.samples)), plan_sampling(config, split)
    lines = (*describe_schedule(config, schedule), *describe_sampling(sampling))
    yield from (Finding(GOOD, *line) for line in lines)


def memory(config: Config, launch: LaunchPlan, gpu_gib: float | None) -> Iterator[Finding]:
    """Estimate the memory of one process, and check that a GPU has it."""
    backbone = backbone_config(config.model.backbone)
    if backbone is None:
        yield Finding(NOTE, "memory", f"not known before {config.model.backbone} is on this machine")
        return
    engine = launch.engine
    wanted = need(config, backbone, engine.precision, engine.sharding, engine.batching.micro_batch_size)
    parts = {
        "trained weights, gradients, optimizer and average": wanted.states,
        "buffers": wanted.buffers,
        "frozen backbone": wanted.backbone,
        f"activations of {launch.engine.batching.micro_batch_size} photos": wanted.activations,
    }
    listed = ", ".join(f"{part / GIB:.2f} {name}" for name, part in parts.items())
    text = f"{wanted.device / GIB:.2f} GiB per process: {listed}"
    if wanted.host:
        text += f"; and {wanted.host / GIB:.2f} of the host's"
    if gpu_gib is None:
        yield Finding(GOOD, "memory", text)
    elif wanted.device < ROOM * gpu_gib * GIB:
        yield Finding(GOOD, "memory", f"{text}; the GPU has {gpu_gib:.0f}")
    else:
        fits = wanted.device < gpu_gib * GIB
        way_out = "a smaller train.micro_batch_size needs less, at the same batch"
        yield Finding(NOTE if fits else BAD, "memory", f"{text}; the GPU has only {gpu_gib:.0f}: {way_out}")
    theirs = deepspeed_estimate(count(config, backbone).trained, launch)
    if theirs is not None:
        text = f"DeepSpeed's own estimate of the trained part, without the average: {theirs:.2f} GiB"
        yield Finding(GOOD, "memory", text)


def room(config: Config, launch: LaunchPlan) -> Iterator[Finding]:
    """Check that this machine has room for what its processes keep in the host's memory."""
    backbone = backbone_config(config.model.backbone)
    if backbone is None:
        return  # `memory` says so
    engine, processes = launch.engine, launch.world_size // launch.machines
    micro_batch = engine.batching.micro_batch_size
    waiting = processes * waiting_bytes(config, backbone, workers_of(config.data), micro_batch)
    yield from shared_memory(waiting, processes)
    wanted = need(config, backbone, engine.precision, engine.sharding, micro_batch)
    # With a GPU the host has the backbone's weights for as long as they are read from the checkpoint.
    own = wanted.backbone if uses_gpu() else wanted.device
    saved = copy_bytes(count(config, backbone))  # the first process's alone
    yield host_memory(processes * (wanted.host + own) + waiting + saved, processes)


def deepspeed_estimate(trained: int, launch: LaunchPlan) -> float | None:
    """GiB of one GPU by DeepSpeed's estimator; None but for stages 2 and 3 in bf16 without sharded experts."""
    sharding, per_machine = launch.engine.sharding, launch.world_size // launch.machines
    if launch.engine.precision != "bf16" or sharding.stage < 2 or sharding.expert_parallel > 1:
        return None
    places = {"num_gpus_per_node": per_machine, "num_nodes": launch.machines, "cpu_offload": sharding.offload}
    if sharding.stage == 2:
        _, device = estimate_zero2_model_states_mem_needs(trained, **places)
    else:
        _, device, _ = estimate_zero3_model_states_mem_needs(trained, trained, cpu_offload_params=False, **places)
    return float(device) / GIB


def backbone_config(name: str) -> DINOv3ViTConfig | None:
    """The backbone's configuration if it is known or on this machine; None otherwise."""
    if name == VITH16PLUS:
        return vith16plus_config()
    folder = str(SCENES_TINY) if name == "scenes-tiny" else name
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, DINOv3ViTConfig) else None
