"""What the DeepSpeed engine gets for a configuration and a DeepSpeed file, or one sentence why they do not work.

Training, `doctor` and `slurm` all call `engine_settings`, so none of them accepts what another refuses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config, TrainConfig, find_configuration
from pipeline.distributed.experts import check_grouped_mm, expert_settings, resolve_expert_parallel
from pipeline.errors import UserError, shown
from pipeline.parsing.typed_json import Malformed, load_json

DEFAULT_DEEPSPEED = "ds_configs/zero2.json"
# Sections that DeepSpeed 0.19.8 has removed and refuses at the start of a run.
REMOVED = ("amp", "eigenvalue", "elasticity", "nebula")
# Objects that are read here.
SECTIONS = ("zero_optimization", "fp16", "data_types", "offload_param", "offload_optimizer")
# Keys that the recipe decides, whatever the file has.
RECIPE_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
)  # fmt: skip


@dataclass(frozen=True)
class Batching:
    """How a batch is split: batch_size = world_size * micro_batch_size * accumulation."""

    batch_size: int
    """Samples per optimizer step, over all processes."""
    micro_batch_size: int
    """Samples of one process in one forward pass."""
    accumulation: int
    """Forward passes of one process per optimizer step."""


@dataclass(frozen=True)
class Sharding:
    """How the trained parameters are spread over processes."""

    world_size: int
    stage: int = 2
    """ZeRO stage."""
    expert_parallel: int = 1
    """Processes that share the experts of a layer."""
    offload: bool = False
    """Whether optimizer state is kept in the host's memory."""
    bucket: int = 0
    """Elements of the buffer in which gradients are reduced."""
    live: int = 0
    """Elements of gathered parameters that stage 3 keeps at once, at most."""
    adds_in_fp32: bool = False
    """Whether gradients are kept in fp32, which adds up micro-batches."""
    reduces_in_fp32: bool = False
    """Whether gradients are copied to fp32, which adds up processes."""

    @classmethod
    def of(cls, deepspeed: dict[str, Any], world_size: int, expert_parallel: int) -> Sharding:
        """Read the sharding from a DeepSpeed configuration."""
        zero = deepspeed.get("zero_optimization", {})
        buffers = 2 if zero.get("overlap_comm", False) else 1
        return cls(
            world_size=world_size,
            stage=zero.get("stage", 0),
            expert_parallel=expert_parallel,
            offload=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            bucket=int(zero.get("reduce_bucket_size", 5e8)) * buffers,
            live=int(zero.get("stage3_max_live_parameters", 1e9)),
            adds_in_fp32=deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32",
            reduces_in_fp32=deepspeed.get("communication_data_type") == "fp32",
        )


@dataclass(frozen=True)
class EngineSettings:
    """What the DeepSpeed engine of a run gets, and what follows from it."""

    file: Path
    """The DeepSpeed file that was read."""
    deepspeed: dict[str, Any]
    """The file's configuration with the recipe's values filled in, all of them numbers."""
    batching: Batching
    sharding: Sharding
    precision: str
    """"bf16" or "fp32"."""
    notes: tuple[str, ...]
    """Settings of the file or the recipe that have no effect, one sentence each."""


def engine_settings(config: Config, file: Path, world_size: int, precision: str) -> EngineSettings:
    """Combine a configuration and a DeepSpeed file, and refuse what does not work.

    Args:
        config: The run's configuration.
        file: DeepSpeed's JSON file. Batch size, accumulation, clipping and precision are the recipe's and are filled
            in here, so that one file fits every recipe and world size.
        world_size: Processes of the run.
        precision: "bf16" or "fp32", see `resolve_precision`.

    Raises:
        UserError: The two do not work together; the message says what is wrong and what to do.
    """
    deepspeed = read_deepspeed(file)
    for problem in deepspeed_problems(deepspeed):
        raise UserError(f"{file}: {problem}")
    batching = plan_batches(config.train, world_size)
    check_mixup(config.loss.mixup_alpha, batching)
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    check_stage(stage, precision, config.optim.name)
    check_accumulation(deepspeed, precision)
    experts = config.model.experts if config.model.head == "roadwork" else None
    wanted = config.train.expert_parallel
    size = resolve_expert_parallel(wanted, experts, world_size, stage, config.optim.grad_clip)
    check_grouped_mm(config.train.grouped_mm, config.model, size, precision)
    notes = [f"{key} of {file.name} is not used: the recipe decides it" for key in RECIPE_KEYS if key in deepspeed]
    if size < wanted:
        notes.append(f"train.expert_parallel is {wanted}, but one process alone keeps all experts")
    deepspeed |= {
        "train_micro_batch_size_per_gpu": batching.micro_batch_size,
        "gradient_accumulation_steps": batching.accumulation,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": precision == "bf16"},
        **expert_settings(size, precision),
    }
    sharding = Sharding.of(deepspeed, world_size, size)
    return EngineSettings(file, deepspeed, batching, sharding, precision, tuple(notes))


