"""The checks of `doctor` on this machine: GPUs and their driver, memory of the host, network, and the hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from pipeline.devices import CUDA_12, MIN_CUDNN, NO_GPU, gpu_count, refuse_idle_gpu, uses_gpu
from pipeline.errors import UserError
from pipeline.launch import machine_facts as facts
from pipeline.launch.findings import BAD, GIB, GOOD, NOTE, Finding
from pipeline.model.backbone import SCENES_TINY

SMALL_DISK_GB = 5
# The first driver for each major version of CUDA; see NVIDIA's "CUDA compatibility".
DRIVERS = {11: "450", 12: "525", 13: "580"}
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def machine() -> Iterator[Finding]:
    """Check cores, memory, GPUs, their driver and libraries, and disk."""
    cores, (available, total) = len(os.sched_getaffinity(0)), facts.host_memory()
    yield Finding(GOOD, "machine", f"{cores} cores, {available / GIB:.0f} of {total / GIB:.0f} GiB free")
    yield from gpus()
    yield from driver()
    yield from cudnn()
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding(GOOD if free_gb > SMALL_DISK_GB else NOTE, "disk", f"{free_gb:.0f} GB free in {Path.cwd()}")


def cards() -> list[Any]:
    """This machine's GPUs, if torch can use them."""
    return [torch.cuda.get_device_properties(number) for number in range(gpu_count() if uses_gpu() else 0)]


def gpus() -> Iterator[Finding]:
    """Check that torch can use the GPUs that the system has."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    found, there = cards(), facts.gpus_of_the_system()
    for card in found:
        yield Finding(GOOD, "gpu", f"{card.name}, {card.total_memory / GIB:.0f} GiB")
    if found and hidden is None and there > len(found):
        text = f"the system has {there} GPUs and torch sees {len(found)}; `nvidia-smi` says what is wrong with the rest"
        yield Finding(NOTE, "gpu", text)
    if found:
        return
    try:
        refuse_idle_gpu()
    except UserError as problem:
        yield Finding(BAD, "gpu", str(problem))
        return
    reason = f" ({there} hidden by CUDA_VISIBLE_DEVICES={hidden})" if there and hidden in NO_GPU else ""
    text = f"none{reason}: training runs on the CPU over gloo; enough for scenes-tiny, not for ViT-H/16+"
    yield Finding(NOTE, "gpu", text)


def driver() -> Iterator[Finding]:
    """Compare the CUDA that the driver runs with the one that torch was built for; nothing where one is missing."""
    theirs, ours = facts.driver_cuda(), torch.version.cuda
    if theirs is None or ours is None:
        return
    text = f"{facts.driver_version() or 'of an unknown version'}, for CUDA up to {theirs[0]}.{theirs[1]}"
    wanted = int(ours.partition(".")[0])
    if theirs[0] >= wanted:
        yield Finding(GOOD, "driver", f"{text}; torch has CUDA {ours}")
        return
    update = f"update the driver to {DRIVERS[wanted]} or newer" if wanted in DRIVERS else "update the driver"
    other = f", or install a torch with CUDA 12: {CUDA_12}" if theirs[0] == 12 else ""
    yield Finding(BAD, "driver", f"{text}, but torch was built for CUDA {ours}; {update}{other}")


def cudnn() -> Iterator[Finding]:
    """Check whether cuDNN's attention may be asked for; nothing without a GPU."""
    if not uses_gpu():
        return
    version = torch.backends.cudnn.version() or 0
    text = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    if version >= MIN_CUDNN:
        yield Finding(GOOD, "cudnn", f"{text}; training takes other kernels of attention, `prep features` may take it")
        return
    # A system's CUDA comes before the one that torch brings.
    shadowed = "; LD_LIBRARY_PATH may hide torch's own: unset it" if os.environ.get("LD_LIBRARY_PATH") else ""
    text += ": too old for `prep features --attention cudnn`, which needs 9.15.1; auto, flash and efficient work"
    yield Finding(NOTE, "cudnn", text + shadowed)


def shared_memory(needed: int, processes: int) -> Iterator[Finding]:
    """Check that `/dev/shm` holds the batches that wait for the training process.

    Args:
        needed: Bytes of all processes of this machine, see `waiting_batches`.
        processes: Processes of this machine.
    """
    found = facts.shared_memory()
    if found is None or not needed:
        return
    free, total = found
    text = f"/dev/shm: {needed / GIB:.2f} GiB for the batches of {_processes(processes)}, {free / GIB:.2f} of "
    text += f"{total / GIB:.2f} free"
    if needed < free:
        yield Finding(GOOD, "shared", text)
        return
    remedy = f"start the container with `--shm-size {needed / GIB + 1:.0f}g` or `--ipc=host`, or lower data.workers"
    yield Finding(BAD, "shared", f"{text}; a worker would end with a bus error: {remedy}")


