"""`index.json`, the file beside the tars with all that the trainer needs to plan an epoch without opening one."""

from __future__ import annotations

import json
import math
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from pipeline.data.storage import open_folder
from pipeline.errors import UserError, shown, typed
from pipeline.parsing.typed_json import Malformed, Positive, Whole, load_json, to_type

PHOTO_EXTENSIONS = ("jpg", "png", "webp")
HEADER_BYTES = tarfile.BLOCKSIZE  # right before a member's data
INDEX_NAME = "index.json"
FORMAT_VERSION = 2
SPLITS = ("train", "val", "test")
CLASSES = {1: "roadwork", 0: "none", -1: "unlabelled"}
Label = Annotated[int, msgspec.Meta(ge=0, le=1)]
SAFE_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")  # with its extension it fits the 100 characters of a tar header
SAFE_SHARD = re.compile(r"[A-Za-z0-9_-]{1,100}\.tar")


@dataclass(frozen=True)
class Shard:
    """One tar of a split."""

    name: str
    bytes: Whole
    sha256: str
    samples: Whole


@dataclass(frozen=True)
class Sample:
    """One sample and the positions of its members."""

    key: str
    shard: Whole
    """Position in the split's list of shards."""
    members: dict[str, tuple[int, int]]
    """Offset in the tar and size, in bytes, by extension (`jpg`, `json`, `mask.png`)."""
    label: Label | None
    group: int
    """Near-duplicates share a group; intervals are bootstrapped over groups."""
    cluster: Whole
    weight: float
    width: Positive
    height: Positive
    record_sha256: str | None = None
    """SHA-256 of the member `json`, which has those of the photo and of the mask; None in shards of before December
    2026."""

    @property
    def photo_extension(self) -> str:
        """Extension of the photo among the members."""
        return next(extension for extension in PHOTO_EXTENSIONS if extension in self.members)


@dataclass(frozen=True)
class Split:
    """The shards and samples of one split, samples in the order of the tars."""

    shards: tuple[Shard, ...]
    samples: tuple[Sample, ...]

    @property
    def weights(self) -> np.ndarray:
        """Sampling weights, float64 [N]."""
        return np.array([sample.weight for sample in self.samples])

    @property
    def labels(self) -> np.ndarray:
        """Labels, int64 [N], -1 where unknown."""
        return np.array([-1 if s.label is None else s.label for s in self.samples], dtype=np.int64)

    @property
    def clusters(self) -> np.ndarray:
        """Numbers of the GPS clusters, int64 [N]."""
        return np.array([sample.cluster for sample in self.samples], dtype=np.int64)

    @property
    def strata(self) -> np.ndarray:
        """One number for each cluster and class, int64 [N]."""
        return len(CLASSES) * self.clusters + self.labels


