"""Which photo goes to which split: near-duplicates stay together, test cities are absent from training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.decisions.links import chain, components
from data_prep.decisions.places import near_pairs
from pipeline.data.balance import fill_splits
from pipeline.data.index import SPLITS
from pipeline.errors import UserError

# Photos closer than this, directly or through others, form one block; the first keeps most cities apart.
BLOCK_RADII_M = (25_000, 10_000, 3_000, 1_000)
MIN_BLOCKS = 3
# A split is filled when it has at least this part of its share; coarser blocks are worth some imbalance.
FILLED = 1 / 3

Names = Sequence[str | None]
"""A name for each photo; None where there is none."""


@dataclass(frozen=True)
class Assignment:
    """The split of each photo."""

    splits: np.ndarray
    """Position in `SPLITS`, int64 [N]."""
    rule: str
    """How it was decided, for the summary."""
    straddling_groups: int = 0
    """Groups with photos in more than one split; only a source's own splits can have them."""


def link_groups(points: np.ndarray, videos: Names, duplicates: Iterable[np.ndarray], distance_m: float) -> np.ndarray:
    """Number the groups: photos of one video, near each other or of the same look, directly or through others.

    Args:
        points: Latitude and longitude in degrees, [N, 2], NaN for NULL.
        videos: Name of each photo's video, or None.
        duplicates: Pairs that look the same, [pairs, 2] each.
        distance_m: Largest distance between two photos of one place, in metres; 0 links the same coordinates only.

    Returns:
        int64 [N], from 0, in the order in which groups first appear.
    """
    return components(len(points), itertools.chain([_same_word(videos)], duplicates, near_pairs(points, distance_m)))


def keep_splits(given: Names, groups: np.ndarray, labels: np.ndarray, val_share: float, seed: int) -> Assignment:
    """Keep the source's own splits. If it has no validation split, a share of its training groups becomes one.

    Args:
        given: The split of each photo in the source.
        groups: int64 [N].
        labels: 0, 1 or -1, [N].
        val_share: Share of the training photos; 0 leaves validation empty.
        seed: Decides which groups go to validation.

    Raises:
        UserError: A photo has no split.
    """
    without = sum(split is None for split in given)
    if without:
        raise UserError(
            f"--splits keep needs a split for every photo, and {without} of {len(given)} have none; "
            "add a column 'split', or use --splits geographic"
        )
    splits = np.array([SPLITS.index(split or "") for split in given])
    homes = np.unique(np.stack([groups, splits], axis=1), axis=0)  # each group's splits
    train, val = SPLITS.index("train"), SPLITS.index("val")
    rule = "kept from the source"
    if val_share and not (splits == val).any():
        rows = np.flatnonzero(splits == train)
        shares = np.array([1 - val_share, val_share, 0.0])
        _, blocks = np.unique(groups[rows], return_inverse=True)
        splits[rows] = fill_splits(blocks.ravel(), labels[rows], shares, seed)
        rule = "kept from the source; validation is a part of its training groups"
    return Assignment(splits, rule, straddling_groups=int((np.bincount(homes[:, 0]) > 1).sum()))


def geographic_splits(
    points: np.ndarray, cities: Names, groups: np.ndarray, labels: np.ndarray, *, shares: np.ndarray, seed: int
) -> Assignment:
    """Give whole cities to each split; where these are too few or too uneven, smaller areas, and at last single groups.

    Args:
        points: Latitude and longitude in degrees, [N, 2], NaN for NULL.
        cities: Name of each photo's city, or None; it stands in for a GPS that is NULL.
        groups: int64 [N]; never divided.
        labels: 0, 1 or -1, [N]; each split gets its share of each.
        shares: Shares of train, val and test, which sum to 1.
        seed: Decides between equally good assignments.
    """
    together = chain(groups)
    names = _same_word([None if city is None else city.casefold() for city in cities])
    candidates: list[tuple[str, Iterable[np.ndarray]]] = [
        ("cities", itertools.chain([together, names], near_pairs(points, BLOCK_RADII_M[0]))),
        *((f"areas {r / 1000:g} km apart", itertools.chain([together], near_pairs(points, r))) for r in BLOCK_RADII_M),
        ("groups", [together]),
    ]
    placed = ~np.isnan(points[:, 0])
    named = np.array([city is not None for city in cities], dtype=bool)
    best_filling, best = -1.0, None
    for rule, links in candidates:
        blocks = components(len(points), links)
        places = np.unique(blocks[placed | named if rule == "cities" else placed])
        if len(places) < MIN_BLOCKS and rule != "groups":
            continue
        splits = fill_splits(blocks, labels, shares, seed)
        sizes = np.bincount(splits, minlength=len(SPLITS))
        filling = (sizes[shares > 0] / (shares[shares > 0] * len(points))).min()
        if filling > best_filling:
            best_filling, best = filling, Assignment(splits, rule)
        if filling >= FILLED:
            break
    assert best is not None  # groups always qualify
    return best


def random_splits(groups: np.ndarray, labels: np.ndarray, *, shares: np.ndarray, seed: int) -> Assignment:
    """Give whole groups to each split, wherever they were taken: train and test then share cities.

    Args:
        groups: int64 [N]; never divided.
        labels: 0, 1 or -1, [N]; each split gets its share of each.
        shares: Shares of train, val and test, which sum to 1.
        seed: Decides between equally good assignments.
    """
    return Assignment(fill_splits(groups, labels, shares, seed), "random groups")


def _same_word(words: Names) -> np.ndarray:
    known = np.array([row for row, word in enumerate(words) if word is not None], dtype=np.int64)
    return known[chain(np.array([word for word in words if word is not None], dtype=object))]
