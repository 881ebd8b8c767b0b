"""Facts about this machine that decide whether a run starts: driver, shared memory, network, hub."""

from __future__ import annotations

import ctypes
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import psutil
from huggingface_hub import constants

SHARED_MEMORY = Path("/dev/shm")
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
DEVICES = Path("/dev")
HUB_S = 3.0  # longest wait for an answer of the hub


def driver_version() -> str | None:
    """Version of the NVIDIA driver, such as `535.183.01`; None where there is none."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", DRIVER_VERSION.read_text())
    except OSError:
        return None
    return found and found.group()


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA, as (major, minor), that the driver runs; None where there is no driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def gpus_of_the_system() -> int:
    """The number of NVIDIA GPUs that the driver shows in `/dev`."""
    return sum(re.fullmatch(r"nvidia\d+", file.name) is not None for file in DEVICES.glob("nvidia*"))


def shared_memory() -> tuple[int, int] | None:
    """Free and total bytes of `/dev/shm`, through which the loader's processes hand batches over; None without it."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def host_memory() -> tuple[int, int]:
    """Available and total bytes of this machine's memory."""
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def host_address() -> str | None:
    """The IPv4 address that this machine's own name stands for, at which gloo listens; None where it has none."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def interfaces() -> dict[str, str]:
    """IPv4 addresses of the network interfaces that are up, by name, without the loopback."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == socket.AF_INET and not entry.address.startswith("127.")
    }


def is_offline() -> bool:
    """Whether the hub's library was told to ask nobody (`HF_HUB_OFFLINE`)."""
    return bool(constants.HF_HUB_OFFLINE)


def reaches_hub() -> bool:
    """Whether the hub, or the proxy in front of it, takes a connection."""
    url = urlsplit(getproxies().get("https") or constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=HUB_S).close()
    except OSError:
        return False
    return True
