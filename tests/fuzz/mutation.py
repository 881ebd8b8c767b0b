"""Damage bytes at random: the same generator in the same state does the same damage."""

from __future__ import annotations

import random
from collections.abc import Callable

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)
HUGE = (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
LONGEST = 64  # bytes that are inserted, deleted or repeated at once


def flip_bit(data: bytearray, rng: random.Random) -> None:
    """Flip one bit."""
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def change_byte(data: bytearray, rng: random.Random) -> None:
    """Set a byte to any value."""
    data[rng.randrange(len(data))] = rng.randrange(256)


def set_extreme(data: bytearray, rng: random.Random) -> None:
    """Set a byte to one of the values at which numbers change their meaning."""
    data[rng.randrange(len(data))] = rng.choice(EXTREMES)


def set_huge(data: bytearray, rng: random.Random) -> None:
    """Overwrite two or four bytes with an extreme integer of either byte order."""
    size = rng.choice((2, 4))
    value = (rng.choice(HUGE) % (1 << 8 * size)).to_bytes(size, rng.choice(("big", "little")))
    start = rng.randrange(len(data))
    data[start : start + size] = value[: len(data) - start]


def delete(data: bytearray, rng: random.Random) -> None:
    """Delete a few bytes."""
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, LONGEST)]


def insert(data: bytearray, rng: random.Random) -> None:
    """Insert a few random bytes."""
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.randint(1, LONGEST))


def repeat(data: bytearray, rng: random.Random) -> None:
    """Repeat a few bytes somewhere else."""
    start, end = rng.randrange(len(data)), rng.randrange(len(data) + 1)
    data[end:end] = data[start : start + rng.randint(1, LONGEST)]


def cut(data: bytearray, rng: random.Random) -> None:
    """Leave out the end."""
    del data[rng.randrange(len(data)) :]


IN_PLACE: tuple[Callable[[bytearray, random.Random], None], ...] = (flip_bit, change_byte, set_extreme, set_huge)
ALL = (*IN_PLACE, delete, insert, repeat, cut)


def mutate(data: bytes, rng: random.Random, same_length: bool = False) -> bytes:
    """Damage data in one to four ways.

    Args:
        data: What to damage.
        rng: What decides how.
        same_length: Overwrite only.
    """
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if damaged:
            rng.choice(IN_PLACE if same_length else ALL)(damaged, rng)
    return bytes(damaged)
