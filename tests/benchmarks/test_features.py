"""The benchmark of the feature cache, on a few photos."""

from benchmarks.features import Plan, measure


def test_a_small_run_compares_extraction_reading_epochs_and_room():
    rows = measure(Plan(images=12, extracted=8, rounds=2), seed=0)
    assert [row.against for row in rows] == [
        "a plain loop",
        "roadwork features 2",
        "an epoch from the photos",
        "its JPEG",
    ]
    assert all("procedural scenes 1024x768, scenes-tiny, CPU" in row.what for row in rows)
    assert all(0 < row.interval[0] <= row.ratio <= row.interval[1] for row in rows)
    assert [row.goal for row in rows] == [">= 0.95", ">= 1", "<= 0.333333", None]
    tokens, classes = 12 * (2 + 2 * 16) * 96 * 2, 64 * 64 * 2
    assert 0 < (rows[3].ours - tokens) / classes < 3  # of six, those in a photo's mask
