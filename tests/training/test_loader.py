"""Which data reaches training, by the keys of `data`."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.config import Config, DataConfig, TrainConfig
from pipeline.data.features import open_cache
from pipeline.data.index import Split, read_index
from pipeline.data.views import view_boxes
from pipeline.errors import UserError
from pipeline.training.loader import open_loader
from tests.data.tampering import distribute
from tests.feature_cache import make_cache
from tests.small_run import make_backbone, make_shards, small_config

PHOTOS = 12


@pytest.fixture
def shards(tmp_path):
    make_shards(tmp_path / "shards", {"train": [number % 2 for number in range(PHOTOS)]})
    distribute(tmp_path / "shards", "train", 4)
    return f"file://{tmp_path / 'shards'}"


def train_loader(shards, *, rank=0, world_size=1, cache=None, **data):
    config = Config(
        data=DataConfig(**{"shards": str(shards), "workers": 0, "epoch_share": 1.0, **data}),
        train=TrainConfig(batch_size=4),
        model=small_config("none"),
    )
    return open_loader(config, read_index(shards), 2, rank, world_size, cache)


def rows(train_loader, batches, start=0):
    return [batch["row"].tolist() for batch in islice(train_loader.batches(start), batches)]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_of_batches_holds_every_photo_and_goes_on_without_end(shards, streaming):
    found = rows(train_loader(shards, streaming=streaming, shuffle_buffer=1), 30)
    assert all(len(batch) == 2 for batch in found)
    assert sorted(row for batch in found[:6] for row in batch) == list(range(PHOTOS))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("data", "heavy"), [({}, 4), ({"max_repeats": 3}, 3), ({"max_repeats": 1}, 1), ({"sampling": "uniform"}, 1)]
)
def test_an_epoch_shows_heavy_photos_again_up_to_the_cap(shards, monkeypatch, streaming, data, heavy):
    """Two of twelve photos weigh far more than all others."""
    weights = np.where(np.isin(np.arange(PHOTOS), (4, 9)), 1e3, 1.0)
    monkeypatch.setattr(Split, "weights", property(lambda split: weights[: len(split.samples)]))
    batches = rows(train_loader(shards, streaming=streaming, shuffle_buffer=1, **data), 60)
    seen = Counter(row for batch in batches for row in batch)  # ten epochs of twelve
    assert (seen[4], seen[9]) == (10 * heavy, 10 * heavy)
    others = 120 - 20 * heavy
    assert all(abs(seen[row] - others / 10) <= 2 for row in range(PHOTOS) if row not in (4, 9))


def test_streaming_and_its_buffer_change_the_order(shards):
    orders = [
        rows(train_loader(shards), 6),
        rows(train_loader(shards, streaming=True, shuffle_buffer=1), 6),
        rows(train_loader(shards, streaming=True, shuffle_buffer=8), 6),
    ]
    assert len({str(order) for order in orders}) == 3


def test_a_resumed_stream_starts_a_new_pass_and_a_resumed_random_access_goes_on(shards):
    exact = train_loader(shards)
    assert rows(exact, 3, start=6) == rows(exact, 6)[3:]
    streamed = train_loader(shards, streaming=True)
    assert rows(streamed, 6, start=6) == rows(streamed, 6, start=6)
    assert rows(streamed, 6, start=6) != rows(streamed, 6)


def test_a_shorter_epoch_streams_that_share_of_the_photos(shards):
    streamed = train_loader(shards, streaming=True, epoch_share=0.5, sampling="uniform")
    assert streamed.order.draw.expected.tolist() == pytest.approx([0.5] * PHOTOS)


def test_there_are_no_more_readers_than_tars(shards, capsys):
    assert train_loader(shards, streaming=True, workers=9).loader.num_workers == 4
    assert train_loader(shards, streaming=True, workers=9, rank=1, world_size=3).loader.num_workers == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "4 tars with 1 x 4 readers" in told[0]
    assert "a resumed run starts a new pass" in told[0]


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Shards in one tar, and caches of them with two copies of each photo, with one and with none."""
    folder = tmp_path_factory.mktemp("cached")
    make_shards(folder / "shards", {"train": [number % 2 for number in range(PHOTOS)]})
    backbone = make_backbone(folder / "backbone")
    for copies in range(3):
        make_cache(folder / f"cache{copies}", folder / "shards", backbone, copies=copies)
    return folder


def from_cache(cached, copies, **data):
    place = str(cached / f"cache{copies}")
    return train_loader(
        cached / "shards", features=place, cache=open_cache(place, read_index(cached / "shards")), **data
    )  # fmt: skip


def test_features_replace_the_photos_and_their_copies_wait_until_they_are_asked_for(cached, capsys):
    fed = from_cache(cached, 2)
    assert "augmented copies in the feature cache are not used" in capsys.readouterr().err
    batches = list(islice(fed.batches(0), 18))
    assert all("views" not in batch and len(batch["cells"]) == 2 for batch in batches)
    photos = rows(train_loader(cached / "shards"), 18)
    assert [batch["row"].tolist() for batch in batches] == photos  # the same photos in the same order
    assert len(tokens_seen(batches)) == PHOTOS
    assert not any(batch["null_metadata"].any() for batch in batches)


def tokens_seen(batches):
    return {(row, cls[0].sum().item()) for b in batches for row, cls in zip(b["row"].tolist(), b["cls"], strict=True)}


def test_copies_come_from_the_cache_by_their_shares(cached, capsys):
    shares = {"augment_share": 0.4, "streetvision_share": 0.3}
    fed = from_cache(cached, 2, **shares)
    batches = list(islice(fed.batches(0), 6 * 20))
    assert "not used" not in capsys.readouterr().err
    assert len(tokens_seen(batches)) == 3 * PHOTOS
    null = torch.cat([batch["null_metadata"] for batch in batches]).float().mean().item()
    assert null == pytest.approx(0.3, abs=0.1)  # of 240 samples: three standard errors
    online = [
        batch["null_metadata"].tolist() for batch in islice(train_loader(cached / "shards", **shares).batches(0), 120)
    ]
    assert [batch["null_metadata"].tolist() for batch in batches] == online


def test_the_clients_samples_are_224_pixels_online_and_have_no_metadata_to_answer_from(shards):
    for streaming in (False, True):
        fed = train_loader(shards, streetvision_share=1.0, streaming=streaming)
        batch = next(fed.batches(0))
        assert batch["null_metadata"].all()
        assert not batch["weather"].isnan().any()  # which stays a target
        square = view_boxes(224, 224, 32).expand(2, -1, -1)
        assert torch.equal(batch["boxes"], square)


@pytest.mark.parametrize(
    ("copies", "share", "words"),
    [
        (0, "streetvision_share", r"holds no streetvision copies; .* --copies 1` or more"),
        (0, "augment_share", r"holds no augmented copies; .* --copies 2` or more"),
        (1, "augment_share", r"cache1 holds no augmented copies; .*, or set data\.augment_share to 0"),
    ],
)
def test_copies_that_the_cache_lacks_are_refused_in_one_sentence(cached, copies, share, words):
    with pytest.raises(UserError, match=rf"data\.{share} is 0\.5, but .*{words}"):
        from_cache(cached, copies, **{share: 0.5})


def test_streaming_and_features_exclude_each_other():
    with pytest.raises(UserError, match=r"data\.streaming is True, but must be false with data\.features"):
        DataConfig(streaming=True, features="cache")


def test_more_processes_than_tars_are_refused(shards):
    with pytest.raises(UserError, match=r"each of the 5 processes, and the training split has 4; .*--shard_mb"):
        train_loader(shards, streaming=True, world_size=5)
