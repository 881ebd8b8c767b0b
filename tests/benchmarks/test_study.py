"""The study: folds keep places and near-duplicates apart, intervals hold what they promise, verdicts follow them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef

from benchmarks.study.answers import ArmAnswers, Bootstrap, worst_place
from benchmarks.study.arms import ARMS, COMPLETE
from benchmarks.study.claims import CLAIMS, judge, judge_steps, steps_to, verdict
from benchmarks.study.folds import NOWHERE, divide, make_fold, split_groups
from benchmarks.study.photos import Photos
from benchmarks.study.sampling import cluster_factors, derange, permuted_weights, shuffle_clusters, training_weights
from pipeline.data.weights import sample_weights
from pipeline.errors import UserError
from pipeline.evaluation.metrics import confusion_counts
from pipeline.evaluation.place_bootstrap import bootstrap_units, expanded_tail

CITIES = [
    (59.9, 10.7),
    (45.8, 4.8),
    (-12.0, -77.0),
    (-31.9, 115.9),
    (34.7, 135.5),
    (-0.2, -78.5),
    (30.0, 31.2),
    (28.6, 77.2),
]


def photos_in(cities=8, per_city=20, lost=0, named=True):
    """Photos in pairs of near-duplicates, spread over cities; the last pairs of the first city may lack a place."""
    rng = np.random.default_rng(0)
    count = cities * per_city
    of_city = np.repeat(np.arange(cities), per_city)
    gps = np.array(CITIES)[of_city] + rng.normal(0, 0.01, (count, 2))
    names = [f"city {number}" if named else None for number in of_city]
    for row in range(lost):
        gps[row], names[row] = np.nan, None
    tensors = {"gps": torch.from_numpy(gps), "labels": torch.from_numpy(rng.permutation(np.arange(count) % 2))}
    return Photos(tensors, np.arange(count) // 2, names, "photos", {}, "f" * 64), of_city


def arm_answers(labels, right, name=COMPLETE, seeds=3, tested=None):
    """An arm that is right with some probability, for each photo on its own."""
    rng = np.random.default_rng(len(name))
    outcomes = []
    for _ in range(seeds):
        said = np.where(rng.random(len(labels)) < right, labels, 1 - labels)
        outcomes.append(confusion_counts(labels, said, 0.5))
    outcomes = np.stack(outcomes)
    if tested is not None:
        outcomes[:, ~tested] = 0
    curves = np.tile([[5.0, 0.5], [10.0, 0.25]], (seeds, 1, 1))
    arm = next(arm for arm in ARMS if arm.name == name)
    return ArmAnswers(arm, outcomes, 0.9, 0.1, (1e-3,) * seeds, curves, 10, 1.0)


# Folds


@pytest.mark.parametrize("named", [True, False])
def test_no_place_and_no_near_duplicate_is_in_two_parts_of_a_fold(named):
    photos, of_city = photos_in(named=named)
    tested = []
    for number in range(4):
        fold = make_fold(photos, 4, number)
        for values in (of_city, photos.groups):
            parts = [set(values[rows]) for rows in (fold.train, fold.val, fold.test)]
            assert sum(map(len, parts)) == len(set.union(*parts)) == len(set(values))
        for rows in (fold.train, fold.val, fold.test):
            assert len(set(photos.labels[rows])) == 2
        tested += fold.test.tolist()
    assert sorted(tested) == list(range(len(of_city)))


def test_photos_of_which_nobody_knows_the_place_are_in_no_part():
    photos, _ = photos_in(lost=7)  # the eighth tells where the seventh was taken
    places = divide(photos, 4)
    assert np.flatnonzero(places.blocks == NOWHERE).tolist() == list(range(6))
    fold = make_fold(photos, 4, 0)
    assert min(map(min, (fold.train, fold.val, fold.test))) == 6


def test_without_any_place_groups_are_kept_apart():
    photos, _ = photos_in(cities=2, per_city=40, lost=80)
    assert "near-duplicates" in divide(photos, 3).rule
    assert len(np.unique(divide(photos, 3).blocks)) == 40


def test_a_random_split_has_seen_the_tested_places_and_is_no_larger():
    photos, of_city = photos_in()
    blocked, seen = make_fold(photos, 4, 1), make_fold(photos, 4, 1, seen_places=True)
    assert set(seen.test) < set(blocked.test)
    assert set(of_city[seen.test]) <= set(of_city[seen.train])
    assert not set(photos.groups[seen.test]) & set(photos.groups[seen.train])
    assert len(seen.train) == len(blocked.train)
    assert np.array_equal(seen.val, blocked.val)


def test_a_share_of_the_training_photos_is_of_whole_groups():
    photos, _ = photos_in()
    whole, half = make_fold(photos, 4, 0), make_fold(photos, 4, 0, train_share=0.5)
    assert len(half.train) == len(whole.train) // 2
    assert set(half.train) < set(whole.train)
    assert not set(photos.groups[half.train]) & set(photos.groups[np.setdiff1d(whole.train, half.train)])


def test_splitting_groups_loses_nothing():
    rows, groups = np.arange(3, 60), np.arange(60) // 4
    first, second = split_groups(rows, groups, 20, np.random.default_rng(0))
    assert np.array_equal(np.sort(np.concatenate([first, second])), rows)
    assert 20 <= len(first) < 24


def test_too_few_places_are_one_sentence():
    with pytest.raises(UserError, match=r"lie in 4 places, and the folds need 6; set plan\.parts to less"):
        divide(photos_in(cities=1, per_city=8)[0], 3)


def test_a_name_alone_places_no_photo_in_an_area_of_its_city():
    """Four cities are too few for three parts of two places each, so areas are places."""
    photos, _ = photos_in(cities=4, per_city=40)
    rng = np.random.default_rng(1)
    moved = photos.points + np.repeat(rng.uniform(-0.8, 0.8, (80, 2)).round(), 2, axis=0)  # a degree is 80 to 111 km
    moved[:6] = np.nan
    photos.tensors["gps"] = torch.from_numpy(moved)
    places = divide(photos, 3)
    assert "an area" in places.rule
    assert (places.blocks[:6] == NOWHERE).all()
    assert (places.blocks[6:] != NOWHERE).all()


# Sampling


def test_permuted_weights_are_the_same_factors_on_other_clusters():
    rng = np.random.default_rng(0)
    clusters, labels = np.repeat([0, 1, 3, 4], [10, 20, 30, 60]), np.tile([0, 1], 60)
    own, dealt = cluster_factors(clusters, 1.0), derange(cluster_factors(clusters, 1.0), rng)
    assert sorted(own) == pytest.approx(sorted(dealt))
    assert not np.isclose(own, dealt).any()
    weights = permuted_weights(clusters, labels, 1.0, np.random.default_rng(1))
    by_cluster = [weights[clusters == number][0] for number in (0, 1, 3, 4)]
    ratio = np.sort(by_cluster) / np.sort(own)
    assert ratio == pytest.approx(ratio[0])
    assert not np.allclose(by_cluster, own)
    assert weights.mean() == pytest.approx(1)


def test_factors_times_class_balance_are_the_weights_of_the_shards():
    rng = np.random.default_rng(0)
    clusters, labels = rng.integers(0, 4, 400), (rng.random(400) < 0.3).astype(int)
    made = cluster_factors(clusters, 0.5)[clusters] * sample_weights(clusters, labels, 0.0)
    assert made / made.mean() == pytest.approx(sample_weights(clusters, labels, 0.5), rel=1e-6)


def test_random_clusters_are_as_large_and_keep_near_duplicates_together():
    clusters, groups = np.repeat([1, 2, 3], [20, 40, 60]), np.arange(120) // 2
    dealt = shuffle_clusters(clusters, groups, np.random.default_rng(0))
    assert np.array_equal(np.bincount(dealt), np.bincount(clusters))
    assert (dealt[::2] == dealt[1::2]).all()
    assert not np.array_equal(dealt, clusters)


def test_class_balance_and_gps_weights_do_what_they_are_called_after():
    photos, of_city = photos_in(cities=3, per_city=60)
    rows = np.flatnonzero((of_city > 0) | (np.arange(180) < 20))  # the first city is a third of the others
    points, labels, groups = photos.points[rows], photos.labels[rows], photos.groups[rows]
    labels = np.where(np.arange(len(rows)) % 5 == 0, 1, 0)
    balanced = training_weights("class_balanced", points, labels, groups, 1.0, 0)
    assert balanced[labels == 1].sum() == pytest.approx(balanced[labels == 0].sum())
    gps = training_weights("gps", points, labels, groups, 1.0, 0)
    assert [gps[of_city[rows] == city].sum() for city in range(3)] == pytest.approx([len(rows) / 3] * 3, rel=1e-6)
    assert (training_weights("uniform", points, labels, groups, 1.0, 0) == 1).all()


# Statistics


def test_a_draw_is_the_mcc_of_the_photos_that_were_drawn():
    photos, of_city = photos_in()
    arm = arm_answers(photos.labels, 0.8)
    bootstrap = Bootstrap(of_city, seeds=3)
    value, draws, units = bootstrap.mcc_draws(arm.outcomes, arm.tested)
    said = arm.outcomes[..., [1, 3]].sum(axis=-1)  # fp or tp
    assert value == pytest.approx(np.mean([matthews_corrcoef(photos.labels, one) for one in said]))
    times = bootstrap._draws(tuple(range(8))).astype(int)
    assert units == 8
    assert (times.sum(axis=1) == 8).all()
    for number in (0, 17, 999):
        rows = np.repeat(np.arange(len(of_city)), times[number][of_city])
        scores = np.array([matthews_corrcoef(photos.labels[rows], one[rows]) for one in said])
        drawn, middle = scores[bootstrap.seed_draws[number]].mean(), scores.mean()
        assert draws[number] == pytest.approx(middle + np.sqrt(3 / 2) * (drawn - middle))


def test_a_mean_is_over_seeds_and_photos_and_varies_with_the_places_that_are_drawn():
    _, of_city = photos_in()
    bootstrap, rows = Bootstrap(of_city, seeds=3), of_city != 7
    values = np.stack([of_city + seed for seed in range(3)])
    found = bootstrap.mean(values, rows)
    assert found.value == pytest.approx(values[:, rows].mean())
    assert found.low < found.value < found.high
    same = bootstrap.mean(np.full(values.shape, 5), rows)
    assert (same.value, same.low, same.high) == pytest.approx((5, 5, 5))


def test_the_tail_is_that_of_students_t_and_for_many_units_the_normal_one():
    assert expanded_tail(100_000) == pytest.approx(0.025, abs=1e-5)
    assert expanded_tail(10) < 0.01  # t 2.262, times sqrt(10 / 9)
    assert expanded_tail(4) < expanded_tail(10)


def test_intervals_of_a_difference_hold_it_about_as_often_as_they_say():
    """Two arms that are equally good in the long run, in ten places that suit one or the other."""
    held, labels = 0, np.tile([0, 1], 300)
    places = np.repeat(np.arange(10), 60)
    for study in range(150):
        rng = np.random.default_rng(study)
        arms = []
        for _ in range(2):
            right = (0.8 + rng.uniform(-0.1, 0.1, 10))[places] + rng.normal(0, 0.03, (3, 1))  # places, and seeds
            said = np.where(rng.random((3, 600)) < right, labels, 1 - labels)
            outcomes = np.stack([confusion_counts(labels, one, 0.5) for one in said])
            arms.append(ArmAnswers(ARMS[0], outcomes, 0, 0, (), np.empty(0), 0, 0))
        found = Bootstrap(places, seeds=3, seed=study).compare(*arms).difference
        held += found.low <= 0 <= found.high
    assert 0.90 <= held / 150 <= 0.995


def test_arms_are_compared_on_the_photos_that_both_were_tested_on():
    photos, of_city = photos_in()
    half = np.arange(len(of_city)) % 4 < 2
    ours, theirs = arm_answers(photos.labels, 1.0, tested=half), arm_answers(photos.labels, np.where(half, 1.0, 0.0))
    for one, other in ((ours, theirs), (theirs, ours)):
        compared = Bootstrap(of_city, seeds=3).compare(one, other)
        assert (compared.ours, compared.theirs, compared.difference.value) == (1.0, 1.0, 0.0)


def test_places_are_drawn_unless_they_are_too_few():
    photos, of_city = photos_in()
    everything = np.ones(len(of_city), dtype=bool)
    assert bootstrap_units(of_city, photos.groups, everything)[1] == "places"
    assert bootstrap_units(of_city, photos.groups, of_city < 4)[1] == "groups of near-duplicates"


def test_the_worst_place_is_the_one_with_the_lowest_mcc():
    photos, of_city = photos_in(per_city=40)
    arm = arm_answers(photos.labels, np.where(of_city == 5, 0.4, 0.95))
    block, mcc = worst_place(arm, of_city)
    said = arm.outcomes[..., [1, 3]].sum(axis=-1)
    here = of_city == 5
    assert block == 5
    assert mcc == pytest.approx(np.mean([matthews_corrcoef(photos.labels[here], one[here]) for one in said]))


# Claims


@pytest.mark.parametrize(
    ("low", "high", "bound", "expected"),
    [
        (0.01, 0.2, 0.0, "supported"), (-0.2, -0.01, 0.0, "refuted"), (-0.1, 0.1, 0.0, "undecided"),
        (0.01, 0.06, 0.07, "refuted"), (0.01, 0.08, 0.07, "undecided"), (0.08, 0.1, 0.07, "supported"),
        (-0.005, 0.01, -0.01, "supported"),
    ],
)  # fmt: skip
def test_a_verdict_needs_the_whole_interval(low, high, bound, expected):
    assert verdict(low, high, bound) == expected


def test_claims_are_judged_by_their_arms_and_say_their_numbers():
    photos, of_city = photos_in(per_city=200)
    answers = {
        COMPLETE: arm_answers(photos.labels, 0.95),
        "mean_pool": arm_answers(photos.labels, 0.7, "mean_pool"),
        "uniform": arm_answers(photos.labels, 0.95, "uniform"),
    }
    findings = {found.claim.text: found for found in judge(answers, Bootstrap(of_city, seeds=3), "about it")}
    pool = findings["The complete model beats mean pooling with an MLP"]
    assert pool.verdict == "supported"
    assert pool.row.met
    assert pool.row.ratio == pytest.approx(pool.row.ours / pool.row.theirs)
    assert pool.row.interval[0] > 1
    assert "points of MCC (+" in pool.row.note
    assert "about it" in pool.row.note
    assert findings["GPS-weighted sampling gains seven points or more"].verdict == "refuted"
    assert findings["GPS-weighted sampling is better than uniform sampling"].verdict == "undecided"
    assert findings["The complete model has an MCC above 0.94"].row.goal == "> 94"
    assert len(findings) == 4


def test_every_claim_is_about_arms_that_there_are():
    names = {arm.name for arm in ARMS}
    assert {name for claim in CLAIMS for name in (claim.ours, claim.theirs) if name} <= names


def test_steps_to_a_loss_are_interpolated_and_beyond_the_end_if_it_is_never_reached():
    curve = np.array([[10, 0.5], [20, 0.3], [30, 0.2]])
    assert steps_to(curve, 0.4) == pytest.approx(15)
    assert steps_to(curve, 0.2) == pytest.approx(30)
    assert steps_to(curve, 0.6) == 10
    assert steps_to(curve, 0.1) == 40


@pytest.mark.parametrize(("last", "found"), [(0.1, "supported"), (0.35, "undecided")])
def test_an_optimizer_that_once_does_not_get_there_is_not_supported(last, found):
    photos, _ = photos_in()
    slow = [[10, 0.8], [20, 0.5], [30, 0.4], [40, 0.3]]
    fast = [[10, 0.3], [20, 0.2], [30, 0.2], [40, 0.2]]
    ours = replace(arm_answers(photos.labels, 0.9, "sophia_g"), curves=np.array([fast, fast, fast[:1] + fast[1:]]))
    ours.curves[2, :, 1] = np.maximum(ours.curves[2, :, 1], last)
    adamw = replace(arm_answers(photos.labels, 0.9), curves=np.array([slow, slow, slow]))
    finding = judge_steps(ours, adamw)
    assert finding.verdict == found
    assert "1 of 3 trainings did not get there" in finding.numbers or found == "supported"
