"""What a metadata field gives away about the label: by being there at all, and by its value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from scipy.stats import chi2_contingency, fisher_exact
from sklearn.metrics import matthews_corrcoef

from pipeline.data.index import Field
from pipeline.data.record import Metadata

METADATA_FIELDS = tuple(field.name for field in fields(Metadata))
# Coordinates and sentences have as many values as photos: only whether there is one can be counted.
UNCOUNTED = frozenset({"gps", "description"})
# Whether a field was filled in says nothing about the street. A model that sees only that would score this MCC.
LEAKING_MCC = 0.3
# Values may rightly go with roadwork, of which there is less in snow and more in some places, so more is allowed;
# from 0.5 on the value explains a quarter of the label's variance.
LEAKING_V = 0.5
# Twenty photos reach either threshold by chance, and a set has several fields.
SIGNIFICANCE = 0.001
# Rarer values count as one: their cells are too small for the chi-squared distribution (Cochran 1954).
RARE = 5
DECIMALS = 4  # of the numbers in the index


def columns_of(metadata: Sequence[Metadata]) -> dict[str, list[Any]]:
    """Metadata field to its value for each photo, None for NULL."""
    return {name: [getattr(one, name) for one in metadata] for name in METADATA_FIELDS}


def count_labels(labels: np.ndarray) -> dict[str, int]:
    """How many photos are `roadwork`, `none` and `unlabelled`; labels are 1, 0 and -1."""
    return {name: int((labels == label).sum()) for name, label in (("roadwork", 1), ("none", 0), ("unlabelled", -1))}


def associate(values: Mapping[str, Sequence[Hashable | None]], labels: np.ndarray) -> dict[str, Field]:
    """Measure every field against the label and say which ones leak it.

    A field leaks where |MCC| between "is known" and roadwork is at least 0.3, or where Cramer's V between its
    known values and the label is at least 0.5, either with p < 0.001. A tuple of words is one value. Coordinates and
    descriptions are judged by NULL alone: what a sentence says about the label is not looked into.

    Args:
        values: Field to its value for each photo, None for NULL.
        labels: 0, 1 or -1 for unknown, [N]; unlabelled photos count for the share of NULL only.
    """
    return {name: _field(column, labels, counted=name not in UNCOUNTED) for name, column in values.items()}


def _field(column: Sequence[Hashable | None], labels: np.ndarray, counted: bool) -> Field:
    known = np.array([value is not None for value in column], dtype=bool)
    mcc, reasons = _null_mcc(known[labels >= 0], labels[labels >= 0])
    v = None
    if counted:
        rows = np.flatnonzero(known & (labels >= 0)).tolist()
        table = contingency_table([column[row] for row in rows], labels[rows])
        v = cramers_v(table)
        if v is not None and v >= LEAKING_V and chi2_contingency(table, correction=False).pvalue < SIGNIFICANCE:
            reasons.append(f"its values tell the label (Cramer's V {v:.2f})")
    return Field(
        null_rate=round(float(1 - known.mean()), DECIMALS),
        null_mcc=None if mcc is None else round(mcc, DECIMALS),
        cramers_v=None if v is None else round(v, DECIMALS),
        leaks="; ".join(reasons),
    )


def _null_mcc(known: np.ndarray, labels: np.ndarray) -> tuple[float | None, list[str]]:
    """MCC of "is known" with roadwork, and why that is a leak, if it is one."""
    if len(np.unique(known)) < 2 or len(np.unique(labels)) < 2:
        return None, []
    mcc = float(matthews_corrcoef(labels, known.astype(np.int64)))
    counts = np.bincount(2 * labels + known, minlength=4).reshape(2, 2)
    if abs(mcc) < LEAKING_MCC or fisher_exact(counts).pvalue >= SIGNIFICANCE:
        return mcc, []
    how = "exactly" if abs(mcc) > 1 - 1e-9 else "mostly"
    return mcc, [f"known {how} where the label is {'roadwork' if mcc > 0 else 'none'} (MCC {mcc:.2f})"]


def contingency_table(values: Sequence[Hashable], labels: np.ndarray) -> np.ndarray:
    """Photos by value and label, values below 5 photos together in the last row: int64 [values, 2].

    Args:
        values: Values of the labelled photos, without NULL.
        labels: 0 or 1, [N].
    """
    common = [value for value, count in Counter(values).items() if count >= RARE]
    row_of = {value: row for row, value in enumerate(common)}
    table = np.zeros((len(common) + 1, 2), dtype=np.int64)
    rows = np.array([row_of.get(value, len(common)) for value in values], dtype=np.int64)
    np.add.at(table, (rows, labels), 1)
    return table[table.any(axis=1)]


def cramers_v(table: np.ndarray) -> float | None:
    """Cramer's V, corrected for bias (Bergsma 2013, "A bias-correction for Cramer's V and Tschuprow's T", section 4).

    Without the correction many values look associated with any label: with 40 cities and 200 photos V is 0.44
    where there is nothing to find.

    Args:
        table: Counts, [r, c].

    Returns:
        From 0 to 1; None where values or labels never vary.
    """
    r, c = np.count_nonzero(table.any(axis=1)), np.count_nonzero(table.any(axis=0))
    if min(r, c) < 2:
        return None
    n = table.sum()
    phi2 = chi2_contingency(table, correction=False).statistic / n
    unbiased = max(0.0, phi2 - (r - 1) * (c - 1) / (n - 1))
    largest = min(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1
    return float(min(1.0, np.sqrt(unbiased / largest)))
