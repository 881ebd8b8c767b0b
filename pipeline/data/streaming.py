"""Training from tars that are read from end to end with `webdataset`: for shards in an object store."""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.data.dataset import ShardDataset
from pipeline.data.integrity import Damage, check_layout, members_in_order
from pipeline.data.mixture import Mixture
from pipeline.data.sampler import SystematicDraw
from pipeline.data.storage import explained


class Visit(NamedTuple):
    """One reading of one tar."""

    shard: int
    counts: np.ndarray
    """How often this pass shows each row of the split: int64 [N]."""
    copies: np.ndarray
    """Which copies of each photo this pass shows, see `Mixture`: int64 [R, N]."""


class Drawn(NamedTuple):
    """A sample that was drawn but not decoded yet."""

    row: int
    members: dict[str, bytes]
    """The sample's members by extension; samples of the same photo share them."""
    copy: int


class StreamedSplit(IterableDataset[dict[str, torch.Tensor]]):
    """An endless sequence of samples, one pass over the tars after the other.

    A pass shows each row as often as an epoch of random access does, see `SystematicDraw`. A photo that is shown more
    than once is read once, and comes as several samples. In each pass the tars are dealt out anew among all workers of
    all ranks, and a buffer of undecoded samples shuffles them. Both follow from the seed and the number of the pass, so
    all readers agree.

    Every member that arrives must be the next one of the index, and none may be missing at the end of a tar, so that no
    photo is lost or added silently.
    """

    def __init__(
        self,
        data: ShardDataset,
        draw: SystematicDraw,
        *,
        mixture: Mixture,
        buffer: int,
        rank: int,
        world_size: int,
    ):
        """Take a split that has at least one tar for every worker of every rank.

        Args:
            data: The split, for random access.
            draw: How often each pass shows each row.
            mixture: The mixture of photos and copies, with the run's seed.
            buffer: Samples that each worker holds to draw the next one from.
            rank: This process's rank.
            world_size: Number of processes.
        """
        self.data, self.draw, self.buffer = data, draw, buffer
        self.mixture, self.seed = mixture, mixture.seed
        self.rank, self.world_size = rank, world_size
        self.row_of_key = {sample.key: row for row, sample in enumerate(data.split.samples)}
        self.start = 0
        """Samples that the run has seen before; other starts give other sequences."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        lane, lanes = self.rank * workers + number, self.world_size * workers
        mixing = random.Random(f"{self.seed} {lane}")
        stages = (
            self._members,
            group_by_keys,
            self._drawn,
            webdataset.shuffle(self.buffer, initial=self.buffer, rng=mixing),
            self._assembled,
        )
        return iter(webdataset.DataPipeline(lambda: self.visits(lane, lanes), *stages))

    def visits(self, lane: int, lanes: int) -> Iterator[Visit]:
        """The tars that one of `lanes` readers takes, pass after pass; together they take each tar once a pass."""
        passed = -(-self.start // self.draw.samples)  # one that was begun counts, so that none is shown twice
        for number in count():
            order = np.random.default_rng([self.seed, self.start, number]).permutation(len(self.data.split.shards))
            counts = self.draw.counts(passed + number)
            copies = self.mixture.copies_at(passed + number, len(self.data), self.draw.most)
            yield from (Visit(int(shard), counts, copies) for shard in order[lane::lanes])

    def _members(self, visits: Iterator[Visit]) -> Iterator[dict[str, Any]]:
        """The checked files of the tars, and the empty one that webdataset adds at the end of a tar."""
        for visit in visits:
            name = self.data.split.shards[visit.shard].name
            with (
                explained(str(self.data.place)),
                self.data.naming(visit.shard),
                self.data.folder.stream(name) as stream,
            ):
                yield from self._checked(visit, tar_file_expander([{"url": visit, "stream": stream}]))

    def _checked(self, visit: Visit, files: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        samples = [self.data.split.samples[row] for row in self.data.rows_of_shard[visit.shard]]
        check_layout(self.data.split.shards[visit.shard], samples)
        order = {f"{s.key}.{extension}": s.members[extension][1] for s, extension in members_in_order(samples)}
        expected = iter(order)
        try:
            for file in files:
                awaited = next(expected, None)
                if file.get("fname") != awaited:
                    raise Damage(_difference(file.get("fname"), awaited, order))
                if awaited is not None and len(file["data"]) != order[awaited]:
                    raise Damage(f"{awaited} is {len(file['data'])} bytes long, the index says {order[awaited]}")
                yield file
        except tarfile.TarError as error:
            raise Damage(f"it is no readable tar from {next(expected, 'its end')} on") from error

    def _drawn(self, samples: Iterator[dict[str, Any]]) -> Iterator[Drawn]:
        """The samples that were drawn for their pass."""
        for sample in samples:
            row, visit = self.row_of_key[sample["__key__"]], sample["__url__"]
            members = {name: data for name, data in sample.items() if not name.startswith("__")}
            yield from (Drawn(row, members, int(visit.copies[time, row])) for time in range(visit.counts[row]))

    def _assembled(self, samples: Iterator[Drawn]) -> Iterator[dict[str, torch.Tensor]]:
        for row, members, copy in samples:
            yield self.data.assemble(row, members, copy)[1]


def _difference(name: str | None, awaited: str | None, order: dict[str, int]) -> str:
    """Why a member, or a tar's end, must not come where the index expects another member."""
    if name is None:
        return f"{awaited} is missing"
    if name not in order:
        return f"it holds {name!r}, which the index does not name"
    names = list(order)
    if awaited is None or names.index(name) < names.index(awaited):
        return f"{name} is there twice"
    return f"{awaited} is missing before {name}"
