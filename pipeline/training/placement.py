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
    memory = on_all_ranks(lambda: FeatureMemory(data))
    if place == "device":
        size = memory.bytes if device.type == "cpu" else memory.token_bytes
        on_all_ranks(lambda: check_room(data, size, device))
        memory.allocate(device)
        mine = range(len(data))
    else:
        neighbours = ranks_of_machine()
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
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if size > free:
        where, way_out = ("GPU", "host or disk") if on_gpu else ("machine", "disk")
        raise UserError(
            f"the features of the split {data.name!r} in {data.reader.place} take {size / 1e9:.2f} GB, and this "
            f"{where} has {free / 1e9:.2f} GB free; train with --data.features_in {way_out}"
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
    """
    mine = os.memfd_create("roadwork-features") if dist.get_rank() == neighbours[0] else None
    if mine is not None:
        os.ftruncate(mine, size)
    paths = gather(f"/proc/{os.getpid()}/fd/{mine}")
    opened = os.open(paths[neighbours[0]], os.O_RDWR)
    memory = torch.frombuffer(mmap.mmap(opened, size), dtype=torch.uint8)
    os.close(opened)
    dist.barrier()  # all have opened it
    if mine is not None:
        os.close(mine)
    return memory


def read_all(memory: FeatureMemory, rows: range, workers: int) -> None:
    """Fill the memory with some photos; the first rank shows its progress."""
    read = memory.fill(rows, workers)
    what = f"features of the split {memory.data.name!r} into memory"
    for _ in track(read, len(rows), what, "photos") if dist.get_rank() == 0 else read:
        pass
