"""Samples from the shards: bytes at known offsets, then views, metadata and targets as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from pipeline.data.copies import is_streetvision, make_copy, placement_of
from pipeline.data.folds import DealtSplit
from pipeline.data.index import HEADER_BYTES, Index, Sample
from pipeline.data.integrity import (
    CheckedFiles,
    Damage,
    check_header,
    check_layout,
    check_sample,
    check_tail,
    read_member_record,
)
from pipeline.data.photo import Scratch, decode, decode_mask, probe
from pipeline.data.record import Metadata, Record
from pipeline.data.views import canvas_side, extract_views, useful_views, view_boxes
from pipeline.model.config import InputSpec
from pipeline.names import DAYTIME, MASK_CLASSES, SCENE, WEATHER

_SCRATCH = Scratch()


def prepare(data: bytes, spec: InputSpec) -> dict[str, torch.Tensor]:
    """Decode a photo and cut its views.

    Args:
        data: The photo's file, of any format.
        spec: The model's input spec, `model.config.input_spec`.

    Returns:
        views uint8 [V, 3, S, S], channels last in memory, boxes float32 [V, 4] and view_mask bool [V].

    Raises:
        BadPhoto: The bytes are no usable photo.
    """
    image, size = decode_scaled(data, spec, _SCRATCH)
    return prepare_image(image, spec, size)


def decode_scaled(data: bytes, spec: InputSpec, scratch: Scratch | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a photo at the scale of `InputSpec.decode_scale`.

    Args:
        data: The photo's file.
        spec: The model's input spec.
        scratch: See `pipeline.data.photo.decode`.

    Returns:
        uint8 [H, W, 3], and width and height of the photo at full size.

    Raises:
        BadPhoto: The bytes are no usable photo.
    """
    if spec.decode_scale == "half":
        size = probe(data)
        half = min(size) // 2
        if half >= canvas_side(spec.view_side):
            return decode(data, half, scratch), size
    image = decode(data, scratch=scratch)
    return image, (image.shape[1], image.shape[0])


