"""Which data reaches training, by the keys of `data`."""

from __future__ import annotations

from itertools import islice

import pytest

from pipeline.config import Config, DataConfig, TrainConfig
from pipeline.data.features import open_cache
from pipeline.data.index import read_index
from pipeline.errors import UserError
from pipeline.feed import open_feed
from tests.data.tampering import distribute
from tests.feature_cache import make_cache
from tests.small_run import make_backbone, make_shards, small_config

PHOTOS = 12


@pytest.fixture
def shards(tmp_path):
    make_shards(tmp_path / "shards", {"train": [number % 2 for number in range(PHOTOS)]})
    distribute(tmp_path / "shards", "train", 4)
    return f"file://{tmp_path / 'shards'}"


def feed(shards, *, rank=0, world_size=1, cache=None, **data):
    config = Config(
        data=DataConfig(**{"shards": str(shards), "workers": 0, "epoch_share": 1.0, **data}),
        train=TrainConfig(batch_size=4),
        model=small_config("none"),
    )
    return open_feed(config, read_index(shards), 2, rank, world_size, cache)


def rows(feed, batches, start=0):
    return [batch["row"].tolist() for batch in islice(feed.batches(start), batches)]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_of_batches_holds_every_photo_and_goes_on_without_end(shards, streaming):
    found = rows(feed(shards, streaming=streaming, shuffle_buffer=1), 30)
    assert all(len(batch) == 2 for batch in found)
    assert sorted(row for batch in found[:6] for row in batch) == list(range(PHOTOS))


def test_streaming_and_its_buffer_change_the_order(shards):
    orders = [
        rows(feed(shards), 6),
        rows(feed(shards, streaming=True, shuffle_buffer=1), 6),
        rows(feed(shards, streaming=True, shuffle_buffer=8), 6),
    ]
    assert len({str(order) for order in orders}) == 3


def test_a_resumed_stream_starts_a_new_pass_and_a_resumed_random_access_goes_on(shards):
    exact = feed(shards)
    assert rows(exact, 3, start=6) == rows(exact, 6)[3:]
    streamed = feed(shards, streaming=True)
    assert rows(streamed, 6, start=6) == rows(streamed, 6, start=6)
    assert rows(streamed, 6, start=6) != rows(streamed, 6)


def test_a_shorter_epoch_streams_that_share_of_the_photos(shards):
    streamed = feed(shards, streaming=True, epoch_share=0.5, sampling="uniform")
    assert streamed.order.probabilities.tolist() == pytest.approx([0.5] * PHOTOS)


def test_there_are_no_more_readers_than_tars(shards, capsys):
    assert feed(shards, streaming=True, workers=9).loader.num_workers == 4
    assert feed(shards, streaming=True, workers=9, rank=1, world_size=3).loader.num_workers == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "4 tars with 1 x 4 readers" in told[0]
    assert "a resumed run starts a new pass" in told[0]


def test_features_replace_the_photos_and_bring_copies(tmp_path):
    make_shards(tmp_path / "shards", {"train": [number % 2 for number in range(PHOTOS)]})
    cache = make_cache(tmp_path / "cache", tmp_path / "shards", make_backbone(tmp_path / "backbone"), copies=2)
    index = read_index(tmp_path / "shards")
    fed = feed(tmp_path / "shards", features=str(cache), cache=open_cache(str(cache), index))
    batches = list(islice(fed.batches(0), 18))
    assert all("views" not in batch and len(batch["cells"]) == 2 for batch in batches)
    photos = rows(feed(tmp_path / "shards"), 18)
    assert [batch["row"].tolist() for batch in batches] == photos  # the same photos in the same order
    seen = {(row, cls[0].sum().item()) for b in batches for row, cls in zip(b["row"].tolist(), b["cls"], strict=True)}
    assert len(seen) == 3 * PHOTOS


def test_streaming_and_features_exclude_each_other():
    with pytest.raises(UserError, match=r"data\.streaming is True, but must be false with data\.features"):
        DataConfig(streaming=True, features="cache")


def test_more_processes_than_tars_are_refused(shards):
    with pytest.raises(UserError, match=r"each of the 5 processes, and the training split has 4; .*--shard_mb"):
        feed(shards, streaming=True, world_size=5)
