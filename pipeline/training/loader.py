"""The training loader: this rank's batches from shards (random access or streamed), a feature cache, or noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from pipeline.config import USUAL_WORKERS, Config, DataConfig
from pipeline.data.batch import Batch, batches_of
from pipeline.data.copies import AUGMENTED, STREETVISION
from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_dataset import FeatureDataset, open_split
from pipeline.data.features import FeatureCache
from pipeline.data.index import Index
from pipeline.data.mixture import Mixture, MixtureSampler
from pipeline.data.sampler import PositionSampler, SystematicDraw
from pipeline.data.stand_in import StandIn
from pipeline.data.streaming import StreamedSplit
from pipeline.devices import spare_cores, uses_gpu
from pipeline.errors import UserError, typed
from pipeline.progress import say
from pipeline.training.placement import place_features
from pipeline.training.plan import plan_sampling, plan_schedule

MOST_WORKERS = 16  # of each rank with a GPU; it computes no faster than these decode


@dataclass(frozen=True)
class TrainLoader:
    """Micro-batches of one rank."""

    loader: DataLoader[Batch]
    order: PositionSampler | StreamedSplit
    samples: int
    """Samples of the training split."""
    keys: tuple[str, ...] = ()
    """The samples' keys by row; empty for noise."""

    def batches(self, samples_seen: int) -> Iterator[Batch]:
        """Endless micro-batches of a run that has seen `samples_seen` samples over all ranks."""
        self.order.start = samples_seen
        return iter(self.loader)

    def placed(self, config: Config, device: torch.device) -> TrainLoader:
        """The same batches with their features where `data.features_in` asks for them. Collective, but for `disk`."""
        data = place_split(config, self.loader.dataset, device)
        if data is self.loader.dataset:
            return self
        return replace(self, loader=batches_of(data, 1, 0, batch_sampler=self.order))

    def name(self, row: int) -> str:
        """The name of the sample in a row of the split."""
        return self.keys[row] if self.keys else f"noise {row}"


def open_loader(
    config: Config,
    index: Index | None,
    batch_size: int,
    rank: int,
    world_size: int,
    cache: FeatureCache | None = None,
) -> TrainLoader:
    """Open the training split that `data` describes; without shards, noise to try a step on.

    Args:
        config: The run's configuration.
        index: The shards' index, None where there are no shards yet.
        batch_size: Samples of one micro-batch.
        rank: This process's rank.
        world_size: Number of processes.
        cache: The feature cache that `data.features` names.
    """
    if index is None:
        if rank == 0:
            say(f"no shards at {config.data.shards} yet: planning with a stand-in of noise, as if it were all the data")
        noise = StandIn(2 * config.train.batch_size, config.input_spec, config.model.text_dim)
        samples, mixture = plan_schedule(config, len(noise)).samples_per_epoch, Mixture(config.train.seed)
        draw = SystematicDraw(np.ones(len(noise)), samples, seed=config.train.seed, max_repeats=config.data.max_repeats)
        return _random_access(config, noise, draw, mixture, batch_size, rank, world_size)
    data = open_split(config.data.shards, index, "train", config.input_spec, cache)
    draw, mixture = plan_sampling(config, data.split).draw, mixture_of(config, data)
    if rank == 0 and mixture.copies and not mixture.augment_share + mixture.streetvision_share:
        say(
            "the augmented copies in the feature cache are not used: data.augment_share and data.streetvision_share "
            "are both 0"
        )
    if config.data.streaming:
        return _streamed(config, data, draw, mixture, batch_size, rank, world_size)
    return _random_access(config, data, draw, mixture, batch_size, rank, world_size)


def place_split(config: Config, data: Any, device: torch.device) -> Any:
    """A split of the shards where `data.features_in` asks for its features; see `place_features`."""
    return place_features(data, config.data.features_in, device, workers_of(config.data))


def workers_of(data: DataConfig) -> int:
    """Processes per rank that read: `data.workers`, or its default on this machine."""
    if data.workers is not None:
        return data.workers
    return min(spare_cores(torch.device("cuda")), MOST_WORKERS) if uses_gpu() else USUAL_WORKERS


def mixture_of(config: Config, data: ShardDataset) -> Mixture:
    """The mixture of photos and their augmented copies that `data` asks for.

    Raises:
        UserError: The feature cache has no copies of a kind that is asked for.
    """
    copies = data.copies - 1 if isinstance(data, FeatureDataset) else None
    for kind, key in ((AUGMENTED, "augment_share"), (STREETVISION, "streetvision_share")):
        share = getattr(config.data, key)
        if share and copies is not None and not kind.count(copies):
            raise UserError(
                f"data.{key} is {share:g}, but the feature cache {config.data.features} holds no {kind.name} copies; "
                f"make it anew with `{typed('prep features')} --copies {kind.first}` or more, or set data.{key} to 0"
            )
    return Mixture(config.train.seed, config.data.augment_share, config.data.streetvision_share, copies)


def _random_access(
    config: Config, data: ShardDataset | StandIn, draw: SystematicDraw, mixture: Mixture, batch_size: int, rank: int,
    world_size: int,
) -> TrainLoader:  # fmt: skip
    order = MixtureSampler(draw, mixture=mixture, batch_size=batch_size, rank=rank, world_size=world_size)
    # The sampler makes the batches, so the loader's own size keeps its default.
    loader = batches_of(data, 1, workers_of(config.data), batch_sampler=order)
    return TrainLoader(loader, order, len(data), () if isinstance(data, StandIn) else keys_of(data))


def _streamed(
    config: Config, data: ShardDataset, draw: SystematicDraw, mixture: Mixture, batch_size: int, rank: int,
    world_size: int,
) -> TrainLoader:  # fmt: skip
    tars = len(data.split.shards)
    if tars < world_size:
        raise UserError(
            f"data.streaming needs a tar for each of the {world_size} processes, and the training split has {tars}; "
            "shard again with a smaller --shard_mb, or train with --data.streaming false"
        )
    buffer = config.data.shuffle_buffer
    order = StreamedSplit(data, draw, mixture=mixture, buffer=buffer, rank=rank, world_size=world_size)
    workers = min(workers_of(config.data), tars // world_size)
    if rank == 0:
        say(
            f"streaming {tars} tars with {world_size} x {max(1, workers)} readers: a pass draws {draw.samples} times "
            f"from {len(data)} photos, mixed {buffer} at a time; a resumed run starts a new pass, and "
            "leaves out what was left of the one that was interrupted"
        )
    loader = batches_of(order, batch_size, workers)
    return TrainLoader(loader, order, len(data), keys_of(data))


def keys_of(data: ShardDataset) -> tuple[str, ...]:
    """The key of every sample of a split, by row."""
    return tuple(sample.key for sample in data.split.samples)
