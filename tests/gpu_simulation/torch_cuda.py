"""`torch.cuda` of a machine with one GPU, as far as the project and its libraries ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch


class Stream:
    """A stream, on which nothing ever waits."""

    def __init__(self, device: object = None, priority: int = 0):
        self.device = device

    def wait_stream(self, stream: object) -> None:
        """Do nothing."""

    def wait_event(self, event: object) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def is_capturing(self) -> bool:
        """Whether a graph is recorded: never."""
        return False

    def record_event(self, event: object = None) -> Event:
        """An event that has passed."""
        return Event()


class Event:
    """An event that has passed."""

    def __init__(self, enable_timing: bool = False, **options: object):
        pass

    def record(self, stream: object = None) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def wait(self, stream: object = None) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Whether the event has passed."""
        return True

    def elapsed_time(self, other: object) -> float:
        """A millisecond."""
        return 1.0


class Generator(torch.Generator):
    """A generator that knows for which device it was made; it draws on the CPU."""

    on_cuda: bool

    def __new__(cls, device: object = "cpu") -> Generator:
        """Make one for a device."""
        made = super().__new__(cls, "cpu")
        made.on_cuda = torch.device(device).type == "cuda"  # type: ignore[arg-type]
        return made


@contextmanager
def patched_torch_cuda() -> Iterator[None]:
    """Let PyTorch say that there is a GPU with bf16, while this lasts."""
    current = Stream()
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None, "init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "set_device": lambda device: None, "synchronize": lambda device=None: None,
        "Stream": Stream, "Event": Event, "current_stream": lambda device=None: current,
        "stream": lambda stream: nullcontext(), "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True, "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None, "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None, "get_rng_state": lambda device="cuda": torch.empty(0),
        "set_rng_state": lambda state, device="cuda": None,
    }  # fmt: skip
    accelerator = {
        "is_available": lambda: True, "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "set_device_index": lambda device: None, "current_device_index": lambda: 0,
        "current_stream": lambda device=None: current,
    }  # fmt: skip
    with (
        patch.multiple(torch.cuda, **answers),
        patch.multiple(torch.accelerator, **accelerator),
        patch.object(torch, "Generator", Generator),
        patch("pipeline.devices.may_use_gpu", lambda: True),  # whatever hides GPUs from the tests
    ):
        yield
