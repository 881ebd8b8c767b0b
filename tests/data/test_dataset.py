import hashlib
import io
import json
import os
import pickle
import re
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pipeline.data.batch import collate
from pipeline.data.dataset import ShardDataset, decode_mask, decode_scaled, mask_targets, metadata_tensors, prepare
from pipeline.data.index import read_index
from pipeline.data.record import Metadata
from pipeline.data.storage import open_folder
from pipeline.errors import EXIT_USER, UserError, run
from pipeline.model.config import InputSpec
from pipeline.names import WEATHER
from tests.data.tampering import TAMPERED, edit_split, read_members, swapped_bit, tamper, without_hashes
from tests.small_run import make_shards, noisy_photo

SPEC = InputSpec(32, mask_side=8)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shards"


@pytest.fixture
def dataset(folder):
    make_shards(folder, {"train": [0, 1, None]})
    return ShardDataset(folder, read_index(folder), "train", SPEC)


def test_a_sample_is_read_from_its_place_in_the_tar(dataset):
    with tarfile.open(dataset.place / dataset.split.shards[0].name) as tar:
        for row, sample in enumerate(dataset.split.samples):
            member = tar.extractfile(f"{sample.key}.jpg")
            assert member is not None
            photo = member.read()
            assert dataset.photo(row) == photo
            torch.testing.assert_close(dataset[row]["views"], prepare(photo, SPEC)["views"])
            assert dataset.record(row).key == sample.key


def test_half_scale_decoding_reaches_the_views(dataset):
    side = 12  # whose canvas of 30 px a photo of 96 x 64 still reaches when it is halved
    full, half = (
        ShardDataset(
            dataset.place, read_index(dataset.place), "train", InputSpec(side, mask_side=8, decode_scale=scale)
        )[0]
        for scale in ("full", "half")
    )
    assert not torch.equal(full["views"], half["views"])
    assert {key for key in full if not torch.equal(full[key], half[key]) and not full[key].isnan().any()} == {"views"}


def test_half_scale_is_half_of_the_photo_where_that_reaches_the_canvas_and_full_is_all_of_it():
    """A photo of 96 x 64 px: views of 12 px need a canvas of 30, which half of it reaches; those of 16 px need 40."""
    data = noisy_photo(0)
    for side, expected in ((12, (32, 48)), (16, (64, 96))):
        image, size = decode_scaled(data, InputSpec(side, decode_scale="half"))
        assert (image.shape[:2], size) == (expected, (96, 64))
    image, size = decode_scaled(data, InputSpec(12))
    assert (image.shape[:2], size) == ((64, 96), (96, 64))
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(image.astype(int) - whole).max() <= 3  # the two decoders round the colours apart


@pytest.mark.parametrize("scale", ["quarter", "", "Half"])
def test_a_scale_that_nobody_knows_is_refused(scale):
    with pytest.raises(UserError, match=rf"data\.decode_scale is '{scale}', but must be one of full, half"):
        InputSpec(32, decode_scale=scale)


def test_a_sample_has_as_many_views_and_mask_cells_as_its_spec_says(dataset):
    sample = ShardDataset(dataset.place, read_index(dataset.place), "train", InputSpec(48, 5, 3))[0]
    assert sample["views"].shape == (5, 3, 48, 48)
    assert (sample["boxes"].shape, sample["view_mask"].shape) == ((5, 4), (5,))
    assert sample["mask_targets"].shape == (6, 3, 3)


