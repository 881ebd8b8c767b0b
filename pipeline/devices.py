"""Which device computes, and whether a GPU would be idle because torch cannot use it."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:  # importing torch takes seconds, and `--help` needs none of it
    import torch

# Device files that the drivers for NVIDIA, AMD and WSL create on a machine with a GPU.
DEVICE_FILES = ("/dev/nvidiactl",)
OTHER_FILES = ("/dev/kfd", "/dev/dxg")  # AMD's and WSL's, which are also there where torch could use no GPU
NO_GPU = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide every GPU
MIN_CUDNN = 91501
"""Number of the first cuDNN, 9.15.1, whose attention is right for lengths that are no multiple of 128
(github.com/pytorch/pytorch/issues/169849); a view of 512 px is 1029 tokens long."""
# What torch, CUDA's libraries and NCCL say where memory runs out, to the end of the line. Only torch's own allocator
# has an exception of its own for it, and a loader's thread adds a traceback to its message.
NO_MEMORY = re.compile(
    r"CUDA out of memory.*|CUDA error: out of memory|Cuda failure .*out of memory.*"
    r"|CU\w+_STATUS_ALLOC_FAILED|DefaultCPUAllocator: .*"
)
# How to install a torch that a driver for CUDA 12 can run.
CUDA_12 = f"`{sys.executable} -m pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126`"
CPU_ONLY = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # the environment of a process that takes no GPU


def expects_gpu() -> bool:
    """Whether this machine has a GPU that is not hidden, even if torch cannot use it. Imports no torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in NO_GPU or os.environ.get("DS_ACCELERATOR") == "cpu":
        return False
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0")
    return allocated or any(Path(file).exists() for file in DEVICE_FILES)


def may_use_gpu() -> bool:
    """Whether torch could find a GPU here. Imports no torch."""
    return expects_gpu() or any(Path(file).exists() for file in OTHER_FILES)


def uses_gpu() -> bool:
    """Whether this process computes on a GPU. Imports torch only on a machine that may have one."""
    if not may_use_gpu():
        return False
    import torch

    return torch.cuda.is_available()


def gpu_count() -> int:
    """The number of GPUs that this process sees."""
    import torch

    return torch.cuda.device_count()


def has_bf16() -> bool:
    """Whether a GPU of this machine computes in bf16 natively."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def refuse_idle_gpu(flag: str = "--cpu") -> None:
    """Refuse to compute on the CPU beside a GPU that torch cannot use.

    Args:
        flag: The option that asks for the CPU all the same, for the message.

    Raises:
        UserError: There is such a GPU; the message has torch's own reason and the ways out.
    """
    if uses_gpu() or not expects_gpu():
        return
    import torch

    reason = "torch finds none"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
    raise UserError(
        f"this machine has a GPU that torch {torch.__version__} cannot use ({reason}); update the driver, or install a "
        f"torch that fits it ({CUDA_12} has CUDA 12), or give {flag}, or set DS_ACCELERATOR=cpu, to compute on the CPU"
    )


def pick_device(name: str) -> torch.device:
    """The device of a name, such as `cpu` or `cuda:1`; `auto` is a GPU where there is one.

    Raises:
        UserError: There is no such device here, or `auto` finds a GPU that torch cannot use.
    """
    import torch

    if name == "auto":
        refuse_idle_gpu("--device cpu")
        return torch.device("cuda" if uses_gpu() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"--device is {name!r}, which this machine does not have; use auto or cpu") from error
    return device


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device. For a GPU the copy is only queued: from pinned memory the host goes on at once.

    Towards a CPU it blocks, since the values would be read before they are there.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def spare_cores(device: torch.device) -> int:
    """Workers for each process of this machine: with a GPU all cores decode; without, the passes need most of them."""
    spare = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1
    return max(1, spare) if device.type == "cuda" else min(1, max(0, spare))


@contextmanager
def out_of_memory(knob: str) -> Iterator[None]:
    """Report that memory ran out as a user's mistake, which the same command would only repeat.

    Args:
        knob: The option or key that decides how much memory the work inside takes, such as `train.micro_batch_size`.

    Raises:
        UserError: Memory could not be allocated inside; the message has the library's own words and the option.
    """
    try:
        yield
    except RuntimeError as error:
        found = NO_MEMORY.search(str(error))
        if found is None:
            raise
        told, _, _ = found.group().partition("Including non-PyTorch")
        reason = ". ".join(told.strip().split(". ")[:3]).rstrip(".")
        raise UserError(f"{reason}; choose a smaller {knob}") from error
