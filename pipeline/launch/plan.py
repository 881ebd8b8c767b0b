"""What a launch will do, from an accelerate configuration, the DeepSpeed configuration that it names, and a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import ACCELERATE_CONFIGS, Config
from pipeline.distributed.settings import EngineSettings, engine_settings, find_deepspeed
from pipeline.errors import UserError


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
        return f"{self.machines} machines x {per_machine} processes, by {files}"


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


def read_accelerate(path: Path) -> dict[str, Any]:
    """Read an accelerate configuration.

    Raises:
        UserError: The file is missing, or not a YAML mapping.
    """
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the accelerate configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"the accelerate configuration {path} is not a mapping, as those in {ACCELERATE_CONFIGS} are")
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