def test_an_unknown_label_is_minus_one(dataset):
    batch = collate([dataset[row] for row in range(3)])
    assert batch["labels"].tolist() == [0, 1, -1]
    assert batch["views"].shape == (3, 12, 3, 32, 32)
    assert batch["row"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_url_gives_the_same_samples_as_the_folder(dataset, scheme):
    url = f"file://{dataset.place}"
    if scheme == "memory":
        url = f"memory://{dataset.place.parent.name}"
        for path in dataset.place.iterdir():
            open_folder(url).put(path, path.name)
    remote = ShardDataset(url, read_index(url), "train", SPEC)
    for row in range(3):
        assert remote.photo(row) == dataset.photo(row)
        assert remote.record(row) == dataset.record(row)
        torch.testing.assert_close(remote[row]["views"], dataset[row]["views"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_a_url_that_the_parent_has_read_from(dataset, context):
    url = f"file://{dataset.place}"
    remote = ShardDataset(url, read_index(url), "train", SPEC)
    _ = remote[0]
    loader = DataLoader(remote, 2, num_workers=1, collate_fn=collate, multiprocessing_context=context)
    assert torch.cat([batch["row"] for batch in loader]).tolist() == [0, 1, 2]


def test_a_dataset_travels_to_a_worker_without_its_open_files(dataset):
    _ = dataset[0]
    there = pickle.loads(pickle.dumps(dataset))
    assert not there.folder._descriptors
    torch.testing.assert_close(there[1]["views"], dataset[1]["views"])


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_missing_or_shortened_shard_is_named_at_once(dataset, scheme):
    path, place = dataset.place / "train-00000.tar", f"{scheme}{dataset.place}"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=f"{place}/train-00000.tar: it is missing or not"):
        ShardDataset(place, read_index(place), "train", SPEC)
    path.unlink()
    with pytest.raises(UserError, match=f"{place}/train-00000.tar: it is missing or not"):
        ShardDataset(place, read_index(place), "train", SPEC)


def read_all(folder):
    data = ShardDataset(folder, read_index(folder), "train", SPEC)
    return [data[row] for row in range(len(data))]


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_tar_is_refused_with_shard_and_member_named(folder, kind, scheme):
    make_shards(folder, {"train": [0, 1, 0]})
    assert len(read_all(f"{scheme}{folder}")) == 3
    change, words = TAMPERED[kind]
    tamper(folder / "train-00000.tar", change)
    with pytest.raises(UserError, match=f"train-00000.tar.*{words}"):
        read_all(f"{scheme}{folder}")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda split: split["samples"][1].update(label=0), "train_1: .* differ in label"),
        (lambda split: split["samples"][1].update(weight=9.0, cluster=1), "train_1: .* differ in GPS cluster, weight"),
        (lambda split: split["samples"][1].update(key="train_7"), "train_7: .* but 'train_1.jpg'"),
        (
            lambda split: split["samples"][1]["members"]["json"].__setitem__(1, 9),
            r"train_1: train_1\.json is \d+ bytes",
        ),
        (lambda split: split["samples"].pop(1), "lists 2 of its 3 samples"),
        (lambda split: split["samples"].append(split["samples"][0]), "lists 4 of its 3 samples"),
    ],
)
def test_an_index_that_says_something_else_is_refused(folder, edit, words):
    make_shards(folder, {"train": [0, 1, 0]})
    edit_split(folder, "train", edit)
    with pytest.raises(UserError, match=words):
        read_all(folder)


def test_a_tar_with_room_for_more_members_is_refused(folder):
    make_shards(folder, {"train": [0, 1]})
    path = folder / "train-00000.tar"
    path.write_bytes(path.read_bytes() + bytes(20_000))
    edit_split(folder, "train", lambda split: split["shards"][0].update(bytes=path.stat().st_size))
    with pytest.raises(UserError, match=r"train-00000\.tar: \d+ bytes follow the last member"):
        read_all(folder)


def test_a_test_photo_that_an_index_puts_into_training_is_refused(folder):
    make_shards(folder, {"train": [0, 1], "test": [0, 1]})
    index = read_index(folder)
    swapped = replace(index, splits={**index.splits, "train": index.splits["test"]})
    with pytest.raises(UserError, match=r"test_0: .* differ in split"):
        _ = ShardDataset(folder, swapped, "train", SPEC)[0]


def test_a_tar_that_shrinks_or_vanishes_after_the_start_is_refused(dataset):
    path = dataset.place / "train-00000.tar"
    _ = dataset[0]
    os.truncate(path, 4000)
    with pytest.raises(UserError, match=r"train-00000\.tar, sample train_2: it ends before its byte"):
        dataset[2]
    path.unlink()
    elsewhere = pickle.loads(pickle.dumps(dataset))  # without the file that is open here
    with pytest.raises(UserError, match=r"train-00000\.tar, sample train_0: it is gone"):
        elsewhere[0]


