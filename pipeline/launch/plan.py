"""What a launch will do, from an accelerate configuration, the DeepSpeed configuration that it names, and a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.distributed.settings import EngineSettings, engine_settings, find_deepspeed
from pipeline.errors import UserError
from pipeline.parsing.typed_json import Malformed, Positive, to_type
from pipeline.parsing.yaml_file import read_yaml


@dataclass(frozen=True)
class LaunchPlan:
    """A resolved launch."""

    accelerate: Path
    machines: int
    world_size: int
    engine: EngineSettings

    def __str__(self) -> str:
        """The launch in one readable line."""
        per_machine = self.world_size // self.machines
        files = f"{self.accelerate.name} and {self.engine.file.name}"
        machines = f"{self.machines} machine{'s' * (self.machines > 1)}"
        return f"{machines} x {per_machine} process{'es' * (per_machine > 1)}, by {files}"


def resolve(
    config: Config, accelerate: Path, num_machines: int | None, num_processes: int | None, precision: str
) -> LaunchPlan:
    """Resolve configuration, accelerate file and DeepSpeed file as a launch does.

    Args:
        config: The run's configuration.
        accelerate: The accelerate configuration.
        num_machines: Number of machines; None takes it from the accelerate configuration.
        num_processes: Number of processes over all machines; None takes it from the accelerate configuration.
        precision: "bf16" or "fp32".

    Raises:
        UserError: They do not work together; the message says why.
    """
    launch = read_accelerate(accelerate)
    for problem in accelerate_problems(launch):
        raise UserError(f"{accelerate}: {problem}")
    machines = num_machines or int(launch.get("num_machines", 1))
    world_size = num_processes or int(launch.get("num_processes", 1))
    if world_size % machines:
        raise UserError(
            f"{world_size} processes cannot be shared evenly among the {machines} machines; "
            "give another number of one of them"
        )
    deepspeed = find_deepspeed(launch["deepspeed_config"]["deepspeed_config_file"])
    return LaunchPlan(accelerate, machines, world_size, engine_settings(config, deepspeed, world_size, precision))


@dataclass(frozen=True)
class _DeepSpeed:
    deepspeed_config_file: str = ""


@dataclass(frozen=True)
class _Read:
    """What is read here of an accelerate configuration."""

    num_machines: Positive = 1
    num_processes: Positive = 1
    deepspeed_config: _DeepSpeed | None = None


def read_accelerate(path: Path) -> dict[str, Any]:
    """Read an accelerate configuration.

    Raises:
        UserError: The file is missing, or not a YAML mapping, or a value that is read here has another type.
    """
    settings = read_yaml(path)
    try:
        to_type(settings, _Read)
    except Malformed as error:
        raise UserError(f"{path}: {error}; correct it there") from error
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
        yield "deepspeed_config has no deepspeed_config_file, which says what ZeRO does, such as ds_configs/zero2.json"
    own = [key for key in ("zero_stage", "gradient_clipping", "gradient_accumulation_steps") if key in deepspeed]
    own += ["mixed_precision"] if launch.get("mixed_precision", "no") != "no" else []
    if own:
        yield f"{own[0]} must not stand beside a deepspeed_config_file; remove it, since the recipe decides it"
    remote = deepspeed.get("deepspeed_multinode_launcher", "standard") != "standard"
    if int(launch.get("num_machines", 1)) > 1 and remote:
        yield "deepspeed_multinode_launcher starts processes over ssh, past the launcher; set it to standard"
