"""The feature cache: the backbone's tokens of every photo, computed once; its index, and the content of a row.

A cache is a folder with safetensors files and an `index.json`, which is written last. A file holds consecutive photos
of one split, each with all of its copies. One row is one copy, `StoredRow`; views that add nothing and classes that are
not in the photo's mask take no space.

In the present format the large tensors of a row lie one after the other with the sample's record, so a sample is one
read. In `COLUMNS`, the format before it, each of them lies with those of the other rows, and records are only in the
shards; it is read, and no longer written.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.data.feature_key import FeatureKey, Size
from pipeline.data.index import INDEX_NAME, Index
from pipeline.data.storage import open_folder
from pipeline.errors import UserError, typed
from pipeline.parsing.typed_json import Malformed, Whole, load_json, to_type

FORMAT = "roadwork features 3"
COLUMNS = "roadwork features 2"
MASK_DTYPE = torch.float16
SAFE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.safetensors")


@dataclass(frozen=True)
class FeaturePhoto:
    """One photo of a cache."""

    key: str
    """The sample's key in the shards."""
    sha256: str
    """SHA-256 of the photo's bytes."""
    checksums: tuple[int, ...]
    """CRC-32 of each row: the photo itself, then its augmented copies."""


@dataclass(frozen=True)
class FeatureShard:
    """One file of a cache."""

    name: str
    bytes: Whole
    sha256: str
    photos: tuple[FeaturePhoto, ...]
    """The file's photos in the order of their rows; all have the same number of copies."""


@dataclass(frozen=True)
class FeatureIndex:
    """The content of a cache's `index.json`."""

    format: str
    """How rows lie in the files, `FORMAT` or `COLUMNS`."""
    key: FeatureKey
    dim: Size
    """Width D of the backbone's tokens."""
    source_sha256: str
    """Fingerprint of the photos' shards."""
    copies: int
    """Augmented copies of each training photo."""
    precision: str
    """Precision in which the backbone computed."""
    version: str
    """Version of the program that made the cache."""
    shards: tuple[FeatureShard, ...]
    tars: tuple[str, ...] = ()
    """SHA-256 of the tars that the rows' records are from: those of other tars, made with other texts perhaps, are read
    from these tars instead."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self)


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache."""

    place: str
    """Folder or URL."""
    index: FeatureIndex

    def check(self, wanted: FeatureKey) -> None:
        """Refuse a cache that was made for another key.

        Raises:
            UserError: The key differs; the message says in what.
        """
        difference = self.index.key.difference(wanted)
        if difference is not None:
            raise stale(self.place, f"it was made with the {difference}")

    def check_source(self, shards: Index) -> None:
        """Refuse a cache of other photos.

        Raises:
            UserError: The cache was made from other shards.
        """
        mine, other = self.index.source_sha256, shards.source_sha256
        if mine != other:
            raise stale(self.place, f"it was made from other shards ({mine[:12]}, and not {other[:12]})")


class StoredRow(NamedTuple):
    """The tensors of a row as they are stored, for V views with M useful ones, and a mask that has C of its classes."""

    cls: torch.Tensor
    """bf16 [M, D]."""
    cells: torch.Tensor
    """bf16 [M, g*g, 2D]."""
    regions: torch.Tensor
    """bf16 [V, D]."""
    masks: torch.Tensor
    """Share of each cell that each class of the mask covers, float16 [C, m, m]."""
    boxes: torch.Tensor
    """float32 [V, 4]."""
    view_mask: torch.Tensor
    """bool [V], with M of them true."""
    mask_classes: torch.Tensor
    """bool [6], with C of them true."""
    has_mask: torch.Tensor
    """bool []."""
    record: torch.Tensor
    """The sample's record as JSON, uint8 [n]; empty in `COLUMNS`."""

    def checksum(self) -> int:
        """CRC-32 of all values, tensor after tensor."""
        value = 0
        for tensor in self:
            value = zlib.crc32(bytes_of(tensor).numpy().data, value)
        return value

    def tokens(self) -> PhotoTokens:
        """The tokens of all views."""
        mask = self.view_mask
        return PhotoTokens(spread(self.cls, mask), spread(self.cells, mask), self.regions, self.boxes, mask)

    def mask_targets(self) -> torch.Tensor:
        """Share of each cell that each class covers, float32 [6, m, m]; all NaN without a mask."""
        targets = spread(self.masks.float(), self.mask_classes)
        return targets if self.has_mask else torch.full_like(targets, torch.nan)


@dataclass(frozen=True)
class PhotoTokens:
    """The backbone's tokens of one photo, or of one augmented copy."""

    cls: torch.Tensor
    """CLS tokens of the views, [V, D]."""
    cells: torch.Tensor
    """Pooled patch tokens of each cell, [V, g*g, 2D], see `pool_cells`."""
    regions: torch.Tensor
    """Means of the global view's patch tokens under each view's box, [V, D], see `pool_regions`."""
    boxes: torch.Tensor
    """Boxes of the views as x0, y0, x1, y1 in [0, 1], float32 [V, 4]."""
    view_mask: torch.Tensor
    """Which views are useful, bool [V]; the others are zeros in `cls` and `cells`."""


def open_cache(place: str, shards: Index) -> FeatureCache | None:
    """Open the cache of the photos in `shards` at a folder or URL; None if `place` is empty.

    Raises:
        UserError: There is no cache, or it is of other photos.
    """
    if not place:
        return None
    cache = FeatureCache(place, read_features(place))
    cache.check_source(shards)
    return cache


def read_features(place: Path | str) -> FeatureIndex:
    """Read the index of a cache in a folder or at a URL.

    Raises:
        UserError: The index is missing, or cannot be read.
    """
    try:
        values = load_json(open_folder(place).read(INDEX_NAME))
        if not isinstance(values, dict) or values.get("format") not in (FORMAT, COLUMNS):
            raise UserError(f"{place} holds no feature cache of this program's format ({FORMAT}); extract it again")
        index = to_type(values, FeatureIndex)
    except FileNotFoundError as error:
        raise UserError(
            f"no finished feature cache in {place}: there is no {INDEX_NAME}; `{typed('prep features')}` makes one, "
            "and resumes where it was cut off"
        ) from error
    except Malformed as error:
        raise UserError(f"{place}/{INDEX_NAME} does not describe a feature cache: {error}; extract it again") from error
    for shard in index.shards:
        if not SAFE_NAME.fullmatch(shard.name):
            raise UserError(f"{place}/{INDEX_NAME} names {shard.name!r}, which is no plain file name; extract again")
        rows = {len(photo.checksums) for photo in shard.photos}
        if len(rows) != 1 or 0 in rows:
            raise UserError(
                f"{place}/{INDEX_NAME} gives the photos of {shard.name} no rows or unequal ones; extract again"
            )
    return index


def stale(place: str, why: str) -> UserError:
    """The error about a cache that must not be used."""
    return UserError(f"the feature cache {place} is stale: {why}; {remedy(place)}")


def remedy(place: str) -> str:
    """What to do about a cache that cannot be used."""
    return (
        f"remove {place} and make it anew with `{typed('prep features')}`, or do without it: --data.features '' in "
        "training, --features '' in evaluate"
    )


def spread(rows: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Put the stored rows at their positions, with zeros between.

    Args:
        rows: [M, ...].
        present: bool [N], with M of them true.
    """
    if bool(present.all()):
        return rows
    whole = rows.new_zeros((len(present), *rows.shape[1:]))
    whole[present] = rows
    return whole


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values as they are stored in a file, uint8 [n]; those of a contiguous tensor are not copied."""
    return tensor.contiguous().view(-1).view(torch.uint8)