def test_a_photo_that_no_program_can_decode_is_named(folder):
    """Shards may have been made after a look at the headers only."""
    make_shards(folder, {"train": [0, 1]})
    members = read_members(folder / "train-00000.tar")
    cut = members[0][1][: len(members[0][1]) // 2].ljust(len(members[0][1]), b"\0")
    record = json.dumps({**json.loads(members[1][1]), "sha256": hashlib.sha256(cut).hexdigest()}).encode()
    tamper(folder / "train-00000.tar", lambda m: [(m[0][0], cut), (m[1][0], record), *m[2:]])
    edit_split(folder, "train", without_hashes)
    with pytest.raises(UserError, match="train_0: cannot be decoded"):
        read_all(folder)


@pytest.mark.parametrize(("changes", "said"), [
    ({"label": "1"}, "label: expected int | null, got str"), ({"width": 64.5}, "width: expected int, got float"),
    ({"metadata": None}, "metadata: expected object, got null"), ({"text_vector": "a"}, "text_vector: expected array"),
    ({"text_vector": [1.0]}, "the vector of its description has 1 numbers, not 0"),
    ({"text_vector": [float("nan")]}, "it holds NaN"), ({"group": 10**30}, "which is too large"),
    *[({"metadata": {"gps": None, "weather": None, **words}}, said) for words, said in (
        ({"gps": [91.0, 0]}, r"metadata: gps is [91.0, 0.0], which is no latitude"),
        ({"gps": [1e9, 1e9]}, "which is no latitude"), ({"gps": [1]}, "metadata.gps: expected array of length 2"),
        ({"gps": "1,2"}, "metadata.gps: expected array | null, got str"),
        ({"daytime": "noon"}, "metadata: daytime has 'noon', which is not in the vocabulary"),
        ({"weather": ["sunny", "x"]}, "metadata: weather has 'x'"), ({"scene": ""}, "metadata: scene has ''"),
        ({"weather": "sunny"}, "metadata.weather: expected array | null, got str"),
    )],
])  # fmt: skip
def test_a_record_with_another_value_is_named_with_its_tar_and_sample(folder, changes, said):
    make_shards(folder, {"train": [0, 1]})
    before = read_members(folder / "train-00000.tar")[1][1]
    record = json.dumps({**json.loads(before), "source": "", **changes})
    record = record.replace(', "video": null', "").replace(', "city": null, "description": null', "").encode()
    assert len(record) <= len(before)
    tamper(folder / "train-00000.tar", lambda m: [m[0], (m[1][0], record.ljust(len(before))), *m[2:]])
    edit_split(folder, "train", without_hashes)
    with pytest.raises(UserError, match=rf"train-00000\.tar, sample train_0: .*{re.escape(said)}"):
        read_all(folder)


def test_damage_that_a_worker_meets_is_one_sentence_and_status_2(folder, capsys):
    make_shards(folder, {"train": [0, 1]})
    tamper(folder / "train-00000.tar", swapped_bit("train_1.jpg"))

    def main():
        data = ShardDataset(folder, read_index(folder), "train", SPEC)
        list(DataLoader(data, 1, num_workers=1, collate_fn=collate))

    assert run(main) == EXIT_USER
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {folder}/train-00000.tar, sample train_1: the photo is not the one of its record")
    assert "Traceback" not in err
    assert (err.count("\n"), out) == (1, "")


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


def test_text_is_the_records_vector_and_nan_where_null(tmp_path):
    make_shards(tmp_path / "shards", {"train": [0, 1]}, text_dim=5)
    data = ShardDataset(tmp_path / "shards", read_index(tmp_path / "shards"), "train", SPEC)
    text = collate([data[0], data[1]])["text"]
    assert (text.dtype, text.shape) == (torch.float32, (2, 5))
    vector = data.record(0).text_vector
    assert vector is not None
    torch.testing.assert_close(text[0], torch.tensor(vector))
    assert text[1].isnan().all()


def test_shards_without_text_vectors_give_empty_ones(dataset):
    assert collate([dataset[0], dataset[1]])["text"].shape == (2, 0)


def test_mask_targets_are_the_covered_shares():
    mask = np.zeros((40, 80), dtype=np.uint8)
    mask[3:17, 11:42] = 2
    mask[20:40, 60:80] = 6
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "PNG")
    targets = mask_targets(decode_mask(stream.getvalue()), 8).numpy()
    for class_, cell_y, cell_x in np.ndindex(6, 8, 8):
        cell = mask[5 * cell_y : 5 * cell_y + 5, 10 * cell_x : 10 * cell_x + 10]
        assert targets[class_, cell_y, cell_x] == pytest.approx((cell == class_ + 1).mean(), abs=1e-6)


def test_without_a_mask_the_targets_are_nan():
    assert mask_targets(None, 4).isnan().all()