def host_memory(needed: float, processes: int) -> Finding:
    """Check that the machine holds what its processes keep there.

    Args:
        needed: Bytes of all processes of this machine.
        processes: Processes of this machine.
    """
    available, total = facts.host_memory()
    text = f"{needed / GIB:.1f} GiB of the host's memory for {_processes(processes)}, {available / GIB:.0f} of "
    text += f"{total / GIB:.0f} free"
    if needed < available:
        return Finding(GOOD, "host", text)
    remedy = "take fewer processes or workers (data.workers), or a machine with more; in SLURM ask for it with --mem"
    return Finding(NOTE if needed < total else BAD, "host", f"{text}: {remedy}")


def network(machines: int, here: bool = True) -> Iterator[Finding]:
    """Check the interface at which the processes of other machines would look for those of this one.

    Args:
        machines: Machines of the launch.
        here: Whether training will run on this machine.
    """
    ours, address = facts.interfaces(), facts.host_address()
    listed = ", ".join(f"{name} ({address})" for name, address in ours.items()) or "none"
    chosen = {name: os.environ[name] for name in INTERFACE_VARIABLES if os.environ.get(name)}
    fault = BAD if here else NOTE
    wrong = [(name, problem) for name, value in chosen.items() if (problem := mismatch(name, value, ours))]
    for name, problem in wrong:
        verdict = NOTE if name.startswith("NCCL") and not uses_gpu() else fault
        yield Finding(verdict, "network", f"{name}={chosen[name]} {problem}; unset it, or choose from {listed}")
    if machines > 1 and "GLOO_SOCKET_IFNAME" not in chosen and (address is None or address.startswith("127.")):
        text = f"this machine's name stands for {address or 'no address'}, where other machines do not reach it; set "
        text += "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the machines, on each of them: "
        yield Finding(fault, "network", f"{text}{listed}")
    elif machines > 1 and not wrong:
        words = ", ".join(f"{name}={value}" for name, value in chosen.items()) or f"this machine's name is {address}"
        yield Finding(GOOD, "network", f"{words}; interfaces: {listed}")


def mismatch(variable: str, value: str, interfaces: Iterable[str]) -> str | None:
    """Why a variable chooses no interface of this machine; None where it chooses one.

    Gloo takes a name, or a list of them, all of which must be there. NCCL takes a list of beginnings of names; a `=`
    before it makes them whole names, and a `^` before that excludes them.
    """
    up = {*interfaces, "lo"}
    if variable == "GLOO_SOCKET_IFNAME":
        missing = [name for name in value.split(",") if name and name not in up]
        return f"names {missing[0]}, which is no interface of this machine that is up" if missing else None
    words = value.removeprefix("^")
    whole, names = words.startswith("="), [name for name in words.removeprefix("=").split(",") if name]
    found = {name for name in up if (name in names if whole else name.startswith(tuple(names)))}
    left = up - found - {"lo"} if value.startswith("^") else found
    return None if left else "leaves no interface of this machine that is up"


def backbone(name: str, here: bool = True) -> Finding:
    """Check that a backbone is on this machine or can be fetched, without loading it.

    Args:
        name: `scenes-tiny`, a folder, or a hub id.
        here: Whether training will run on this machine.
    """
    folder = SCENES_TINY if name == "scenes-tiny" else Path(name)
    if (folder / "config.json").is_file():
        return Finding(GOOD, "backbone", f"{name}: weights in {folder}")
    cached, offline = isinstance(try_to_load_from_cache(name, "config.json"), str), facts.is_offline()
    reached = not offline and facts.reaches_hub()
    if cached and (offline or reached):
        return Finding(GOOD, "backbone", f"{name}: weights in the hub cache")
    if cached:
        text = f"{name}: weights in the hub cache; the hub does not answer: set HF_HUB_OFFLINE=1, or the start waits"
        return Finding(NOTE, "backbone", text)
    if reached:
        way = "it is fetched at the start, which for gated weights needs their licence accepted and `hf auth login`"
        return Finding(NOTE, "backbone", f"{name}: not on this machine; {way}")
    reason = "HF_HUB_OFFLINE is set" if offline else "the hub does not answer"
    way = f"`hf download {name}` on a machine with a network fetches it, if both see one HF_HOME; or name a folder"
    text = f"{name}: not on this machine, and {reason}; {way} with --model.backbone"
    return Finding(BAD if here else NOTE, "backbone", text)


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"