def resolve_precision(wanted: str, bf16: bool) -> str:
    """Decide between "bf16" and "fp32".

    Args:
        wanted: `train.precision`; `auto` is bf16 where the hardware computes in it.
        bf16: Whether the hardware of the run computes in bf16; for this machine `pipeline.devices.has_bf16`.

    Raises:
        UserError: bf16 is wanted where the hardware does not compute in it.
    """
    if wanted == "auto":
        return "bf16" if bf16 else "fp32"
    if wanted == "bf16" and not bf16:
        raise UserError("train.precision is 'bf16', but no GPU here computes in it; use 'auto' or 'fp32'")
    return wanted


def launched_file() -> Path:
    """The DeepSpeed file that the accelerate configuration of this launch names."""
    return find_deepspeed(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", DEFAULT_DEEPSPEED))


def find_deepspeed(name: str) -> Path:
    """The DeepSpeed file that an accelerate configuration names; see `find_configuration`."""
    return find_configuration(Path(name))


def read_deepspeed(file: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        UserError: The file is missing, or not a JSON object.
    """
    try:
        values = load_json(file.read_bytes())
    except (OSError, Malformed) as error:
        raise UserError(
            f"cannot read the DeepSpeed configuration {file} ({error}); name another file as deepspeed_config_file in "
            "the accelerate configuration"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"the DeepSpeed configuration {file} is not a JSON object, as {DEFAULT_DEEPSPEED} is")
    zero = values.get("zero_optimization", {})
    for name in SECTIONS:
        section = values.get(name, zero.get(name, {}) if isinstance(zero, dict) else {})
        if not isinstance(section, dict):
            raise UserError(f"{file}: {name} is {shown(section)}, but must be an object, as in {DEFAULT_DEEPSPEED}")
    return values


def deepspeed_problems(deepspeed: dict[str, Any]) -> Iterator[str]:
    """Why a DeepSpeed configuration cannot be used."""
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        yield f"zero_optimization.stage is {shown(stage)}, but must be 0, 1, 2 or 3"
        return
    for key in ("optimizer", "scheduler"):
        if key in deepspeed:
            yield f"it has the section {key}, but the recipe's own (optim) is used; take it out"
    for key in REMOVED:
        if key in deepspeed:
            yield f"it has the section {key}, which DeepSpeed 0.19.8 no longer knows; take it out"
    if deepspeed.get("fp16", {}).get("enabled", False):
        yield "fp16 is enabled, whose loss scaling would skip steps unseen; train.precision is bf16 or fp32"
    automatic = [key for key, value in {**zero, **deepspeed}.items() if value == "auto" and key not in RECIPE_KEYS]
    if automatic:
        yield f"{automatic[0]} is 'auto', which is not resolved here; write a number"
    if zero.get("offload_param", {}).get("device", "none") != "none" and stage != 3:
        yield f"offload_param needs stage 3, and this is stage {stage}"
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        if stage == 0:
            yield "offload_optimizer needs stage 1, 2 or 3, and this is stage 0"
        if deepspeed.get("zero_force_ds_cpu_optimizer", True):
            yield "offload_optimizer with the recipe's optimizer needs zero_force_ds_cpu_optimizer: false"
    if stage > 0 and not deepspeed.get("zero_allow_untested_optimizer", False):
        yield "zero_allow_untested_optimizer must be true, or DeepSpeed refuses the recipe's optimizer"


def check_stage(stage: int, precision: str, optimizer: str) -> None:
    """Refuse a ZeRO stage that does not go with a precision or an optimizer."""
    if stage == 0 and precision == "bf16":
        raise UserError(
            "the DeepSpeed configuration has ZeRO stage 0, where bf16 weights have no fp32 masters that a checkpoint "
            "could hold by name; use stage 1, which computes the same, or train.precision fp32"
        )
    if stage == 3 and optimizer == "sophia_h":
        raise UserError(
            "optim.name sophia_h needs ZeRO stage 0, 1 or 2: at stage 3 no process has whole weights to take second "
            "derivatives by; use such a stage, or sophia_g, which needs first derivatives only"
        )


def check_accumulation(deepspeed: dict[str, Any], precision: str) -> None:
    """Refuse fp32 sums of bf16 gradients at ZeRO stage 1.

    DeepSpeed wraps the recipe's optimizer there in another class, `BF16_Optimizer`, with which the estimates of
    `sophia_h` are off by 42 % of a parameter's largest value, in the median, instead of by 1 % (measured on a CPU).
    """
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    wanted = deepspeed.get("data_types", {}).get("grad_accum_dtype")
    if stage == 1 and precision == "bf16" and wanted == "fp32":
        raise UserError(
            "the DeepSpeed configuration has data_types.grad_accum_dtype fp32 at ZeRO stage 1, which does not work in "
            "bf16; use stage 2, or take it out: gradients of a process's micro-batches are then added in bf16"
        )


def plan_batches(config: TrainConfig, world_size: int) -> Batching:
    """Split `train.batch_size` evenly, with the largest allowed micro-batch that divides a process's share.

    Raises:
        UserError: The batch cannot be shared evenly among the processes.
    """
    share, rest = divmod(config.batch_size, world_size)
    if rest or share == 0:
        below, above = max(1, share) * world_size, (share + 1) * world_size
        raise UserError(
            f"train.batch_size is {config.batch_size}, which {world_size} processes cannot share evenly; "
            f"choose {below} or {above}"
        )
    micro = next(size for size in range(min(share, config.micro_batch_size), 0, -1) if share % size == 0)
    return Batching(config.batch_size, micro, share // micro)


def check_mixup(alpha: float, batching: Batching) -> None:
    """Refuse mixup where a forward pass has no second photo to mix with.

    Args:
        alpha: `loss.mixup_alpha`.
        batching: The run's batching.

    Raises:
        UserError: Each forward pass has a single photo.
    """
    if alpha > 0 and batching.micro_batch_size == 1:
        raise UserError(
            f"loss.mixup_alpha is {alpha:g}, but each forward pass has one photo and nothing to mix it with; raise "
            "train.micro_batch_size, or train.batch_size, to two per process or more, or set loss.mixup_alpha to 0"
        )


def describe_engine(engine: EngineSettings, config: Config) -> Iterator[tuple[str, str]]:
    """What the engine will do, as (about, text)."""
    batching, sharding = engine.batching, engine.sharding
    yield (
        "batch",
        f"{batching.batch_size} photos per optimizer step = {sharding.world_size} processes x "
        f"{batching.micro_batch_size} x {batching.accumulation} accumulated",
    )
    clip = config.optim.grad_clip
    yield "clipping", f"the gradient's global norm is cut to {clip:g}, by DeepSpeed" if clip else "none"
    yield (
        "precision",
        {
            "bf16": "bf16 in the forward and backward pass; fp32 master weights, moments and average",
            "fp32": "fp32 throughout",
        }[engine.precision],
    )
    spread = {
        0: "every process holds all optimizer state",
        1: "optimizer state is spread over the processes",
        2: "gradients and optimizer state are spread over the processes",
        3: "weights, gradients and optimizer state are spread over the processes",
    }[sharding.stage]
    where = "; it is kept in the host's memory" if sharding.offload else ""
    yield "zero", f"stage {sharding.stage}: {spread}{where}"
    if config.model.head == "roadwork":
        experts, size = config.model.experts, sharding.expert_parallel
        groups = sharding.world_size // size
        shared = f"{experts // size} on each of {size} processes" + f", in {groups} such groups" * (groups > 1)
        yield "experts", f"{experts} per layer, {shared if size > 1 else 'all on every process'}"
