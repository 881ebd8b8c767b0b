"""Tars read from end to end: the right samples, mixed, shared, and nothing lost or added in silence."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, islice, pairwise

import fsspec
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.data.batch import collate
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import read_index
from pipeline.data.mixture import Mixture
from pipeline.data.sampler import SystematicDraw
from pipeline.data.storage import open_folder
from pipeline.data.streaming import StreamedSplit
from pipeline.errors import UserError
from pipeline.model.config import InputSpec
from tests.data.tampering import TAMPERED, distribute, edit_split, tamper
from tests.small_run import make_shards

PHOTOS, TARS = 12, 4


@pytest.fixture
def folder(tmp_path):
    make_shards(tmp_path / "shards", {"train": [number % 2 for number in range(PHOTOS)]})
    distribute(tmp_path / "shards", "train", TARS)
    return tmp_path / "shards"


def stream(place, *, weights=None, samples=PHOTOS, seed=0, buffer=1, rank=0, world_size=1, start=0, **shares):
    data = ShardDataset(place, read_index(place), "train", InputSpec(32, mask_side=8))
    weights = np.ones(len(data)) if weights is None else weights
    draw = SystematicDraw(weights, min(samples, len(data)), seed=seed, max_repeats=4, strata=data.split.strata)
    mixture = Mixture(seed, **shares)
    split = StreamedSplit(data, draw, mixture=mixture, buffer=buffer, rank=rank, world_size=world_size)
    split.start = start
    return split


def rows(split, number):
    return [int(sample["row"]) for sample in islice(split, number)]


def test_a_streamed_pass_sees_the_copies_that_its_mixture_chooses(folder):
    shares = {"augment_share": 0.3, "streetvision_share": 0.4}
    for start, epoch in ((0, 0), (2 * PHOTOS, 2)):
        split = stream(folder, start=start, **shares)
        copies = Mixture(0, **shares).copies_at(epoch, PHOTOS)[0]
        assert {0, 2 * epoch + 1, 2 * epoch + 2} == set(copies.tolist())
        for sample in islice(split, PHOTOS):
            row = int(sample["row"])
            expected = split.data[int(copies[row]) * PHOTOS + row]
            assert torch.equal(sample["views"], expected["views"])
            assert torch.equal(sample["null_metadata"], expected["null_metadata"])


def test_a_pass_has_every_sample_as_random_access_has_it(folder):
    split = stream(folder)
    samples = list(islice(split, PHOTOS))
    assert sorted(int(sample["row"]) for sample in samples) == list(range(PHOTOS))
    for sample in samples:
        expected = split.data[int(sample["row"])]
        assert sample.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(sample[key], value, equal_nan=True)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_url_gives_the_same_sequence_as_the_folder(folder, scheme):
    url = f"file://{folder}"
    if scheme == "memory":
        url = f"memory://{folder.parent.name}"
        for path in folder.iterdir():
            open_folder(url).put(path, path.name)
    assert rows(stream(url, buffer=5), 30) == rows(stream(folder, buffer=5), 30)


@pytest.mark.parametrize("buffer", [1, 6])
def test_the_sequence_follows_from_the_seed_the_start_and_nothing_else(folder, buffer):
    first = rows(stream(folder, buffer=buffer), 40)
    assert rows(stream(folder, buffer=buffer), 40) == first
    assert rows(stream(folder, buffer=buffer, seed=1), 40) != first
    assert rows(stream(folder, buffer=buffer, start=8), 40) != first


def test_passes_take_the_tars_in_other_orders(folder):
    sequence = rows(stream(folder), 6 * PHOTOS)
    passes = {tuple(sequence[at : at + PHOTOS]) for at in range(0, len(sequence), PHOTOS)}
    assert len(passes) > 3
    assert all(sorted(one) == list(range(PHOTOS)) for one in passes)


def test_the_buffer_mixes_photos_of_several_tars(folder):
    """Without one, a tar's photos follow each other as they lie; with one they do not."""

    def neighbours(buffer):
        sequence = rows(stream(folder, buffer=buffer), 400)
        return sum(second == first + 1 for first, second in pairwise(sequence))

    assert neighbours(1) >= 400 * 2 / 3 - 1
    assert neighbours(12) < 120


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2), (2, 2)])
def test_readers_share_a_pass_without_overlap_or_loss(folder, world_size, workers):
    seen = []
    for rank in range(world_size):
        split = stream(folder, rank=rank, world_size=world_size)
        loader = DataLoader(split, 1, num_workers=workers, collate_fn=collate)
        seen += [int(batch["row"]) for batch in islice(loader, PHOTOS // world_size)]
    assert sorted(seen) == list(range(PHOTOS))


UNEQUAL = np.array([1.0, 4.0, 0.2, 1.0, 9.0, 1.0, 0.5, 3.0, 1.0, 0.1, 1.0, 2.0])


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2), (2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_a_pass_shows_each_photo_as_often_as_an_epoch_of_random_access(folder, seed, world_size, workers):
    """All readers together, whatever their number; nobody tells them what the others read."""
    expected = stream(folder, weights=UNEQUAL, samples=10, seed=seed).draw
    seen, one = Counter(), 3
    for rank in range(world_size):
        split = stream(folder, weights=UNEQUAL, samples=10, seed=seed, rank=rank, world_size=world_size)
        for lane in range(max(1, workers)):
            visits = split.visits(rank * max(1, workers) + lane, world_size * max(1, workers))
            share = TARS // (world_size * max(1, workers))
            for visit in islice(visits, one * share, (one + 1) * share):
                rows_there = split.data.rows_of_shard[visit.shard]
                seen.update({row: int(visit.counts[row]) for row in rows_there})
    assert seen == Counter(dict(enumerate(expected.counts(one).tolist())))
    assert max(seen.values()) > 1


def test_a_photo_that_a_pass_shows_several_times_comes_with_other_copies_from_one_reading(folder):
    shares = {"augment_share": 0.5, "streetvision_share": 0.5}
    split = stream(folder, weights=UNEQUAL, samples=10, **shares)
    found = list(islice(split, 10))
    assert Counter(int(sample["row"]) for sample in found) == Counter(
        SystematicDraw(UNEQUAL, 10, seed=0, max_repeats=4, strata=split.data.split.strata).order(0).tolist()
    )
    often = [sample for sample in found if sample["row"] == 4]
    assert len(often) > 1
    for first, second in combinations(often, 2):
        assert first["views"].shape != second["views"].shape or not torch.equal(first["views"], second["views"])


def test_the_samples_of_a_pass_are_those_that_its_visits_name(folder):
    split = stream(folder, weights=UNEQUAL, samples=10)
    visits = islice(split.visits(0, 1), 5 * TARS)
    expected = [int(row) for visit in visits for row in split.data.rows_of_shard[visit.shard]
                for _ in range(visit.counts[row])]  # fmt: skip
    assert rows(split, len(expected)) == expected


def test_a_resumed_stream_begins_the_pass_after_the_one_that_was_interrupted(folder):
    for start, number in ((0, 0), (10, 1), (11, 2), (20, 2)):
        split = stream(folder, weights=UNEQUAL, samples=10, start=start)
        np.testing.assert_array_equal(next(split.visits(0, 1)).counts, split.draw.counts(number))


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_tar_is_refused_with_shard_and_member_named(tmp_path, kind, scheme):
    make_shards(tmp_path / "shards", {"train": [0, 1, 0]})
    change, words = TAMPERED[kind]
    tamper(tmp_path / "shards" / "train-00000.tar", change)
    with pytest.raises(UserError, match=rf"train-00000\.tar.*{words}"):
        rows(stream(f"{scheme}{tmp_path / 'shards'}"), 3 + 1)


def test_a_tampered_sample_that_the_pass_leaves_out_is_refused_too(folder):
    change, words = TAMPERED["a missing photo"]
    tamper(folder / "train-00000.tar", change)
    with pytest.raises(UserError, match=words):
        rows(stream(folder, samples=1), 2)


def test_fewer_samples_than_the_index_promises_are_refused(folder):
    edit_split(folder, "train", lambda split: split["samples"].pop())
    with pytest.raises(UserError, match=r"train-00003\.tar: the index lists 2 of its 3 samples"):
        rows(stream(folder), PHOTOS)


def test_a_tar_that_ends_early_or_vanishes_while_it_is_read_is_refused(folder):
    split = stream(folder)
    path = folder / "train-00002.tar"
    whole = path.read_bytes()
    for size in (0, 512, 1000, 1024 + len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"train-00002\.tar: .*train_[678]"):
            rows(split, PHOTOS)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00002\.tar: it is gone"):
        rows(split, PHOTOS)


def test_a_line_that_breaks_is_one_sentence(folder, monkeypatch):
    url = f"memory://{folder.parent.name}"
    for path in folder.iterdir():
        open_folder(url).put(path, path.name)

    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self, size):
            raise ConnectionError("the store hung up")

    split = stream(url)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "open", lambda *_, **__: Broken())
    with pytest.raises(UserError, match=r"memory://.* cannot be used: the store hung up"):
        rows(split, 1)


def test_damage_that_a_worker_meets_keeps_its_sentence(folder):
    change, _ = TAMPERED["another photo"]
    tamper(folder / "train-00000.tar", change)
    loader = DataLoader(stream(folder), 1, num_workers=1, collate_fn=collate)
    with pytest.raises(UserError) as caught:
        Counter(int(batch["row"]) for batch in islice(loader, PHOTOS))
    assert str(caught.value).startswith(f"{folder}/train-00000.tar, sample train_1: the photo is not the one")
