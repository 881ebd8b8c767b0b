"""A GPU that stands idle beside the work is refused with the reason; a CPU that is asked for is everyone's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import devices
from pipeline.devices import (
    CPU_ONLY,
    expects_gpu,
    gpu_count,
    has_bf16,
    may_use_gpu,
    out_of_memory,
    pick_device,
    refuse_idle_gpu,
    spare_cores,
    uses_gpu,
)
from pipeline.distributed.startup import refuse_shared_gpu
from pipeline.errors import UserError

ROOT = Path(__file__).parents[1]
VARIABLES = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "SLURM_GPUS_ON_NODE")
REASON = "The NVIDIA driver on your system is too old (found version 11040)"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with some of the files that drivers make, some variables, and a torch with or without a GPU."""

    def make(files=(), gpus=0, reason=REASON, **variables):
        places = {}
        for group in ("DEVICE_FILES", "OTHER_FILES"):
            own = {name: tmp_path / name.strip("/").replace("/", "-") for name in getattr(devices, group)}
            monkeypatch.setattr(devices, group, tuple(map(str, own.values())))
            places |= own
        for name in files:
            places[name].touch()
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

        def init():
            raise RuntimeError(f"{reason}. Please update it.\nSecond line")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "init", init)

    return make


@pytest.mark.parametrize("file", ["/dev/kfd", "/dev/dxg"])
def test_files_that_are_there_without_a_gpu_too_refuse_nothing_and_leave_the_choice_to_torch(machine, file):
    machine([file])
    refuse_idle_gpu()
    assert may_use_gpu()
    assert pick_device("auto").type == "cpu"


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_not_missed(machine, value):
    machine(["/dev/nvidiactl"], CUDA_VISIBLE_DEVICES=value)
    refuse_idle_gpu()


def test_a_gpu_that_torch_cannot_use_is_refused_with_torchs_reason_and_the_ways_out(machine):
    machine(["/dev/nvidiactl"])
    assert expects_gpu()
    assert not uses_gpu()
    with pytest.raises(UserError) as refusal:
        refuse_idle_gpu()
    message = str(refusal.value)
    assert f"torch {torch.__version__} cannot use ({REASON}" in message
    assert "Second line" not in message
    assert "\n" not in message
    assert "update the driver" in message
    assert "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126" in message
    assert "--cpu, or set DS_ACCELERATOR=cpu" in message


def test_a_torch_without_cuda_gives_its_own_reason(machine, monkeypatch):
    """A CPU build says so itself, and asserts instead of raising."""
    init = torch.cuda.init
    machine(["/dev/nvidiactl"])
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "_initialized", False)
    monkeypatch.delattr(torch._C, "_cuda_getDeviceCount", raising=False)  # by this torch tells its builds apart
    with pytest.raises(UserError, match=r"cannot use \(Torch not compiled with CUDA enabled\); update the driver"):
        refuse_idle_gpu()


@pytest.mark.parametrize("variables", [{"CUDA_VISIBLE_DEVICES": ""}, {"DS_ACCELERATOR": "cpu"}, CPU_ONLY])
@pytest.mark.parametrize("allocated", ["0", "2"])
def test_a_gpu_that_the_user_has_hidden_is_not_missed(machine, variables, allocated):
    machine(["/dev/nvidiactl"], **variables, SLURM_GPUS_ON_NODE=allocated)
    assert not expects_gpu()
    refuse_idle_gpu()


@pytest.mark.parametrize("variables", [{"CUDA_VISIBLE_DEVICES": "0"}, {"DS_ACCELERATOR": "cuda"}])
def test_other_values_hide_nothing(machine, variables):
    machine(["/dev/nvidiactl"], **variables)
    with pytest.raises(UserError, match="cannot use"):
        refuse_idle_gpu()


@pytest.mark.parametrize(("allocated", "expected"), [("2", True), ("1", True), ("0", False), ("", False)])
def test_gpus_that_slurm_has_given_are_missed_without_any_device_file(machine, allocated, expected):
    machine(SLURM_GPUS_ON_NODE=allocated)
    assert expects_gpu() is expected
    if expected:
        with pytest.raises(UserError, match="this machine has a GPU that torch"):
            refuse_idle_gpu()
    else:
        refuse_idle_gpu()


def test_a_machine_without_a_gpu_computes_on_its_cpu(machine):
    machine()
    assert not expects_gpu()
    refuse_idle_gpu()
    assert (uses_gpu(), gpu_count(), has_bf16()) == (False, 0, False)
    assert pick_device("auto").type == "cpu"


def test_a_gpu_that_torch_uses_is_not_idle(machine):
    machine(["/dev/nvidiactl"], gpus=3, SLURM_GPUS_ON_NODE="3")
    refuse_idle_gpu()
    assert uses_gpu()
    assert gpu_count() == 3
    assert pick_device("auto").type == "cuda"


def test_a_device_that_is_not_to_be_had_is_one_sentence():
    with pytest.raises(UserError, match="--device is 'gpu', which this machine does not have; use auto or cpu"):
        pick_device("gpu")
    assert pick_device("cpu") == torch.device("cpu")


