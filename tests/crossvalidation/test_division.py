"""Folds of whole places: nothing that belongs together is divided, whatever the photos are like."""

from collections import Counter

import numpy as np
import pytest

from pipeline.crossvalidation.division import NO_GPS, divide, find_places
from pipeline.data.index import Cluster, Index, Sample, Split
from pipeline.errors import UserError


def make_index(groups, clusters, labels, splits=None):
    """An index of photos without shards."""
    splits = splits or ["train"] * len(labels)
    samples = {"train": [], "val": [], "test": []}
    for row, (group, cluster, label) in enumerate(zip(groups, clusters, labels, strict=True)):
        one = Sample(f"photo_{row}", 0, {}, label, int(group), int(cluster), 1.0, 96, 64)
        samples[splits[row]].append(one)
    return Index(
        {name: Split((), tuple(part)) for name, part in samples.items()}, (Cluster(None, "mixed", 0, 0, 0),), {}, {},
        "1.0", "ab" * 32, {}, {},
    )  # fmt: skip


def random_photos(seed):
    """Groups of a few photos, in clusters or without GPS, and some groups that reach over two clusters."""
    rng = np.random.default_rng(seed)
    sizes = 1 + rng.geometric(0.4, size=rng.integers(80, 200))
    groups = np.repeat(rng.permutation(len(sizes)), sizes)
    clusters = rng.integers(0, rng.integers(12, 40), size=len(sizes))[groups]
    strays = rng.random(len(groups)) < rng.choice([0.0, 0.02])
    clusters[strays] = rng.integers(0, 12, size=strays.sum())
    labels = [None if draw > 0.9 else int(draw < 0.4) for draw in rng.random(len(groups))]
    splits = rng.choice(["train", "val", "test"], p=[0.7, 0.2, 0.1], size=len(groups))
    return groups, clusters, labels, list(splits)


@pytest.mark.parametrize("seed", range(20))
def test_no_group_and_no_place_is_divided_and_every_labelled_photo_is_in_one_fold(seed):
    groups, clusters, labels, splits = random_photos(seed)
    parts = 3 + seed % 3
    places = find_places(make_index(groups, clusters, labels, splits), ["train", "val"], parts)
    folds = divide(places, parts, seed, "ab" * 32)
    taken = [r for r, label in enumerate(labels) if label is not None and splits[r] != "test"]
    assert sorted(folds.part_of) == sorted(f"photo_{row}" for row in taken)
    part = {row: folds.part_of[f"photo_{row}"] for row in taken}
    for numbers in (groups, clusters if places.rule.startswith("a GPS cluster") else groups):
        for number in set(numbers[taken].tolist()) - ({NO_GPS} if numbers is clusters else set()):
            assert len({part[row] for row in taken if numbers[row] == number}) == 1
    for number in set(places.numbers.tolist()):
        assert (
            len({folds.part_of[key] for key, mine in zip(places.keys, places.numbers, strict=True) if mine == number})
            == 1
        )
    assert set(part.values()) == set(range(parts))


def test_a_photo_without_gps_goes_with_its_near_duplicates_and_else_its_group_is_a_place():
    #        a place   with one of its frames   two clusters in one group   only a group
    groups = [0, 1, 2, 2, 3, 3, 4, 4]
    clusters = [1, 1, 1, 0, 2, 3, 0, 0]
    index = make_index(groups + list(range(5, 25)), clusters + list(range(4, 24)), [0, 1] * 14)
    places = find_places(index, ["train"], 3)
    assert places.rule == "a GPS cluster, or a group of near-duplicates without GPS"
    number = places.numbers
    assert number[0] == number[1] == number[2] == number[3]
    assert number[4] == number[5]
    assert number[6] == number[7]
    assert len({int(number[row]) for row in (0, 4, 6, 8)}) == 4


def test_groups_are_places_where_there_are_too_few_clusters():
    groups = np.repeat(np.arange(30), 3)
    places = find_places(make_index(groups, 1 + groups % 9, [0, 1, 1] * 30), ["train"], 5)
    assert places.rule == "a group of near-duplicates"
    assert len(set(places.numbers.tolist())) == 30
    assert find_places(make_index(groups, 1 + groups % 10, [0, 1, 1] * 30), ["train"], 5).rule == "a GPS cluster"


@pytest.mark.parametrize("seed", range(5))
def test_folds_are_balanced_in_size_and_class(seed):
    rng = np.random.default_rng(seed)
    clusters = 1 + rng.choice(40, size=2000, p=rng.dirichlet(np.full(40, 2.0)))
    labels = (rng.random(2000) < rng.beta(2, 4, size=41)[clusters]).astype(int).tolist()
    places = find_places(make_index(np.arange(2000), clusters, labels), ["train"], 5)
    part_of = divide(places, 5, seed, "").part_of
    sizes, ones = Counter(part_of.values()), Counter(part_of[f"photo_{r}"] for r, label in enumerate(labels) if label)
    assert max(sizes.values()) < 1.2 * min(sizes.values())
    assert max(ones.values()) < 1.3 * min(ones.values())


def test_the_same_seed_gives_the_same_folds():
    groups, clusters, labels, splits = random_photos(1)
    places = find_places(make_index(groups, clusters, labels, splits), ["train"], 4)
    assert divide(places, 4, 7, "") == divide(places, 4, 7, "")


def test_too_few_places_labels_or_classes_are_one_sentence_with_the_numbers():
    groups = np.repeat(np.arange(9), 4)
    index = make_index(groups, np.zeros(36), [0, 1] * 18)
    with pytest.raises(UserError, match=r"the 36 labelled photos lie in 9 places .*, and 5 folds need 10, 2 for each"):
        find_places(index, ["train"], 5)
    with pytest.raises(UserError, match="no labelled photo in the splits val, test; choose other --splits"):
        find_places(index, ["val", "test"], 3)
    one_place = make_index(groups, np.zeros(36), [int(group == 0) for group in groups])
    with pytest.raises(UserError, match="roadwork is in 1 places and none in 8"):
        divide(find_places(one_place, ["train"], 3), 3, 0, "")