def shares(amounts: np.ndarray, clusters: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
    """The share of each cluster and class in a sum over photos, with six decimals.

    Args:
        amounts: What is summed: a weight or a count for each photo, [N].
        clusters: Number of each photo's cluster, int [N].
        labels: 0, 1 or -1 for unknown, int [N].

    Returns:
        By the cluster's number, then by `roadwork`, `none` and `unlabelled`; without what has no photo.
    """
    found: dict[str, dict[str, float]] = {}
    for cluster, label in np.unique(np.stack([clusters, -labels], axis=1), axis=0):
        share = amounts[(clusters == cluster) & (labels == -label)].sum() / amounts.sum()
        found.setdefault(str(cluster), {})[CLASSES[-int(label)]] = round(float(share), 6)
    return found


@dataclass(frozen=True)
class Cluster:
    """One GPS cluster; number 0 holds the photos without GPS and has no centre."""

    centre: tuple[float, float] | None
    """Latitude and longitude in degrees."""
    split: str
    """Split of its photos; `mixed` where they are in several."""
    samples: Whole
    roadwork: Whole
    none: Whole


@dataclass(frozen=True)
class Field:
    """What one metadata field gives away about the label, over all labelled samples."""

    null_rate: float
    """Share of NULL among all samples."""
    null_mcc: float | None
    """Matthews correlation of "is not NULL" with roadwork; None where one of the two never varies."""
    cramers_v: float | None
    """Association of the known values with the label (Cramer's V), corrected for bias; None where it has no meaning."""
    leaks: str
    """Why the field must not be a model input, in a few words; empty where it may be."""


@dataclass(frozen=True)
class Index:
    """The content of `index.json`."""

    splits: dict[str, Split]
    clusters: tuple[Cluster, ...]
    fields: dict[str, Field]
    """Metadata fields by the names of the record, and columns that only the source has."""
    arguments: dict[str, Any]
    """Arguments with which the shards were made, those that change their content."""
    version: str
    """Version of the program that made the shards."""
    source_sha256: str
    """Fingerprint of everything that was read."""
    rejected: dict[str, Whole]
    """Number of inputs that were not written, by reason."""
    unknown_words: dict[str, dict[str, Whole]]
    """Words that the vocabulary lacks, with their counts, by metadata field."""
    asked_shares: dict[str, dict[str, float]] | None = None
    """Share of each cluster and class that the weights ask for in training, see `shares`; older indexes lack it."""

    def to_json(self) -> str:
        """The text of `index.json`: one line, since indenting takes ten times as long and twice the space."""
        return json.dumps({"format_version": FORMAT_VERSION, **vars(self)}, default=vars, allow_nan=False) + "\n"

    def split(self, name: str) -> Split:
        """A split by name; if it is absent or empty, a `UserError`."""
        split = self.splits.get(name)
        if split is None or not split.samples:
            filled = [key for key, value in self.splits.items() if value.samples]
            raise UserError(f"the shards have no samples in split {name!r}; there are {', '.join(filled) or 'none'}")
        return split


@dataclass(frozen=True)
class _ReadArguments:
    """Those of `Index.arguments` that something depends on; shards of other versions may lack them."""

    text_dim: Whole = 0
    text_encoder: str | None = None
    temper: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    balance: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    source_kind: str = ""


@dataclass(frozen=True)
class _Read:
    arguments: _ReadArguments


def read_index(folder: Path | str) -> Index:
    """Read and check `index.json` in a folder or at a URL.

    Raises:
        UserError: The index is missing, malformed, of another version, or names a path outside the folder.
    """
    path = f"{str(folder).rstrip('/')}/{INDEX_NAME}"
    try:
        text = open_folder(folder).read(INDEX_NAME)
    except FileNotFoundError as error:
        raise UserError(
            f"no shards in {folder}: there is no {INDEX_NAME}; make them with "
            f"`{typed('prep shard')} --source PHOTOS --out FOLDER`"
        ) from error
    try:
        values = load_json(text)
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            known = f"this program reads {FORMAT_VERSION}; shard again"
            raise UserError(f"{path} has format version {shown(version)}, {known}")
        index = to_type(values, Index)
        to_type(values, _Read)
    except Malformed as error:
        raise UserError(f"{path} is not a shard index: {error}; shard again") from error
    if index.splits.keys() != set(SPLITS):
        raise UserError(f"{path} has the splits {', '.join(index.splits)}, not {', '.join(SPLITS)}; shard again")
    for split in index.splits.values():
        _check_split(path, split)
    return index


def _check_split(path: str, split: Split) -> None:
    """Check that names do not lead out of the folder, nor offsets out of the tars: an index may come from elsewhere.

    Every sample must have a record, one photo, and a weight above 0.
    """
    for shard in split.shards:
        if not SAFE_SHARD.fullmatch(shard.name):
            raise UserError(f"{path} names the shard {shard.name!r}, which is no plain file name; shard again")
    for sample in split.samples:
        inside = 0 <= sample.shard < len(split.shards) and all(
            offset >= HEADER_BYTES and size >= 0 and offset + size <= split.shards[sample.shard].bytes
            for offset, size in sample.members.values()
        )
        if not inside or not SAFE_KEY.fullmatch(sample.key):
            raise UserError(f"{path} describes the sample {sample.key!r} with places outside its shards; shard again")
        photos = [extension for extension in PHOTO_EXTENSIONS if extension in sample.members]
        if len(photos) != 1 or "json" not in sample.members:
            raise UserError(f"{path} describes the sample {sample.key!r} without a record or one photo; shard again")
        if not 0 < sample.weight < math.inf:
            raise UserError(f"{path} gives the sample {sample.key!r} the weight {sample.weight}; shard again")
