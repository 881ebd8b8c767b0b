import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.dataset import ShardDataset, collate, mask_targets, metadata_tensors, prepare
from pipeline.data.index import read_index
from pipeline.data.record import Metadata
from pipeline.data.vocabulary import WEATHER
from pipeline.errors import UserError
from tests.small_run import make_shards


@pytest.fixture
def dataset(tmp_path):
    make_shards(tmp_path / "shards", {"train": [0, 1, None]})
    return ShardDataset(tmp_path / "shards", read_index(tmp_path / "shards").split("train"), 32, 12, 8)


def test_a_sample_is_read_from_its_place_in_the_tar(dataset):
    with tarfile.open(dataset.folder / dataset.split.shards[0].name) as tar:
        for row, sample in enumerate(dataset.split.samples):
            member = tar.extractfile(f"{sample.key}.jpg")
            assert member is not None
            photo = member.read()
            assert dataset.photo(row) == photo
            torch.testing.assert_close(dataset[row]["views"], prepare(photo, 32, 12)["views"])
            assert dataset.record(row).key == sample.key


def test_an_unknown_label_is_minus_one(dataset):
    batch = collate([dataset[row] for row in range(3)])
    assert batch["labels"].tolist() == [0, 1, -1]
    assert batch["views"].shape == (3, 12, 3, 32, 32)
    assert batch["row"].tolist() == [0, 1, 2]


def test_a_dataset_travels_to_a_worker_without_its_open_files(dataset):
    _ = dataset[0]
    there = pickle.loads(pickle.dumps(dataset))
    assert not there._files
    torch.testing.assert_close(there[1]["views"], dataset[1]["views"])


def test_a_missing_or_shortened_shard_is_named(dataset):
    path = dataset.folder / dataset.split.shards[0].name
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=path.name):
        ShardDataset(dataset.folder, dataset.split, 32, 12, 8)


def test_null_metadata_is_nan_or_zero():
    tensors = metadata_tensors(Metadata())
    assert tensors["gps"].isnan().all()
    assert tensors["weather"].isnan().all()
    assert (int(tensors["daytime"]), int(tensors["scene"])) == (0, 0)


def test_metadata_words_become_their_places():
    tensors = metadata_tensors(Metadata(gps=(1.5, -2.5), weather=("rainy", "wet"), daytime="dark", scene="rural"))
    assert tensors["gps"].tolist() == [1.5, -2.5]
    assert [WEATHER[i] for i in tensors["weather"].nonzero().flatten()] == ["rainy", "wet"]
    assert (int(tensors["daytime"]), int(tensors["scene"])) == (2, 3)


def test_mask_targets_are_the_covered_shares():
    mask = np.zeros((40, 80), dtype=np.uint8)
    mask[3:17, 11:42] = 2
    mask[20:40, 60:80] = 6
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "PNG")
    targets = mask_targets(stream.getvalue(), 8).numpy()
    for class_, cell_y, cell_x in np.ndindex(6, 8, 8):
        cell = mask[5 * cell_y : 5 * cell_y + 5, 10 * cell_x : 10 * cell_x + 10]
        assert targets[class_, cell_y, cell_x] == pytest.approx((cell == class_ + 1).mean(), abs=1e-6)


def test_without_a_mask_the_targets_are_nan():
    assert mask_targets(None, 4).isnan().all()
