"""What can be chosen when shards are made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.errors import UserError, require


@dataclass(frozen=True)
class Arguments:
    """The arguments that decide the content of the shards, beside the source; the index holds them."""

    splits: str
    val_share: float
    test_share: float
    distance_m: float
    clusters: int
    temper: float
    balance: float
    target_gps: str
    """SHA-256 of the table with the places of the deployment; empty without one."""
    text_encoder: str
    """Name and fingerprint of the sentence encoder; empty without one."""
    check: str
    shard_mb: float
    seed: int

    def __post_init__(self) -> None:
        require(0 <= self.val_share < 1, "--val_share", self.val_share, "at least 0 and below 1")
        require(0 <= self.test_share < 1, "--test_share", self.test_share, "at least 0 and below 1")
        both = self.val_share + self.test_share
        require(both < 1, "--val_share + --test_share", both, "below 1, or nothing is left for training")
        require(self.distance_m >= 0, "--distance_m", self.distance_m, "0 or more metres")
        require(self.clusters >= 0, "--clusters", self.clusters, "0 for automatic, or the number of clusters")
        require(0 <= self.temper <= 1, "--temper", self.temper, "between 0 and 1")
        require(0 <= self.balance <= 1, "--balance", self.balance, "between 0 and 1")
        require(self.shard_mb > 0, "--shard_mb", self.shard_mb, "above 0")
        require(self.seed >= 0, "--seed", self.seed, "0 or more")


@dataclass(frozen=True)
class Options:
    """Where the inputs are and how the work is done; see the command `shard`."""

    metadata: Path | None
    revision: str | None
    target_gps: Path | None
    text_encoder: str
    masks: Path | None
    workers: int
    max_rejects: float | None
    work: Path | None
    plan: bool = False
    part: str | None = None

    def __post_init__(self) -> None:
        share = self.share
        require(not (self.plan and share), "--part", self.part, "absent with --plan: first one, then the other")
        require(self.workers >= 0, "--workers", self.workers, "0 for every core, or the number of processes")
        require(self.max_rejects is None or self.max_rejects >= 0, "--max_rejects", self.max_rejects, "0 or more")
        if self.masks is not None and not self.masks.is_dir():
            raise UserError(f"--masks {self.masks} is not a folder; the command masks makes one")
        if self.target_gps is not None and not self.target_gps.is_file():
            raise UserError(f"--target_gps {self.target_gps} does not exist")

    @cached_property
    def share(self) -> tuple[int, int] | None:
        """The numbers of `part`: `2/3` is (2, 3)."""
        if self.part is None:
            return None
        first, slash, second = self.part.partition("/")
        valid = bool(slash) and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)
        require(valid, "--part", self.part, "i/n with i from 1 to n, such as 2/3")
        return int(first), int(second)
