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
from pipeline.data.sampler import PositionSampler, SystematicDraw
from pipeline.model.config import InputSpec


def numbers(mixture, positions, *, weights=None, samples=9, rank=0, world_size=1):
    draw = SystematicDraw(np.ones(12) if weights is None else weights, samples, seed=mixture.seed, max_repeats=4)
    sampler = MixtureSampler(draw, mixture=mixture, batch_size=1, rank=rank, world_size=world_size)
    return [sampler.number_at(position) for position in positions]


@pytest.mark.parametrize("shares", [(0.3, 0.2), (0.0, 0.5), (0.7, 0.0), (0.25, 0.75)])
def test_kinds_come_at_their_rates_and_anew_each_time(shares):
    photos, epochs, repeats = 500, 10, 2
    mild, client = shares
    copies = np.concatenate([Mixture(3, mild, client).copies_at(epoch, photos, repeats) for epoch in range(epochs)])
    times = epochs * repeats
    for found, share in (((copies > 0) & (copies % 2 == 0), mild), (copies % 2 == 1, client)):
        assert stats.binomtest(int(found.sum()), photos * times, share).pvalue > 0.001
        # A photo's showings are independent draws: the spread of its counts is the binomial's.
        assert found.sum(axis=0).var() == pytest.approx(times * share * (1 - share), rel=0.25, abs=1e-9)


def test_other_seeds_draw_other_kinds():
    first, second = (Mixture(seed, 0.5).copies_at(0, 200) > 0 for seed in (0, 1))
    assert 60 < (first == second).sum() < 140


def test_copies_made_on_the_spot_are_new_in_every_epoch_and_cached_ones_take_turns():
    online, cached = Mixture(0, 0.5, 0.5), Mixture(0, 0.5, 0.5, copies=5)
    for epoch in range(8):
        found = online.copies_at(epoch, 50)[0]
        assert set(found.tolist()) == {2 * epoch + 1, 2 * epoch + 2}
        kept = cached.copies_at(epoch, 50)[0]
        assert set(kept.tolist()) == {2 * (epoch % 3) + 1, 2 * (epoch % 2) + 2}  # three of the client's, two mild ones
        assert ((kept % 2) == (found % 2)).all()
        if epoch < 2:
            assert (kept == found).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("copies", [None, 4, 8, 9])
def test_a_photo_that_comes_again_shows_another_copy_while_there_are_any(seed, copies):
    """Over several epochs of a sampler that shows some photos up to four times."""
    weights = np.random.default_rng(seed).lognormal(0, 1.5, 12)
    mixture, seen = Mixture(seed, 0.6, 0.4, copies=copies), [set() for _ in range(24)]
    for epoch in range(40):
        found = numbers(mixture, range(9 * epoch, 9 * epoch + 9), weights=weights)
        for row in range(12):
            for kind, stored in ((0, copies and copies // 2), (1, copies and (copies + 1) // 2)):
                shown = [number // 12 for number in found if number % 12 == row and number // 12 % 2 == kind]
                assert len(set(shown)) == len(shown) or len(shown) > stored
                if copies is None:
                    assert not seen[2 * row + kind] & set(shown)  # nor does a copy ever come again
                seen[2 * row + kind] |= set(shown)
    often = int(weights.argmax())
    assert copies is None or seen[2 * often] | seen[2 * often + 1] == set(range(1, copies + 1))


def test_without_shares_the_samples_are_the_photos():
    sampler = PositionSampler(
        SystematicDraw(np.ones(12), 9, seed=1, max_repeats=4), batch_size=1, rank=0, world_size=1
    )  # fmt: skip
    for copies in (None, 0, 4):
        assert numbers(Mixture(1, copies=copies), range(40)) == [sampler.number_at(position) for position in range(40)]


@pytest.mark.parametrize("seed", range(6))
def test_the_mixture_goes_on_where_it_stopped_and_is_the_same_for_any_number_of_processes(seed):
    mixture, weights = Mixture(seed, 0.3, 0.3), np.random.default_rng(seed).lognormal(0, 1.5, 12)
    whole = numbers(mixture, range(60), weights=weights)
    assert len({number // 12 for number in whole}) > 4
    assert len({number % 12 for number in whole[:9]}) < 9  # a photo comes twice in an epoch
    assert numbers(mixture, range(31, 60), weights=weights) == whole[31:]
    assert [
        numbers(mixture, [position], weights=weights, rank=position % 3, world_size=3)[0] for position in range(60)
    ] == whole


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
