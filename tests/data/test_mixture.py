"""The mixture of regimes: its rates, that nothing but seed, epoch and row decides, and that masks go with the photo."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from data_prep.scenes.data_set import scenes
from data_prep.shards.command import shard
from pipeline.data.augment import copy_placement, streetvision_placement
from pipeline.data.copies import make_copy
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import read_index
from pipeline.data.mixture import Mixture, MixtureSampler
from pipeline.data.photo import decode
from pipeline.data.sampler import PositionSampler
from pipeline.model.config import InputSpec


def numbers(mixture, positions, *, weights=None, samples=9, rank=0, world_size=1):
    sampler = MixtureSampler(
        np.ones(12) if weights is None else weights, samples,
        mixture=mixture, batch_size=1, rank=rank, world_size=world_size,
    )  # fmt: skip
    return [sampler.row_at(position) for position in positions]


@pytest.mark.parametrize("shares", [(0.3, 0.2), (0.0, 0.5), (0.7, 0.0), (0.25, 0.75)])
def test_kinds_come_at_their_rates_and_anew_in_every_epoch(shares):
    photos, epochs = 500, 20
    mild, client = shares
    copies = np.stack([Mixture(3, mild, client).copies_at(epoch, photos) for epoch in range(epochs)])
    for found, share in (((copies > 0) & (copies % 2 == 0), mild), (copies % 2 == 1, client)):
        assert stats.binomtest(int(found.sum()), photos * epochs, share).pvalue > 0.001
        # A photo's epochs are independent draws: the spread of its counts is the binomial's.
        assert found.sum(axis=0).var() == pytest.approx(epochs * share * (1 - share), rel=0.25, abs=1e-9)


def test_other_seeds_draw_other_kinds():
    first, second = (Mixture(seed, 0.5).copies_at(0, 200) > 0 for seed in (0, 1))
    assert 60 < (first == second).sum() < 140


def test_copies_made_on_the_spot_are_new_in_every_epoch_and_cached_ones_take_turns():
    online, cached = Mixture(0, 0.5, 0.5), Mixture(0, 0.5, 0.5, copies=5)
    for epoch in range(8):
        found = online.copies_at(epoch, 50)
        assert set(found.tolist()) == {2 * epoch + 1, 2 * epoch + 2}
        kept = cached.copies_at(epoch, 50)
        assert set(kept.tolist()) == {2 * (epoch % 3) + 1, 2 * (epoch % 2) + 2}  # three of the client's, two mild ones
        assert ((kept % 2) == (found % 2)).all()
        if epoch < 2:
            assert (kept == found).all()


def test_without_shares_the_samples_are_the_photos():
    sampler = PositionSampler(np.ones(12), 9, seed=1, batch_size=1, rank=0, world_size=1)
    for copies in (None, 0, 4):
        assert numbers(Mixture(1, copies=copies), range(40)) == [sampler.row_at(position) for position in range(40)]


def test_the_mixture_goes_on_where_it_stopped_and_is_the_same_for_any_number_of_processes():
    mixture = Mixture(1, 0.3, 0.3)
    whole = numbers(mixture, range(60))
    assert len({number // 12 for number in whole}) > 4
    assert numbers(mixture, range(31, 60)) == whole[31:]
    assert [numbers(mixture, [position], rank=position % 3, world_size=3)[0] for position in range(60)] == whole


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Shards of scenes, whose masks mark the roadwork."""
    folder = tmp_path_factory.mktemp("marked")
    scenes(folder / "scenes", 12, "320x240", seed=3, workers=1)
    shard(folder / "scenes", folder / "shards", workers=1)
    return ShardDataset(folder / "shards", read_index(folder / "shards"), "train", InputSpec(128, mask_side=16))


@pytest.mark.parametrize("copy", [1, 2, 3, 4, 5, 7])
def test_an_object_is_where_the_mask_of_its_copy_says(marked, copy, monkeypatch):
    """In place of the photo comes one that shows nothing but the marked objects, and its colours are left alone."""
    monkeypatch.setattr("pipeline.data.copies.augmented_copy", only_moved)
    monkeypatch.setattr("pipeline.data.copies.streetvision", only_sent)
    agreed = total = 0.0
    for row in range(len(marked)):
        mask = marked.mask(row)
        if mask is None or not mask.any():
            continue
        record, data = marked.sample(row)
        height, width = decode(data).shape[:2]
        shown = np.asarray(Image.fromarray((mask > 0).astype(np.uint8) * 255).resize((width, height)))
        image = np.repeat(shown[..., None], 3, axis=2)
        sample = marked.cut(image, (width, height), mask, record, copy)
        cells = sample["mask_targets"].sum(dim=0)
        seen = sample["views"][0, 0].float() / 255  # the global view: every cell of the mask is 8x8 of its pixels
        seen = torch.nn.functional.avg_pool2d(seen[None], 8)[0]
        agreed += torch.minimum(seen, cells).sum().item()
        total += torch.maximum(seen, cells).sum().item()
    assert total > 5
    assert agreed / total > 0.9


def only_moved(image, rng):
    return copy_placement(*image.shape[1::-1], rng).photo(image)


def only_sent(image, level, rng):
    return streetvision_placement(*image.shape[1::-1], level, rng).photo(image)


def test_a_sample_that_is_a_copy_shows_the_copy_and_keeps_its_targets(marked):
    row = 2
    record, data = marked.sample(row)
    for copy in (1, 2):
        made, sample = make_copy(decode(data), record.sha256, copy), marked[copy * len(marked) + row]
        expected = Image.fromarray(made).resize((128, 128), Image.Resampling.LANCZOS)
        difference = sample["views"][0].permute(1, 2, 0).numpy().astype(float) - np.asarray(expected)
        assert np.sqrt((difference**2).mean()) < 2  # of 255 grey levels
        assert bool(sample["null_metadata"]) is (copy == 1)
        assert (sample["labels"], sample["row"]) == (marked[row]["labels"], row)
