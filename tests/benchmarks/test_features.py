"""The benchmark of the feature cache, on a few photos, and the parts of its GPU set that a CPU can run."""

import pytest
import torch

from benchmarks import cached_training, features_gpu
from benchmarks.features import Plan, measure
from data_prep.scenes.backbone import scenes_tiny_config


def test_a_small_run_compares_extraction_epochs_and_room():
    rows = measure(Plan(images=12, extracted=8, rounds=2), seed=0)
    assert [row.against for row in rows] == ["a plain loop", "an epoch from the photos", "its JPEG"]
    assert all("procedural scenes 1024x768, scenes-tiny, CPU" in row.what for row in rows)
    assert all(0 < row.interval[0] <= row.ratio <= row.interval[1] for row in rows)
    assert rows[1].goal == "<= 0.333333"
    tokens, classes = 12 * (2 + 2 * 16) * 96 * 2, 64 * 64 * 2
    assert 0 < (rows[2].ours - tokens) / classes < 3  # of six, those in a photo's mask


def test_trainings_from_the_cache_and_from_the_photos_are_paired_by_seed(tmp_path, monkeypatch):
    asked = []

    def train(run, place, cache, seed):
        asked.append((cache, seed))
        scores = {"mcc_null_metadata": 0.5, "ci95": {"mcc_null_metadata": (0.4, 0.6)}, "n": 7}
        return {"wall_s": (1 + seed) * (1.0 if cache else 4.0), "val": scores}

    monkeypatch.setattr(cached_training, "train", train)
    row = cached_training.trained(tmp_path, images=12, runs=2, seed=0)
    cache = str(tmp_path / "features")
    assert sorted(asked) == [("", 0), ("", 1), (cache, 0), (cache, 1)]
    assert row.interval == pytest.approx((0.25, 0.25))
    assert row.met
    assert "n 7" in row.note
    assert "0.500 (0.400 to 0.600)" in row.note


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The small backbone in the place of the large one."""
    folder = tmp_path_factory.mktemp("setting")
    return features_gpu.Setting(scenes_tiny_config(), 128, torch.device("cpu"), folder)


def test_every_attention_arm_computes_the_same():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 69, 24) for _ in range(3)]
    arms = features_gpu.kernel_arms(*inputs)
    del arms["eager, compiled"]  # it takes a minute to compile
    works = {name: work for name, work in arms.items() if features_gpu.runs(work)}
    assert {"eager", "SDPA auto", "SDPA math"} <= set(works)
    for work in works.values():
        torch.testing.assert_close(work(), works["eager"](), rtol=1e-4, atol=1e-5)


def test_passes_count_views_that_went_all_the_way(setting, monkeypatch):
    monkeypatch.setattr(setting, "views", setting.views[:24])
    extractor = setting.extractor(False, "auto")
    assert features_gpu.passes(extractor, setting, 2) > 0
    assert extractor.views == 48


def test_the_mission_is_the_full_head_trained_from_the_cache(setting):
    config = features_gpu.mission_config(setting)
    assert (config.data.features, config.model.backbone) == (str(setting.folder / "features"), setting.name)
    assert config.model.width == 512  # the head in its full size
