"""Process start-up: Accelerate on top of DeepSpeed, on gloo or NCCL, with numbers instead of "auto"."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from transformers.integrations import unset_hf_deepspeed_config

from pipeline.data.allocator import keep_freed_memory
from pipeline.devices import gpu_count, refuse_idle_gpu, uses_gpu
from pipeline.distributed.agreement import collective_timeout
from pipeline.distributed.settings import EngineSettings
from pipeline.errors import EXIT_FAILED, UserError, run, typed


def choose_kernels(deterministic: bool) -> None:
    """Choose among the kernels of a GPU, before the first of them runs.

    Args:
        deterministic: Whether to take kernels that add in a fixed order where there are such; torch names the others in
            a warning.
    """
    # cuDNN's backward of attention gives NaN on an H100 for some lengths with a mask (pytorch#196678), and plans anew
    # for each length. The head's attention is short, so nothing is lost with the other kernels.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=True)


def start(engine: EngineSettings, log_with: list[str], hang_minutes: float) -> Accelerator:
    """Join the process group and return an `Accelerator` with DeepSpeed under it.

    Args:
        engine: Settings from `engine_settings` for as many processes as were started.
        log_with: Accelerate trackers to start.
        hang_minutes: How long a process may be waited for; see `collective_timeout`.

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
    timeout = collective_timeout(hang_minutes)
    _set_timeout_of_groups(timeout)
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=engine.deepspeed, zero3_init_flag=False),
        kwargs_handlers=[
            InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo", timeout=timeout),
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


def run_process(main: Callable[[], Path | str | None]) -> NoReturn:
    """Run one rank's main function as `pipeline.errors.run` does, and end the process.

    After an error that is no user's mistake, the process ends at once. It must not take down its process group: NCCL
    would wait for the other ranks, which wait for this one (pytorch#141510). Nor would the exit handlers of libraries
    know that the work is lost. The other ranks see the connection close, and the launcher ends them.
    """
    try:
        status = run(main)
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAILED)
    end_process(status)


def _set_timeout_of_groups(timeout: timedelta) -> None:
    """Let the groups over which DeepSpeed reduces wait as long as the default one; NCCL's would give up after 10 min.

    DeepSpeed creates all of them here, without a timeout and without a setting for one: ZeRO's, and those of sharded
    experts.
    """
    from deepspeed.comm.torch import TorchBackend

    def new_group(self: TorchBackend, ranks: Any) -> Any:
        return torch.distributed.new_group(ranks, timeout=timeout)

    TorchBackend.new_group = new_group


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
