"""Where training finds cached features: in their files, in memory that a machine's processes share, or on a device."""

from __future__ import annotations

import mmap
import os

import psutil
import torch
import torch.distributed as dist

from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_dataset import FeatureDataset
from pipeline.data.feature_memory import FeatureMemory
from pipeline.distributed.agreement import gather, on_all_ranks
from pipeline.errors import UserError
from pipeline.progress import track


def place_features(data: ShardDataset, place: str, device: torch.device, workers: int) -> ShardDataset | FeatureMemory:
    """The split as `data.features_in` asks for it. Collective, but for `disk`, which needs no process group.

    Args:
        data: A split of the shards, with or without a feature cache.
        place: `disk`, `host` or `device`; see `DataConfig`.
        device: This process's device.
        workers: Processes that read while the memory is filled, for each of the training's.

    Raises:
        UserError: The memory cannot hold the split's features, or they are damaged; on every rank.
    """
    if place == "disk" or not isinstance(data, FeatureDataset):
        return data
    memory, neighbours = on_all_ranks(lambda: FeatureMemory(data)), ranks_of_machine()
    if place == "device":
        # Processes on GPUs have one each, those on a CPU share the machine's memory.
        size = memory.bytes * len(neighbours) if device.type == "cpu" else memory.token_bytes
        on_all_ranks(lambda: check_room(data, size, device))
        on_all_ranks(lambda: allocate(memory, device))
        mine = range(len(data))
    else:
        first = neighbours[0] == dist.get_rank()
        on_all_ranks(lambda: check_room(data, memory.bytes, torch.device("cpu")) if first else None)
        memory.use(shared_memory(memory.bytes, neighbours))
        at, processes = neighbours.index(dist.get_rank()), len(neighbours)
        mine = range(len(data) * at // processes, len(data) * (at + 1) // processes)
    on_all_ranks(lambda: read_all(memory, mine, workers))
    return memory


def check_room(data: FeatureDataset, size: int, device: torch.device) -> None:
    """Refuse features that the free memory of a device does not hold.

    Raises:
        UserError: There is too little memory; the message says how much of it is free.
    """
    if size > free_bytes(device):
        raise no_room(data, size, device)


def allocate(memory: FeatureMemory, device: torch.device) -> None:
    """Take memory on a device.

    Raises:
        UserError: The GPU has no room for one of the tensors, though it has for all of them together.
    """
    try:
        memory.allocate(device)
    except torch.OutOfMemoryError as error:
        raise no_room(memory.data, memory.token_bytes, device) from error


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of this machine."""
    on_gpu = device.type == "cuda"
    return int(torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available)


def no_room(data: FeatureDataset, size: int, device: torch.device) -> UserError:
    """The error about features of `size` bytes that a device does not hold."""
    where, way_out = ("GPU", "host or disk") if device.type == "cuda" else ("machine", "disk")
    return UserError(
        f"the features of the split {data.name!r} in {data.reader.place} take {size / 1e9:.2f} GB, and this "
        f"{where} has {free_bytes(device) / 1e9:.2f} GB free; train with --data.features_in {way_out}"
    )


def ranks_of_machine() -> range:
    """The ranks of this machine's processes, which are consecutive. Collective."""
    rank, local_ranks = dist.get_rank(), gather(int(os.environ.get("LOCAL_RANK", "0")))
    first = rank - local_ranks[rank]
    return range(first, next((r for r in range(first + 1, len(local_ranks)) if not local_ranks[r]), len(local_ranks)))


def shared_memory(size: int, neighbours: range) -> torch.Tensor:
    """Memory that the processes of this machine share, uint8 [size]. Collective.

    It has no name, so it is freed with the last process that uses it, however that one ends, and the limit that a
    container has for /dev/shm does not apply.

    Args:
        size: Bytes.
        neighbours: The ranks of this machine's processes; the first one takes the memory.

    Raises:
        UserError: A process cannot open it; on every rank.
    """
    mine = os.memfd_create("roadwork-features") if dist.get_rank() == neighbours[0] else None
    if mine is not None:
        os.ftruncate(mine, size)
    paths = gather(f"/proc/{os.getpid()}/fd/{mine}")
    memory = on_all_ranks(lambda: map_file(paths[neighbours[0]], size))
    if mine is not None:
        os.close(mine)  # since all have it now
    return memory


def map_file(path: str, size: int) -> torch.Tensor:
    """The first bytes of a file, uint8 [size], shared with all who map it.

    Raises:
        UserError: The file cannot be opened, or mapped.
    """
    try:
        opened = os.open(path, os.O_RDWR)
        try:
            return torch.frombuffer(mmap.mmap(opened, size), dtype=torch.uint8)
        finally:
            os.close(opened)
    except OSError as error:  # processes in different containers do not see each other's files
        raise UserError(
            f"the processes of this machine cannot share memory ({path}: {error.strerror}); run them in one container, "
            "or train with --data.features_in disk"
        ) from error


def read_all(memory: FeatureMemory, rows: range, workers: int) -> None:
    """Fill the memory with some photos; the first rank shows its progress."""
    read = memory.fill(rows, workers)
    what = f"features of the split {memory.data.name!r} into memory"
    for _ in track(read, len(rows), what, "photos") if dist.get_rank() == 0 else read:
        pass
