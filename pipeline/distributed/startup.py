"""Process start-up: Accelerate on top of DeepSpeed, on gloo or NCCL, with numbers instead of "auto"."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from datetime import timedelta
from typing import NoReturn
from unittest.mock import patch

from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from transformers.integrations import unset_hf_deepspeed_config

from pipeline.data.allocator import keep_freed_memory
from pipeline.devices import gpu_count, refuse_idle_gpu, uses_gpu
from pipeline.distributed.settings import EngineSettings
from pipeline.errors import UserError, typed

COLLECTIVES_LATER_MINUTES = 2.0


def start(engine: EngineSettings, log_with: list[str], hang_minutes: float) -> Accelerator:
    """Join the process group and return an `Accelerator` with DeepSpeed under it.

    Args:
        engine: Settings from `engine_settings` for as many processes as were started.
        log_with: Accelerate trackers to start.
        hang_minutes: How long a process may be waited for; collectives time out later than the watchdog, which can
            report where threads hang.

    Raises:
        UserError: There is a GPU that torch cannot use, or there are fewer GPUs than processes.
    """
    refuse_idle_gpu(f"--cpu to `{typed('train')}`")
    on_gpu = uses_gpu()
    if on_gpu:
        refuse_shared_gpu()
    else:
        keep_freed_memory()
        _skip_shared_memory_kernel()
    _without_launcher()
    _leave_muon_uncompiled()
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=engine.deepspeed, zero3_init_flag=False),
        kwargs_handlers=[
            InitProcessGroupKwargs(
                backend="nccl" if on_gpu else "gloo",
                timeout=timedelta(minutes=hang_minutes + COLLECTIVES_LATER_MINUTES),
            )
        ],
        gradient_accumulation_steps=engine.batching.accumulation,
        log_with=log_with or None,
    )
    # transformers would load the frozen backbone in pieces under ZeRO-3; the engine never sees it, so it stays whole.
    unset_hf_deepspeed_config()
    # Without a matching backend every rank believes it is alone, and trains on all of the data.
    assert accelerator.num_processes == engine.sharding.world_size
    return accelerator


def world_size() -> int:
    """The number of processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_shared_gpu() -> None:
    """Refuse more processes on this machine than it has GPUs: NCCL needs one for each.

    Raises:
        UserError: There are too few GPUs; the message has both numbers and the ways out.
    """
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), gpu_count()
    if processes > gpus:
        raise UserError(
            f"{processes} processes were started on a machine with {gpus} GPU{'s' * (gpus > 1)}, and each needs one; "
            f"use accelerate_configs/gpu.yaml with --num_processes {gpus}, or set DS_ACCELERATOR=cpu to compute on the "
            "CPU"
        )


def end_process(status: int) -> NoReturn:
    """End this process with an exit status, after its exit handlers but without Python's own clean-up.

    A thread of gloo may hold tensors for a moment after the last collective. Freed while the interpreter is taken down,
    they abort the process (pytorch#179291), and the launcher takes a finished training for a failed one.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _without_launcher() -> None:
    """Let `python pipeline/train.py` run as one process, as if `accelerate launch` had started it."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _skip_shared_memory_kernel() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce: a minute of g++ for no gain at this size."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _leave_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimizer as the engine would, but uncompiled: it is not used, and that takes seconds."""
    from deepspeed.runtime import compiler

    with patch.object(compiler, "compile", lambda: compiler.dummy_decorator):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
