"""What the audit says about photos that look the same: one finding for each set of them, however many pairs it has."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from data_prep.audit.checks import label_conflicts, look_alikes, photos_alike
from data_prep.audit.job import describe_splits
from data_prep.audit.photos import Entry, Photos
from pipeline.data.record import Record


def make_photos(
    splits: Sequence[str], hashes: Sequence[int], *, labels: Sequence[int | None] = (), files: Sequence[str] = ()
) -> Photos:
    """Photos of one brightness that look the same where up to four bits of their hashes differ."""
    given = {"sha256": "", "width": 64, "height": 64, "gps_cluster": 0, "sample_weight": 1.0}
    records = [
        Record(key=f"{row}", label=label, split=split, source=f"{row}.jpg", group=row, **given)
        for row, (split, label) in enumerate(zip(splits, labels or [None] * len(splits), strict=True))
    ]
    return Photos(
        entries=[Entry(cast("Any", None), split, "", "") for split in splits],
        records=records,
        sha256=np.array(files or [f"{row}" for row in range(len(splits))]),
        hashes=np.array(hashes, dtype=np.uint64),
        thumbnails=np.full((len(splits), 256), 100, dtype=np.uint8),
    )


def everything(photos: Photos) -> np.ndarray:
    return photos_alike(photos, np.arange(len(photos.records)))


def across(photos: Photos) -> list[tuple[int, ...]]:
    return [finding.rows for finding in look_alikes(photos, everything(photos))]


def flipped(*bits: int) -> int:
    return sum(1 << bit for bit in bits)


def test_a_set_is_one_finding_with_its_closest_pair_and_counts():
    hashes = [0, flipped(1), flipped(1, 2), flipped(1, 2, 3, 4, 5), flipped(1, 2, 3, 4, 5, 6)]
    photos = make_photos(["train", "train", "train", "test", "test"], hashes)
    (finding,) = look_alikes(photos, everything(photos))
    assert finding.rows == (2, 3)
    assert finding.hash_bits == 3
    assert finding.note == "3 in train, 2 in test; these two differ in 3 of 64 bits of the hash"


def test_each_pair_of_splits_has_its_own_finding_the_closest_first():
    photos = make_photos(["train", "val", "test"], [0, flipped(1, 2), flipped(1)])
    assert [(f.rows, f.hash_bits) for f in look_alikes(photos, everything(photos))] == [
        ((0, 2), 1),
        ((1, 2), 1),
        ((0, 1), 2),
    ]


def test_two_splits_that_only_a_third_links_do_not_look_alike():
    photos = make_photos(["train", "val", "test"], [0, flipped(1, 2, 3), flipped(1, 2, 3, 4, 5, 6)])
    assert sorted(across(photos)) == [(0, 1), (1, 2)]


def test_copies_of_one_file_are_left_to_their_own_check():
    assert across(make_photos(["train", "test"], [0, 0], files=["a", "a"])) == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_a_recoded_copy_of_a_file_that_is_in_both_splits_is_found(order):
    """The recoded photo of the training split looks like the copy in the test split, which is another file."""
    rows = [("train", 0, "a"), ("test", 0, "a"), ("train", flipped(9), "b")]
    splits, hashes, files = zip(*(rows[number] for number in order), strict=True)
    found = across(make_photos(splits, hashes, files=files))
    assert found == [(order.index(2), order.index(1))]


def test_copies_with_both_labels_are_a_conflict_wherever_they_are():
    photos = make_photos(["train"] * 4, [0, 0, flipped(3), flipped(40, 41, 42, 43, 44, 45)], labels=[1, 0, 1, 0],
                         files=["a", "a", "b", "c"])  # fmt: skip
    (finding,) = label_conflicts(photos, everything(photos))
    assert set(finding.rows) == {0, 1}
    assert finding.note == "2 with roadwork, 1 without; these two differ in 0 of 64 bits of the hash"


def test_photos_that_look_like_another_of_their_split_are_counted():
    hashes = [0, flipped(1), flipped(2), flipped(30, 31, 32, 33, 34, 35), flipped(1, 2)]
    photos = make_photos(["train", "train", "train", "train", "test"], hashes)
    described = describe_splits(photos, everything(photos))
    assert [described[split]["look_alikes"] for split in ("train", "val", "test")] == [3, 0, 0]


def test_a_camera_that_stood_still_is_one_finding_in_little_memory():
    """2,000 frames in each of two splits are eight million pairs."""
    rng = np.random.default_rng(0)
    bits = rng.choice(64, 8, replace=False).astype(np.uint64)
    hashes = np.bitwise_or.reduce(rng.integers(0, 2, (4000, 8), dtype=np.uint64) << bits, axis=1)
    photos = make_photos(["train", "test"] * 2000, hashes.tolist(), labels=[1, 1, 0, 0] * 1000)
    assert (photos.splits[:2].tolist(), photos.labels[:4].tolist()) == ([0, 2], [1, 1, 0, 0])
    tracemalloc.start()
    alike = everything(photos)
    (leak,), (conflict,) = look_alikes(photos, alike), label_conflicts(photos, alike)
    described = describe_splits(photos, alike)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert leak.note.startswith("2000 in train, 2000 in test")
    assert conflict.note.startswith("2000 with roadwork, 2000 without")
    assert described["train"]["look_alikes"] == 2000
    assert most < 60e6
