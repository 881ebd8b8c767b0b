"""The photos that train, validate and test: whole places each, and near-duplicates stay together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.study.photos import Photos
from data_prep.decisions.links import chain, components
from data_prep.decisions.places import near_pairs
from data_prep.decisions.splits import BLOCK_RADII_M, fill_splits
from pipeline.errors import UserError

NOWHERE = -1
PLACES_PER_PART = 2
SEED = 0  # of the division, which does not depend on a training's seed


@dataclass(frozen=True)
class Fold:
    """Rows of the photos, int64 each."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Places:
    """The places where the photos were taken, and the parts that the places are divided into."""

    blocks: np.ndarray
    """Number of each photo's place, int64 [N]; `NOWHERE` for photos whose place is unknown, which are left out."""
    parts: np.ndarray
    """Number of each photo's part, int64 [N], `NOWHERE` where the place is; a place lies in one part."""
    rule: str
    """What a place is."""


@cache
def divide(photos: Photos, parts: int) -> Places:
    """Divide the photos into parts of about equal size and shares of roadwork, place by place.

    Places are cities; where there are too few cities, smaller areas, and at last groups of near-duplicates.

    Args:
        photos: All photos.
        parts: Number of parts.

    Raises:
        UserError: There are too few places, or a part lacks a class.
    """
    blocks, rule = find_blocks(photos, PLACES_PER_PART * parts)
    known = np.flatnonzero(blocks != NOWHERE)
    labels = photos.labels[known]
    of_part = np.full(len(blocks), NOWHERE)
    of_part[known] = fill_splits(blocks[known], labels, np.full(parts, 1 / parts), SEED)
    counts = np.stack([np.bincount(of_part[known][labels == label], minlength=parts) for label in (0, 1)])
    if not counts.all():
        raise UserError(
            f"the {len(known)} photos lie in too few places for {parts} parts of both classes; set plan.parts to less, "
            "or study more photos"
        )
    return Places(blocks, of_part, rule)


def find_blocks(photos: Photos, needed: int) -> tuple[np.ndarray, str]:
    """Number of each photo's place, and what a place is: the coarsest rule by which there are as many as needed.

    A photo without GPS and city, whose near-duplicates have neither, could be of any place, so it is left out. If no
    photo has a place, the groups of near-duplicates are taken.
    """
    names = np.array([(city or "").casefold() for city in photos.cities], dtype=object)
    named = np.flatnonzero(names != "")
    on_map = ~np.isnan(photos.points[:, 0])
    placed = on_map | (names != "")
    together = chain(photos.groups)
    groups = components(len(names), [together])
    if not placed.any():
        return _enough(groups, needed), "a group of near-duplicates (no photo says where it was taken)"
    # A city's name says nothing about which of its areas a photo lies in.
    candidates: list[tuple[str, Iterable[np.ndarray], np.ndarray]] = [
        ("a city", [named[chain(names[named])], *near_pairs(photos.points, BLOCK_RADII_M[0])], placed),
        *((f"an area {r / 1000:g} km from any other", near_pairs(photos.points, r), on_map) for r in BLOCK_RADII_M),
        ("a group of near-duplicates", (), placed),
    ]
    blocks, is_known, chosen = groups, placed, ""
    for rule, links, says in candidates:
        blocks, is_known, chosen = components(len(names), [together, *links]), np.isin(groups, groups[says]), rule
        if len(np.unique(blocks[is_known])) >= needed:
            break
    return _enough(np.where(is_known, blocks, NOWHERE), needed), chosen


def _enough(blocks: np.ndarray, needed: int) -> np.ndarray:
    """The places, numbered from 0 without gaps."""
    numbers, renumbered = np.unique(blocks, return_inverse=True)
    first = int(np.searchsorted(numbers, 0))  # 1 where some are left out
    if len(numbers) - first < needed:
        raise UserError(
            f"the photos lie in {len(numbers) - first} places, and the folds need {needed}; set plan.parts to less, or "
            "study more photos"
        )
    return renumbered.ravel() - first


def make_fold(photos: Photos, parts: int, number: int, seen_places: bool = False, train_share: float = 1.0) -> Fold:
    """One fold: part `number` tests, the next one validates, and all others train.

    Args:
        photos: All photos.
        parts: Number of parts, see `divide`.
        number: Number of the fold, from 0.
        seen_places: Half of the tested photos train, instead of as many others, and only the other half is tested, as
            a random split would do.
        train_share: Share of the training photos that are left.
    """
    of_part = divide(photos, parts).parts
    test, val = np.flatnonzero(of_part == number), np.flatnonzero(of_part == (number + 1) % parts)
    train = np.flatnonzero((of_part != NOWHERE) & (of_part != number) & (of_part != (number + 1) % parts))
    generator = np.random.default_rng([SEED, number])
    if seen_places:
        seen, test = split_groups(test, photos.groups, len(test) // 2, generator)
        _, train = split_groups(train, photos.groups, len(seen), generator)
        train = np.sort(np.concatenate([train, seen]))
    if train_share < 1:
        train, _ = split_groups(train, photos.groups, round(train_share * len(train)), generator)
    return Fold(train, val, test)


def split_groups(
    rows: np.ndarray, groups: np.ndarray, size: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows in two, whole groups to each side, chosen at random until the first has `size` rows or more.

    Args:
        rows: int64 [M], ascending.
        groups: Near-duplicates have the same number, for all photos, [N].
        size: Fewest rows of the first side.
        generator: Random generator that chooses the groups.

    Returns:
        The rows of both sides, ascending.
    """
    numbers, of_row, counts = np.unique(groups[rows], return_inverse=True, return_counts=True)
    order = generator.permutation(len(numbers))
    before = np.concatenate([[0], np.cumsum(counts[order])[:-1]])
    first = np.zeros(len(numbers), dtype=bool)
    first[order[before < size]] = True
    return rows[first[of_row.ravel()]], rows[~first[of_row.ravel()]]
