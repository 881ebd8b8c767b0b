"""Whole blocks of photos, dealt to splits or folds so that each gets its share of both classes."""

from __future__ import annotations

import numpy as np

ATTEMPTS = 64
BLOCKS_TO_TRY = 20_000  # in all attempts together, beyond the first: thousands of blocks fill evenly anyway


def fill_splits(blocks: np.ndarray, labels: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Give whole blocks to splits so that every split comes close to its share of every label.

    The best of some attempts: the first takes the largest blocks first, the others take them in random order.

    Args:
        blocks: int64 [N], numbered from 0.
        labels: 0, 1 or -1, [N].
        shares: Share of each split, which sum to 1; a split whose share is 0 stays empty.
        seed: Seed of the random orders.

    Returns:
        Number of each photo's split, its position in `shares`: int64 [N].
    """
    counts = np.zeros((blocks.max() + 1, 3))  # [blocks, labels]
    np.add.at(counts, (blocks, labels), 1)
    counts = np.concatenate([counts, counts.sum(axis=1, keepdims=True)], axis=1)  # size counts like a label
    wanted = shares[:, None] * counts.sum(axis=0)  # [splits, labels]
    open_splits = np.flatnonzero(shares > 0)
    generator = np.random.default_rng(seed)
    best_error, best = np.inf, np.zeros(len(counts), dtype=np.int64)
    for attempt in range(min(ATTEMPTS, 1 + BLOCKS_TO_TRY // len(counts))):
        order = generator.permutation(len(counts))
        if attempt == 0:
            order = order[np.argsort(-counts[order, -1], kind="stable")]
        error, chosen = _fill(counts, wanted[open_splits], order)
        if error < best_error:
            best_error, best = error, chosen
    return open_splits[best][blocks]


def _fill(counts: np.ndarray, wanted: np.ndarray, order: np.ndarray) -> tuple[float, np.ndarray]:
    """Give each block, in order, to the split where it reduces the squared error most.

    Args:
        counts: Photos of each label in each block, [blocks, labels].
        wanted: Photos of each label wanted in each split, [splits, labels].
        order: Order of the blocks.

    Returns:
        The squared error, and the split of each block.
    """
    missing, chosen = wanted.copy(), np.zeros(len(counts), dtype=np.int64)
    for block in order:
        # |missing - counts|^2 less |missing|^2 is smallest where this product is largest.
        chosen[block] = np.argmax(missing @ counts[block])
        missing[chosen[block]] -= counts[block]
    return float((missing**2).sum()), chosen
