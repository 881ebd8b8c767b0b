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
from scipy.optimize import brentq
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.data.dataset import ShardDataset
from pipeline.data.integrity import Damage, check_layout, members_in_order
from pipeline.data.mixture import Mixture
from pipeline.data.storage import explained


class Visit(NamedTuple):
    """One reading of one tar."""

    shard: int
    drawn: np.ndarray
    """Which rows of the split belong to this pass: bool [N]."""
    copies: np.ndarray
    """Which copy of each photo this pass sees, see `Mixture`: int64 [N]."""


class Drawn(NamedTuple):
    """A sample that was drawn but not decoded yet."""

    row: int
    members: dict[str, bytes]
    """The sample's members by extension."""
    copy: int


def inclusion(weights: np.ndarray, samples: int) -> np.ndarray:
    """Probability of each row to be drawn in a pass, for `samples` rows on average.

    `sampler.order` gives row i an arrival time that is exponential with rate w_i, and takes the first `samples` to
    arrive. A sequential reader takes those that arrive before a fixed time t instead, which it can decide row by row:
    1 - exp(-w_i t), with t such that the probabilities add up to `samples`.

    Args:
        weights: float [N], above 0.
        samples: Rows to draw on average, at most N.

    Returns:
        float64 [N].
    """
    if samples == len(weights):
        return np.ones(len(weights))
    rates, share = weights / weights.mean(), samples / len(weights)
    # 1 - exp(-x) is below x, and above its value for the smallest rate.
    shortest, longest = share / 2, -2 * np.log1p(-share) / rates.min()
    time = brentq(lambda t: -np.expm1(-rates * t).mean() - share, shortest, longest, xtol=1e-12)
    return -np.expm1(-rates * time)


class StreamedSplit(IterableDataset[dict[str, torch.Tensor]]):
    """An endless sequence of samples, one pass over the tars after the other.

    In each pass the tars are dealt out anew among all workers of all ranks, and each row is drawn with the probability
    `inclusion`. Both follow from the seed and the number of the pass. A buffer of undecoded photos shuffles them.

    Every member that arrives must be the next one of the index, and none may be missing at the end of a tar, so that no
    photo is lost or added silently.
    """

    def __init__(
        self,
        data: ShardDataset,
        probabilities: np.ndarray,
        *,
        mixture: Mixture,
        buffer: int,
        rank: int,
        world_size: int,
    ):
        """Take a split that has at least one tar for every worker of every rank.

        Args:
            data: The split, for random access.
            probabilities: `inclusion` of each row.
            mixture: The mixture of photos and copies, with the run's seed.
            buffer: Photos that each worker holds to draw the next one from.
            rank: This process's rank.
            world_size: Number of processes.
        """
        self.data, self.probabilities, self.buffer = data, probabilities, buffer
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
        passed = int(self.start / self.probabilities.sum() + 1e-6)  # epochs seen, so that copies continue their turns
        for number in count():
            generator = np.random.default_rng([self.seed, self.start, number])
            order = generator.permutation(len(self.data.split.shards))
            drawn = generator.random(len(self.data)) < self.probabilities
            copies = self.mixture.copies_at(passed + number, len(self.data))
            yield from (Visit(int(shard), drawn, copies) for shard in order[lane::lanes])

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
            if visit.drawn[row]:
                members = {name: data for name, data in sample.items() if not name.startswith("__")}
                yield Drawn(row, members, int(visit.copies[row]))

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
