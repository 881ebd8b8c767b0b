"""The folds of a cross-validation: the photos of some shards dealt anew to training, validation and a held-out part."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.data.index import SPLITS, Index, Sample, Shard, Split, read_index
from pipeline.data.weights import sample_weights
from pipeline.errors import UserError, shown
from pipeline.files import write_text
from pipeline.parsing.typed_json import Malformed, Whole, load_json, to_type

FORMAT = "roadwork folds 1"
DEFAULTS = {"temper": 0.5, "balance": 1.0}  # of shards that do not say
FEWEST_PARTS = 3  # one that is held out, one that validates, and one or more that train


@dataclass(frozen=True)
class Folds:
    """The part of each photo. In fold i, part i is held out, part i + 1 validates, and all others train."""

    source_sha256: str
    """Fingerprint of the photos, as in `Index`."""
    parts: Whole
    part_of: dict[str, Whole]
    """Part of each photo by its key, from 0; photos that are not here take no part."""


@dataclass(frozen=True)
class DealtSplit(Split):
    """A split whose photos lie in the tars of several splits of the shards."""

    homes: tuple[str, ...]
    """For each sample, the split of the shards that it belongs to, which its record names."""
    contents: tuple[tuple[Sample, ...], ...]
    """For each tar, all of its samples, those of other splits too."""
    own_weights: tuple[float, ...]
    """Sampling weights in this fold; those of the samples are of the shards' own training split."""

    @property
    def weights(self) -> np.ndarray:
        """Sampling weights, float64 [N]."""
        return np.array(self.own_weights)


def write_folds(path: Path, folds: Folds) -> None:
    """Write folds as JSON, atomically."""
    write_text(path, json.dumps({"format": FORMAT, **vars(folds)}, indent=0) + "\n")


def read_folds(path: Path, index: Index) -> Folds:
    """Read folds, and check that they are folds of these photos.

    Raises:
        UserError: The file is missing or malformed, has a part without photos, or is of other shards.
    """
    try:
        values = load_json(path.read_bytes())
        found_format = values.get("format") if isinstance(values, dict) else None
        if found_format != FORMAT:
            raise Malformed(f"its format is {shown(found_format)}, and not {FORMAT!r}")
        folds = to_type(values, Folds)
    except FileNotFoundError as error:
        raise UserError(f"data.folds is {str(path)!r}, and there is no such file; `crossval` makes one") from error
    except Malformed as error:
        raise UserError(f"{path} does not describe folds: {error}; let `crossval` make it anew") from error
    found = set(folds.part_of.values())
    if folds.source_sha256 != index.source_sha256:
        raise UserError(f"{path} holds folds of other shards; choose another data.folds or data.shards")
    if folds.parts < FEWEST_PARTS or found != set(range(folds.parts)):
        raise UserError(
            f"{path} has photos in the parts {sorted(found)}, but must have them in each of {FEWEST_PARTS} or more "
            "parts from 0 on; let `crossval` make it anew"
        )
    return folds


def read_dealt(shards: Path | str, folds: str, fold: int) -> Index:
    """The index of some shards, with the splits of a fold where folds are given.

    Args:
        shards: Folder or URL of the shards.
        folds: Path of the folds, as in `data.folds`; empty for the shards' own splits.
        fold: Number of the fold, as in `data.fold`.
    """
    index = read_index(shards)
    return deal(index, read_folds(Path(folds), index), fold) if folds else index


def deal(index: Index, folds: Folds, fold: int) -> Index:
    """The same photos in other splits: `train` and `val` of a fold, and `test` for the part that it holds out.

    The tars stay as they are. Each new split lists all of them, since its photos may lie in any.

    Args:
        index: The shards' index.
        folds: Parts of their photos.
        fold: Number of the fold, from 0.

    Raises:
        UserError: There is no such fold, or a photo is not in the shards.
    """
    if not 0 <= fold < folds.parts:
        raise UserError(f"data.fold is {fold}, but must be one of the {folds.parts} folds, 0 to {folds.parts - 1}")
    shards: list[Shard] = []
    samples: list[Sample] = []
    homes: dict[str, str] = {}
    for home in SPLITS:
        split, first = index.splits[home], len(shards)
        shards += split.shards
        samples += [replace(sample, shard=first + sample.shard) for sample in split.samples]
        homes |= dict.fromkeys((sample.key for sample in split.samples), home)
    absent = folds.part_of.keys() - homes.keys()
    if absent:
        raise UserError(
            f"the folds name {len(absent)} photos that are not in the shards, such as {min(absent)!r}; let `crossval` "
            "make them anew"
        )
    contents: list[list[Sample]] = [[] for _ in shards]
    chosen: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for sample in samples:
        contents[sample.shard].append(sample)
        if sample.key in folds.part_of:
            chosen[role_of(folds.part_of[sample.key], folds.parts, fold)].append(sample)
    whole = tuple(map(tuple, contents))
    splits: dict[str, Split] = {
        name: DealtSplit(
            tuple(shards),
            tuple(part),
            tuple(homes[sample.key] for sample in part),
            whole,
            tuple(weights_of(part, index).tolist()),
        )
        for name, part in chosen.items()
    }
    return replace(index, splits=splits)


def weights_of(samples: list[Sample], index: Index) -> np.ndarray:
    """Sampling weights of the photos of a split, float64 [N], by the temper and balance of their shards.

    A target of `--target_gps` is not in the index, so all clusters have the same one.
    """
    clusters = np.array([sample.cluster for sample in samples], dtype=np.int64)
    labels = np.array([-1 if sample.label is None else sample.label for sample in samples], dtype=np.int64)
    temper, balance = (float(index.arguments.get(name, usual)) for name, usual in DEFAULTS.items())
    return sample_weights(clusters, labels, temper, balance=balance)


def role_of(part: int, parts: int, fold: int) -> str:
    """The split that a part is in a fold: `test` if it is held out, `val`, or `train`."""
    return {0: "test", 1: "val"}.get((part - fold) % parts, "train")
