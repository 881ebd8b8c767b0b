"""Batches dealt to processes are the batches of one."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Subset, TensorDataset

from pipeline.evaluation.dealing import Deal, deal, undeal


def batches(total: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """What the loader of a process yields."""
    share = deal(total, batch_size, rank, world_size)
    loader = DataLoader(Subset(TensorDataset(torch.arange(total)), share), batch_size)
    return [batch[0].tolist() for batch in loader]


@pytest.mark.parametrize("total", [0, 1, 7, 8, 9, 40])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_batches_are_those_of_one_loader_and_each_process_has_every_nth(total, batch_size, world_size):
    whole = list(BatchSampler(range(total), batch_size, drop_last=False))
    hands = [batches(total, batch_size, rank, world_size) for rank in range(world_size)]
    assert hands == [whole[rank::world_size] for rank in range(world_size)]
    answers = [[10 * row for batch in hand for row in batch] for hand in hands]
    assert undeal(answers, batch_size) == [10 * row for row in range(total)]


def test_some_batches_are_dealt_by_their_numbers():
    share = Deal(10, 4, [0, 2])
    assert list(share) == [0, 1, 2, 3, 8, 9]
    assert list(Deal(10, 4, [1])) == [4, 5, 6, 7]
    assert share[2:5] == [2, 3, 8]
    assert len(Deal(10, 4, [])) == 0
    with pytest.raises(IndexError):
        share[6]
