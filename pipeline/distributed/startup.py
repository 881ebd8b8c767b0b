"""Process start-up: Accelerate on top of DeepSpeed, on gloo or NCCL, with numbers instead of "auto"."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from transformers.integrations import unset_hf_deepspeed_config

from pipeline.data.memory import keep_freed_memory
from pipeline.distributed.experts import expert_settings, resolve_expert_parallel
from pipeline.errors import UserError

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
COLLECTIVES_LATER_MINUTES = 2.0


def start(
    *,
    batch_size: int,
    accumulation: int,
    grad_clip: float,
    precision: str,
    log_with: list[str],
    hang_minutes: float,
    expert_parallel: int = 1,
    experts: int | None = None,
    optimizer: str = "adamw",
) -> Accelerator:
    """Join the process group and return an `Accelerator` with DeepSpeed under it.

    The ZeRO settings come from the file that the accelerate configuration names; batch size, accumulation, clipping
    and precision are the recipe's and are filled in here, so that one file serves every recipe and world size.

    Args:
        batch_size: Samples of one process in one micro-batch.
        accumulation: Micro-batches in one optimizer step.
        grad_clip: Largest norm of the global gradient, 0 for none.
        precision: "bf16" or "fp32", see `resolve_precision`.
        log_with: Accelerate trackers to start.
        hang_minutes: How long a process may be waited for; collectives give up later than the watchdog, which can say
            where the others stand.
        expert_parallel: Over how many processes a layer's experts are to be spread.
        experts: Experts per layer; None where the model has none.
        optimizer: `optim.name`.

    Raises:
        UserError: A combination that DeepSpeed cannot do.
    """
    _without_launcher()
    settings = ds_settings()
    settings |= {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": grad_clip,
        "bf16": {"enabled": precision == "bf16"},
    }
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    check_stage(stage, precision, optimizer)
    size = resolve_expert_parallel(expert_parallel, experts, int(os.environ["WORLD_SIZE"]), stage, grad_clip)
    settings |= expert_settings(size, precision)
    if not torch.cuda.is_available():
        keep_freed_memory()
        _skip_shared_memory_kernel()
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False),
        kwargs_handlers=[
            InitProcessGroupKwargs(
                backend="nccl" if torch.cuda.is_available() else "gloo",
                timeout=timedelta(minutes=hang_minutes + COLLECTIVES_LATER_MINUTES),
            )
        ],
        gradient_accumulation_steps=accumulation,
        log_with=log_with or None,
    )
    # transformers would load the frozen backbone in pieces under ZeRO-3; the engine never sees it, so it stays whole.
    unset_hf_deepspeed_config()
    # Without a matching backend every rank believes it is alone, and trains on all of the data.
    assert accelerator.num_processes == int(os.environ["WORLD_SIZE"])
    return accelerator


def check_stage(stage: int, precision: str, optimizer: str = "adamw") -> None:
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


def on_rank_zero(action: Callable[[], T]) -> T:
    """Let rank 0 act and every rank have the result. Collective.

    Raises:
        UserError: On every rank, where it was raised on rank 0; the others must not wait for one that left.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [action(), None]
        except UserError as error:
            outcome = [None, str(error)]
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    result: T = outcome[0]
    return result


def on_all_ranks(action: Callable[[], T]) -> T:
    """Let every rank act for itself, and end them all where one cannot go on. Collective.

    Raises:
        UserError: On every rank, where it was raised on one; the others would wait for that one, or report its
            absence instead of its reason.
    """
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    failed = torch.tensor(float(problem is not None), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(failed)
    if failed:
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        raise UserError(next(text for text in problems if text is not None))
    return cast(T, result)


def resolve_precision(wanted: str) -> str:
    """ "auto" is bf16 on a GPU that computes in it and fp32 elsewhere; bf16 without hardware is refused."""
    supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if supported else "fp32"
    if wanted == "bf16" and not supported:
        raise UserError("train.precision is 'bf16', but no GPU here computes in it; use 'auto' or 'fp32'")
    return wanted


def ds_settings() -> dict[str, Any]:
    """The DeepSpeed settings that the accelerate configuration of this launch names."""
    path = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds_configs/zero2.json"))
    # A relative path is the project's own file, wherever the command was given, unless there is one in that place.
    return read_ds_config(path if path.exists() else ROOT / path)


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file; a missing or malformed one is a `UserError`."""
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"cannot read the DeepSpeed configuration {path} ({error}); start from the project's root, or name "
            "another file as deepspeed_config_file in the accelerate configuration"
        ) from error
    return settings


def _without_launcher() -> None:
    """Let `python pipeline/train.py` work as one process, as if `accelerate launch` had started it."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _skip_shared_memory_kernel() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce: a minute with g++, to gain nothing at this size."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