def prepare_image(image: np.ndarray, spec: InputSpec, size: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """Cut the views of a decoded photo; see `prepare` for what is returned.

    Args:
        image: uint8 [H, W, 3], RGB, contiguous.
        spec: The model's input spec.
        size: Width and height of the photo at full size, where `image` is smaller.
    """
    size = size or (image.shape[1], image.shape[0])
    return {
        "views": extract_views(image, spec.view_side, spec.num_views, size),
        "boxes": view_boxes(*size, spec.view_side)[: spec.num_views],
        "view_mask": useful_views(*size, spec.view_side, spec.num_views),
    }


def metadata_tensors(
    metadata: Metadata, text_vector: Sequence[float] | None = None, text_dim: int = 0
) -> dict[str, torch.Tensor]:
    """Metadata as the model's input tensors.

    Args:
        metadata: Metadata of one photo.
        text_vector: Embedding of its description, or None for NULL.
        text_dim: Length of an embedding; 0 where there are none.

    Returns:
        gps float64 [2], weather float32 [8] and text float32 [text_dim], NaN where NULL; daytime and scene int64 [],
        0 where NULL.
    """
    weather = metadata.weather
    return {
        "gps": torch.tensor(metadata.gps or (torch.nan, torch.nan), dtype=torch.float64),
        "weather": torch.tensor([torch.nan if weather is None else float(word in weather) for word in WEATHER]),
        "daytime": torch.tensor(0 if metadata.daytime is None else 1 + DAYTIME.index(metadata.daytime)),
        "scene": torch.tensor(0 if metadata.scene is None else 1 + SCENE.index(metadata.scene)),
        "text": torch.full((text_dim,), torch.nan) if text_vector is None else torch.tensor(text_vector),
    }


def mask_targets(mask: np.ndarray | None, side: int) -> torch.Tensor:
    """Share of each cell that each class covers: float32 [6, side, side], all NaN without a mask.

    Args:
        mask: A mask from `decode_mask`, or None.
        side: Cells per side.
    """
    if mask is None:
        return torch.full((len(MASK_CLASSES), side, side), torch.nan)
    targets = torch.zeros(len(MASK_CLASSES), side, side)
    for class_, target in enumerate(targets):
        covered = mask == class_ + 1
        if covered.any():  # most classes occur in few photos
            target.copy_(F.adaptive_avg_pool2d(torch.from_numpy(covered)[None].float(), side)[0])
    return targets


class ShardDataset(CheckedFiles, Dataset[dict[str, torch.Tensor]]):
    """One split of a folder of shards; reads any sample at once, without scanning the tars.

    Reads are checked: a tar's length and layout, each member's header, the photo's hash, and the record against the
    index. Anything that differs from the index is a `UserError` that names tar and sample.
    """

    def __init__(self, place: Path | str, index: Index, name: str, spec: InputSpec):
        """Open a split.

        Args:
            place: Folder or URL of the shards.
            index: The shards' index.
            name: Name of the split.
            spec: The model's input spec.
        """
        self.name, self.split = name, index.split(name)
        self.spec = spec
        self.text_dim = int(index.arguments.get("text_dim", 0))
        self.rows_of_shard: list[list[int]] = [[] for _ in self.split.shards]
        for row, sample in enumerate(self.split.samples):
            self.rows_of_shard[sample.shard].append(row)
        # By row the split that the record names, and by tar all that lies in it.
        self._homes: Sequence[str] = (name,) * len(self.split.samples)
        self._contents: Sequence[Sequence[Sample]] = [
            [self.split.samples[row] for row in rows] for rows in self.rows_of_shard
        ]
        if isinstance(self.split, DealtSplit):
            self._homes, self._contents = self.split.homes, self.split.contents
        self._checked_shards: set[int] = set()
        remedy = (
            f"`python -m data_prep verify --shards {place}` lists all damage, then fetch the shards again or make them "
            "anew"
        )
        super().__init__(place, self.split.shards, remedy)

    def __len__(self) -> int:
        return len(self.split.samples)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """Views, metadata and targets of a photo; see `load`."""
        return self.load(number)[1]

    def load(self, number: int) -> tuple[Record, dict[str, torch.Tensor]]:
        """Read a photo, or an augmented copy of it.

        Args:
            number: `copy * len(self) + row`; copy 0 is the photo itself, see `make_copy` for others.

        Returns:
            The photo's record, and views, metadata and targets.
        """
        copy, row = divmod(number, len(self))
        return self.assemble(row, self._read(row, self.split.samples[row].members), copy)

    def assemble(self, row: int, members: Mapping[str, bytes], copy: int = 0) -> tuple[Record, dict[str, torch.Tensor]]:
        """Do what `load` does for a sample whose members were read already; they are given by extension.

        Raises:
            UserError: The members are not those of the index, or cannot be decoded.
        """
        sample = self.split.samples[row]
        with self.naming(sample.shard, sample):
            record = check_sample(sample, self._homes[row], members)
            image, size = decode_scaled(members[sample.photo_extension], self.spec, _SCRATCH)
            mask = decode_mask(members["mask.png"]) if "mask.png" in members else None
            return record, {**self.cut(image, size, mask, record, copy), **self.about(row, record, copy)}

    def cut(
        self, image: np.ndarray, size: tuple[int, int], mask: np.ndarray | None, record: Record, copy: int
    ) -> dict[str, torch.Tensor]:
        """Views and `mask_targets` of a decoded photo, or of one of its copies; see `prepare` and `mask_targets`.

        Args:
            image: uint8 [H, W, 3], see `decode_scaled`.
            size: Width and height of the photo at full size.
            mask: A mask from `decode_mask`, or None.
            record: The photo's record.
            copy: 0 for the photo itself, see `make_copy` for others.
        """
        if copy:
            image = make_copy(image, record.sha256, copy)
            size = image.shape[1], image.shape[0]
            if mask is not None:
                mask = placement_of(mask.shape[1], mask.shape[0], record.sha256, copy).mask(mask)
        views = prepare_image(image, self.spec, size)
        return {**views, "mask_targets": mask_targets(mask, self.spec.mask_side)}

    def about(self, row: int, record: Record, copy: int = 0) -> dict[str, torch.Tensor]:
        """The tensors of a sample that come neither from its photo nor from its mask.

        Returns:
            Metadata, `labels` int64 [], -1 where unknown, `row` int64 [], its position in the split, and
            `null_metadata` bool [], whether the metadata is a target only, and no input, as in `STREETVISION` copies.
        """
        label, vector = self.split.samples[row].label, record.text_vector
        if vector is not None and len(vector) != self.text_dim:
            with self.naming(self.split.samples[row].shard, record):
                raise Damage(f"the vector of its description has {len(vector)} numbers, not {self.text_dim}")
        return {
            **metadata_tensors(record.metadata, record.text_vector, self.text_dim),
            "null_metadata": torch.tensor(is_streetvision(copy)),
            "labels": torch.tensor(-1 if label is None else label),
            "row": torch.tensor(row),
        }

    def mask(self, row: int) -> np.ndarray | None:
        """The sample's mask, see `decode_mask`; None if it has no mask."""
        sample = self.split.samples[row]
        if "mask.png" not in sample.members:
            return None
        members = self._read(row, ("json", "mask.png"))
        with self.naming(sample.shard, sample):
            check_sample(sample, self._homes[row], members)
            return decode_mask(members["mask.png"])

    def sample(self, row: int) -> tuple[Record, bytes]:
        """The sample's record, and the photo's original bytes."""
        sample = self.split.samples[row]
        members = self._read(row, (sample.photo_extension, "json"))
        with self.naming(sample.shard, sample):
            return check_sample(sample, self._homes[row], members), members[sample.photo_extension]

    def photo(self, row: int) -> bytes:
        """The photo's original bytes."""
        return self.sample(row)[1]

    def record(self, row: int) -> Record:
        """The sample's record."""
        sample, members = self.split.samples[row], self._read(row, ("json",))
        with self.naming(sample.shard, sample):
            return read_member_record(sample, self._homes[row], members["json"])

    def _read(self, row: int, extensions: Iterable[str]) -> dict[str, bytes]:
        """Members of a sample in one read: they are adjacent in the tar."""
        sample = self.split.samples[row]
        with self.naming(sample.shard, sample):
            self._check_shard(sample.shard)
            places = {extension: sample.members[extension] for extension in extensions}
            start = min(offset for offset, _ in places.values()) - HEADER_BYTES
            end = max(offset + size for offset, size in places.values())
            data = self.read_range(sample.shard, start, end)
            members = {}
            for extension, (offset, size) in places.items():
                at = offset - start
                check_header(data[at - HEADER_BYTES : at], f"{sample.key}.{extension}", size)
                members[extension] = data[at : at + size]
            return members

    def _check_shard(self, number: int) -> None:
        """Check before a shard's first read in each process that it holds nothing that the index does not list."""
        if number in self._checked_shards:
            return
        with self.naming(number):
            shard = self.split.shards[number]
            end = check_layout(shard, self._contents[number])
            check_tail(self.read_range(number, end, shard.bytes))
        self._checked_shards.add(number)
