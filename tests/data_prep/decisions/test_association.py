"""Association with the label: the numbers are the textbook's, and fields that tell the label are named."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats.contingency import association

from data_prep.decisions.association import LEAKING_MCC, LEAKING_V, associate, contingency_table, cramers_v
from data_prep.scenes.metadata import raw_metadata
from data_prep.scenes.plan import SceneConfig, plan_scene
from data_prep.sources.metadata import parse, select_fields
from pipeline.data.index import Field
from pipeline.data.record import Metadata

WORDS = np.array(["sunny", "cloudy", "rainy", "snowy"])


def bergsma(table: np.ndarray) -> float:
    """Bergsma 2013, section 4, cell by cell."""
    r, c, n = len(table), len(table[0]), int(table.sum())
    chi2 = 0.0
    for i in range(r):
        for j in range(c):
            expected = table[i].sum() * table[:, j].sum() / n
            chi2 += (table[i, j] - expected) ** 2 / expected
    phi2 = max(0.0, chi2 / n - (r - 1) * (c - 1) / (n - 1))
    r_tilde, c_tilde = r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)
    return math.sqrt(phi2 / min(r_tilde - 1, c_tilde - 1))


def of_one(values, labels) -> Field:
    return associate({"daytime": values}, np.asarray(labels))["daytime"]


def test_cramers_v_is_bergsmas():
    rng = np.random.default_rng(0)
    for rows in (2, 3, 7):
        table = rng.integers(5, 60, (rows, 2))
        assert cramers_v(table) == pytest.approx(bergsma(table), abs=1e-12)


def test_cramers_v_is_one_where_the_value_is_the_label():
    assert cramers_v(np.array([[40, 0], [0, 20]])) == pytest.approx(1)
    assert cramers_v(np.array([[40, 0], [0, 20], [0, 9]])) == pytest.approx(1, abs=0.01)


def test_many_values_do_not_look_associated_by_chance():
    rng = np.random.default_rng(0)
    plain, corrected = [], []
    for _ in range(50):
        table = np.zeros((40, 2), dtype=np.int64)
        np.add.at(table, (rng.integers(40, size=200), rng.integers(2, size=200)), 1)
        table = table[table.any(axis=1)]
        plain.append(association(table, method="cramer"))
        corrected.append(cramers_v(table))
    assert np.mean(plain) > 0.4
    assert np.mean(corrected) < 0.1


@pytest.mark.parametrize("table", [[[7, 9]], [[7, 0], [5, 0]], np.empty((0, 2), dtype=int)])
def test_cramers_v_means_nothing_where_values_or_labels_never_vary(table):
    assert cramers_v(np.array(table)) is None


def test_rare_values_count_as_one():
    values = ["a"] * 6 + ["b"] * 4 + ["c"] * 3
    labels = np.array([0, 0, 1, 1, 1, 1, *[0] * 4, *[1] * 3])
    assert contingency_table(values, labels).tolist() == [[2, 4], [4, 3]]


def test_null_mcc_is_the_formulas_and_counts_labelled_photos_only():
    tp, fp, fn, tn = 30, 10, 15, 45
    values = ["x"] * (tp + fp) + [None] * (fn + tn) + ["x"] * 100
    labels = [1] * tp + [0] * fp + [1] * fn + [0] * tn + [-1] * 100
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    field = of_one(values, labels)
    assert field.null_mcc == pytest.approx(expected, abs=1e-4)
    assert field.null_rate == pytest.approx(60 / 200)


def test_a_field_that_is_known_where_the_label_is_roadwork_leaks():
    labels = np.arange(60) % 2
    field = associate({"description": [f"text {i}" if label else None for i, label in enumerate(labels)]}, labels)
    assert field["description"] == Field(0.5, 1.0, None, "known exactly where the label is roadwork (MCC 1.00)")


def test_a_field_that_is_known_where_the_label_is_none_leaks_just_as_much():
    labels = np.arange(60) % 2
    values = [None if label else "all clear" for label in labels]
    values[1] = "a cone"
    field = associate({"description": values}, labels)["description"]
    assert field.null_mcc < -0.9
    assert field.leaks.startswith("known mostly where the label is none (MCC -0.9")


def test_a_field_whose_word_says_it_leaks_without_a_single_null():
    labels = np.random.default_rng(0).integers(2, size=200)
    field = of_one([("lane shift",) if label else ("open",) for label in labels], labels)
    assert (field.null_rate, field.null_mcc, field.cramers_v) == (0, None, 1)
    assert field.leaks == "its values tell the label (Cramer's V 1.00)"


def test_both_reasons_are_given():
    labels = np.random.default_rng(0).integers(2, size=300)
    values = [None if label == 0 and i % 3 else ("shift" if label else "open") for i, label in enumerate(labels)]
    assert of_one(values, labels).leaks.count(";") == 1


def test_fields_that_know_nothing_of_the_label_do_not_leak():
    rng = np.random.default_rng(0)
    for photos in (20, 200, 2000):
        for _ in range(20):
            words = [None if rng.random() < 0.1 else WORDS[rng.integers(4)] for _ in range(photos)]
            assert of_one(words, rng.integers(2, size=photos)).leaks == ""


def test_a_strong_but_insignificant_association_of_a_few_photos_is_no_leak():
    labels = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    field = of_one(["x", "x", "x", "x", None, None, None, None, "x", None], labels)
    assert field.null_mcc == pytest.approx(0.6)
    assert field.null_mcc > LEAKING_MCC
    assert field.leaks == ""


def test_values_that_go_with_the_label_only_a_little_may_be_used():
    labels = np.random.default_rng(0).integers(2, size=1000)
    strong, weak = ([WORDS[(label + (i % every == 0)) % 2] for i, label in enumerate(labels)] for every in (6, 3))
    assert of_one(strong, labels).cramers_v > LEAKING_V
    assert "Cramer" in of_one(strong, labels).leaks
    assert 0.2 < of_one(weak, labels).cramers_v < LEAKING_V
    assert of_one(weak, labels).leaks == ""


def test_coordinates_and_sentences_are_judged_by_null_alone():
    labels = np.arange(100) % 2
    fields = associate(
        {"gps": [(float(label), 5.0) for label in labels], "description": [f"label {label}" for label in labels]},
        labels,
    )
    assert all(field == Field(0.0, None, None, "") for field in fields.values())


def test_a_set_without_labels_has_null_rates_only():
    assert of_one(["x", None, "x", "x"], [-1] * 4) == Field(0.25, None, None, "")


@pytest.mark.parametrize("photos", [100, 1500])
def test_scenes_leak_by_description_and_travel_alteration_and_by_nothing_else(photos):
    config = SceneConfig(seed=3)
    plans = [plan_scene(config, index) for index in range(photos)]
    parsed = [parse(select_fields(raw_metadata(plan, index))) for index, plan in enumerate(plans)]
    values = {name: [getattr(row.metadata, name) for row in parsed] for name in Metadata.__dataclass_fields__}
    values["travel_alteration"] = [row.travel_alteration for row in parsed]
    fields = associate(values, np.array([plan.label for plan in plans]))
    assert {name for name, field in fields.items() if field.leaks} == {"description", "travel_alteration"}
    assert fields["description"].null_mcc == 1