def test_auto_does_not_pass_over_a_gpu_that_torch_cannot_use_and_a_named_cpu_does(machine):
    machine(["/dev/nvidiactl"])
    with pytest.raises(UserError, match=r"cannot use .* or give --device cpu, or set DS_ACCELERATOR=cpu"):
        pick_device("auto")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("processes", "gpus", "refused"), [(2, 1, True), (3, 2, True), (2, 2, False), (1, 4, False)])
def test_two_processes_never_share_a_gpu(machine, processes, gpus, refused):
    machine(["/dev/nvidiactl"], gpus=gpus, LOCAL_WORLD_SIZE=str(processes))
    if not refused:
        refuse_shared_gpu()
        return
    some = "1 GPU," if gpus == 1 else f"{gpus} GPUs,"
    with pytest.raises(UserError, match=rf"{processes} processes .* with {some} .* --num_processes {gpus}, or set DS_"):
        refuse_shared_gpu()


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.55 GiB "
            "is free. Including non-PyTorch memory, this process has 77.55 GiB memory in use. Of the allocated ...",
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.55 GiB "
            "is free",
        ),
        (
            "Caught OutOfMemoryError in pin memory thread for device 0.\nOriginal Traceback (most recent call last):\n"
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. \n",
            "CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        ("CUDA error: out of memory\nCUDA kernel errors might be ...", "CUDA error: out of memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUBLAS_STATUS_ALLOC_FAILED"),
        (
            "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
            "Last error:\nCuda failure 2 'out of memory'",
            "Cuda failure 2 'out of memory'",
        ),
    ],
)  # fmt: skip
def test_memory_that_ran_out_is_one_sentence_with_the_option_whichever_library_asked_for_it(message, sentence):
    with pytest.raises(UserError) as refusal, out_of_memory("train.micro_batch_size"):
        raise RuntimeError(message)
    assert str(refusal.value) == f"{sentence}; choose a smaller train.micro_batch_size"


def test_memory_that_the_host_does_not_have_is_named_too():
    """By torch's own allocator: 2^60 bytes."""
    sentence = rf"^DefaultCPUAllocator: .* {2**60} bytes.*; choose a smaller --knob$"
    with pytest.raises(UserError, match=sentence), out_of_memory("--knob"):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="device-side assert"), out_of_memory("--knob"):
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_processes_without_a_core_of_their_own_have_no_negative_number_of_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (spare_cores(torch.device("cuda")), spare_cores(torch.device("cpu"))) == (1, 0)


def fresh(code: str, **variables: str) -> dict:
    """What a new interpreter prints, as JSON, in an environment where none of the variables is set but those given."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    words = [sys.executable, "-c", f"import json, os, sys\n{code}"]
    done = subprocess.run(words, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TELL = "print(json.dumps({name: os.environ.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'DS_ACCELERATOR')}))"
# `import pipeline` looks for the files at once, so an interpreter with other ones has to pretend before.
WITH_FILES = """
import pathlib
real = pathlib.Path.exists
pathlib.Path.exists = lambda path: str(path) in {files} if str(path).startswith("/dev/") else real(path)
"""


def test_a_cpu_that_is_asked_for_hides_the_gpus_from_accelerate_too():
    found = fresh(f"import pipeline\n{TELL}", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="0,1")
    assert found == {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize(
    ("files", "variables", "accelerator"),
    [
        ([], {}, "cpu"),
        (["/dev/nvidiactl"], {}, None),
        (["/dev/nvidiactl"], {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ([], {"SLURM_GPUS_ON_NODE": "2"}, None),
    ],
)
def test_deepspeed_is_told_of_the_cpu_where_no_gpu_is_expected(files, variables, accelerator):
    found = fresh(WITH_FILES.format(files=files) + f"import pipeline\n{TELL}", **variables)
    assert found == {"CUDA_VISIBLE_DEVICES": variables.get("CUDA_VISIBLE_DEVICES"), "DS_ACCELERATOR": accelerator}


@pytest.mark.parametrize("module", ["pipeline.errors", "pipeline.devices", "pipeline.cli", "pipeline.config"])
def test_importing_the_ground_imports_no_torch(module):
    """Or else `--help`, and every mistake in a command line, would wait for it."""
    heavy = ("torch", "deepspeed", "transformers", "accelerate", "numpy")
    code = f"import {module}\nprint(json.dumps([name for name in {heavy!r} if name in sys.modules]))"
    assert fresh(code, DS_ACCELERATOR="cpu") == []


def test_a_process_on_the_cpu_finds_no_gpu_by_any_library():
    code = f"""{WITH_FILES.format(files=["/dev/nvidiactl"])}
from pipeline.devices import expects_gpu, uses_gpu
from accelerate import PartialState
from deepspeed.accelerator import get_accelerator
print(json.dumps([expects_gpu(), uses_gpu(), PartialState().device.type, get_accelerator().device_name()]))
"""
    assert fresh(code, **CPU_ONLY) == [False, False, "cpu", "cpu"]
