"""What an accelerate configuration, the DeepSpeed configuration that it names and a recipe come to together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.distributed.experts import expert_settings, resolve_expert_parallel
from pipeline.distributed.startup import check_stage, read_ds_config
from pipeline.errors import UserError
from pipeline.memory import Sharding
from pipeline.plan import Batching, plan_batches

ROOT = Path(__file__).resolve().parents[1]
# Sections that DeepSpeed 0.19.8 no longer has, and that it refuses at the start of a run.
REMOVED = ("amp", "eigenvalue", "elasticity", "nebula")
# What the recipe decides; `pipeline.distributed.start` writes it over whatever the file says.
OF_THE_RECIPE = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
)  # fmt: skip


@dataclass(frozen=True)
class LaunchPlan:
    """A resolved launch."""

    accelerate: Path
    deepspeed: Path
    machines: int
    world_size: int
    precision: str
    """"bf16" or "fp32"."""
    batching: Batching
    settings: dict[str, Any]
    """The DeepSpeed configuration, as the engine gets it."""
    sharding: Sharding
    notes: tuple[str, ...]
    """What the files say and nobody listens to."""


def resolve(
    config: Config, accelerate: Path, num_machines: int | None, num_processes: int | None, precision: str
) -> LaunchPlan:
    """Put the three together as a launch does.

    Args:
        config: Of the run.
        accelerate: The accelerate configuration.
        num_machines: None for what the file says.
        num_processes: Over all machines; None for what the file says.
        precision: "bf16" or "fp32".

    Raises:
        UserError: They do not work together; the sentence says why.
    """
    launch = read_accelerate(accelerate)
    problem = next(accelerate_problems(launch), None)
    if problem is not None:
        raise UserError(f"{accelerate}: {problem}")
    path = Path(launch["deepspeed_config"]["deepspeed_config_file"])
    path = path if path.exists() else ROOT / path
    settings = read_ds_config(path)
    problem = next(deepspeed_problems(settings), None)
    if problem is not None:
        raise UserError(f"{path}: {problem}")
    machines = num_machines or int(launch.get("num_machines", 1))
    world_size = num_processes or int(launch.get("num_processes", 1))
    if world_size % machines:
        raise UserError(
            f"{world_size} processes cannot be shared evenly among the {machines} machines; "
            "give another number of one of them"
        )
    batching = plan_batches(config.train, world_size)
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    check_stage(stage, precision, config.optim.name)
    experts = config.model.experts if config.model.head == "roadwork" else None
    wanted = config.train.expert_parallel
    size = resolve_expert_parallel(wanted, experts, world_size, stage, config.optim.grad_clip)
    notes = [f"{key} of {path.name} gives way to the recipe's" for key in OF_THE_RECIPE if key in settings]
    if size < wanted:
        notes.append(f"train.expert_parallel is {wanted}, but one process alone keeps all experts")
    settings |= {
        "train_micro_batch_size_per_gpu": batching.micro_batch_size,
        "gradient_accumulation_steps": batching.accumulation,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": precision == "bf16"},
        **expert_settings(size, precision),
    }
    sharding = Sharding.of(settings, world_size, size)
    return LaunchPlan(accelerate, path, machines, world_size, precision, batching, settings, sharding, tuple(notes))


def read_accelerate(path: Path) -> dict[str, Any]:
    """Read an accelerate configuration.

    Raises:
        UserError: It is not there, or no YAML mapping.
    """
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the accelerate configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"the accelerate configuration {path} is not a mapping; see accelerate_configs/")
    return settings


def accelerate_problems(launch: dict[str, Any]) -> Iterator[str]:
    """Why an accelerate configuration cannot be used."""
    kind = launch.get("distributed_type")
    if kind != "DEEPSPEED":
        yield f"distributed_type is {kind!r}, but training runs on a DeepSpeed engine; set it to DEEPSPEED"
    if launch.get("use_cpu"):
        yield "use_cpu is true, with which accelerate turns DeepSpeed off; set it to false, even without GPUs"
    deepspeed = launch.get("deepspeed_config") or {}
    if "deepspeed_config_file" not in deepspeed:
        yield "deepspeed_config has no deepspeed_config_file, which says what ZeRO does; name one of ds_configs/"
    own = [key for key in ("zero_stage", "gradient_clipping", "gradient_accumulation_steps") if key in deepspeed]
    own += ["mixed_precision"] if launch.get("mixed_precision", "no") != "no" else []
    if own:
        yield f"{own[0]} stands here, where accelerate refuses it beside a deepspeed_config_file; the recipe decides it"
    remote = deepspeed.get("deepspeed_multinode_launcher", "standard") != "standard"
    if int(launch.get("num_machines", 1)) > 1 and remote:
        yield "deepspeed_multinode_launcher starts processes over ssh, past the launcher; set it to standard"


def deepspeed_problems(settings: dict[str, Any]) -> Iterator[str]:
    """Why a DeepSpeed configuration cannot be used."""
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage is {stage!r}, but must be 0, 1, 2 or 3"
    for key in ("optimizer", "scheduler"):
        if key in settings:
            yield f"it has the section {key}, but the recipe's own (optim) is used; take it out"
    for key in REMOVED:
        if key in settings:
            yield f"it has the section {key}, which DeepSpeed 0.19.8 no longer knows; take it out"
    if settings.get("fp16", {}).get("enabled", False):
        yield "fp16 is enabled, whose loss scaling would skip steps unseen; train.precision is bf16 or fp32"
    automatic = [key for key, value in {**zero, **settings}.items() if value == "auto" and key not in OF_THE_RECIPE]
    if automatic:
        yield f"{automatic[0]} is 'auto', which nobody resolves here; write a number"
    if zero.get("offload_param", {}).get("device", "none") != "none" and stage != 3:
        yield f"offload_param needs stage 3, and this is stage {stage}"
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        if stage == 0:
            yield "offload_optimizer needs stage 1, 2 or 3, and this is stage 0"
        if settings.get("zero_force_ds_cpu_optimizer", True):
            yield "offload_optimizer with the recipe's optimizer needs zero_force_ds_cpu_optimizer: false"
    if stage > 0 and not settings.get("zero_allow_untested_optimizer", False):
        yield "zero_allow_untested_optimizer must be true, or DeepSpeed refuses the recipe's optimizer"


def describe(plan: LaunchPlan, config: Config) -> Iterator[tuple[str, str]]:
    """What will really happen, as (about, text)."""
    per_machine = plan.world_size // plan.machines
    yield (
        "launch",
        f"{plan.machines} machines x {per_machine} processes, by {plan.accelerate.name} and {plan.deepspeed.name}",
    )
    clip = config.optim.grad_clip
    yield "clipping", f"the gradient's global norm is cut to {clip:g}, by DeepSpeed" if clip else "none"
    yield (
        "precision",
        {
            "bf16": "bf16 in the forward and backward pass; fp32 master weights, moments and average",
            "fp32": "fp32 throughout",
        }[plan.precision],
    )
    sharding = plan.sharding
    shared = {
        0: "every process holds all optimizer state",
        1: "optimizer state is spread over the processes",
        2: "gradients and optimizer state are spread over the processes",
        3: "weights, gradients and optimizer state are spread over the processes",
    }[sharding.stage]
    where = "; it waits in the host's memory" if sharding.offload else ""
    yield "zero", f"stage {sharding.stage}: {shared}{where}"
    if config.model.head == "roadwork":
        experts, size = config.model.experts, sharding.expert_parallel
        groups = plan.world_size // size
        spread = f"{experts // size} on each of {size} processes, in {groups} such groups"
        yield "experts", f"{experts} per layer, {spread if size > 1 else 'all on every process'}"
