"""From photos to tokens: passes side by side, no copies without need, FP8, and what this machine cannot compute."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch

from data_prep.features.command import features
from data_prep.features.extraction import Extractor, Item, ViewDataset, refuse_unsupported
from data_prep.features.options import Options
from pipeline.data.dataset import ShardDataset
from pipeline.data.features import read_features
from pipeline.data.index import read_index
from pipeline.errors import UserError
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.encoder import view_tokens
from tests.feature_cache import make_cache
from tests.small_run import make_backbone, make_shards, small_config

OPTIONS = Options("cpu", 0, None, compile=False, attention="auto", shard_mb=1.0)
SPEC = small_config("backbone").input_spec("full")
PHOTOS = 9


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards of a few photos, and a backbone."""
    folder = tmp_path_factory.mktemp("world")
    make_shards(folder / "shards", {"train": [0, 1, 0] * (PHOTOS // 3)})
    make_backbone(folder / "backbone")
    return folder


@pytest.fixture
def backbone(world):
    """A new one for each test, since FP8 changes it."""
    return FrozenBackbone(str(world / "backbone"))


@pytest.fixture
def data(world):
    return {"train": ShardDataset(world / "shards", read_index(world / "shards"), "train", SPEC)}


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def items(photos=PHOTOS):
    return [Item("train", row, 1) for row in range(photos)]


def test_passes_side_by_side_give_the_rows_of_one_pass_after_another_bit_for_bit(backbone, data, four_threads):
    extractor = Extractor(backbone, 2, replace(OPTIONS, batch_views=24), 0)
    rows = list(extractor.run(data, items()))
    assert [row.photo for row in rows] == list(range(PHOTOS))
    assert extractor.views == 12 * PHOTOS
    torch.set_num_threads(1)
    for first in range(0, PHOTOS, 2):
        photos = [data["train"][row] for row in range(first, min(first + 2, PHOTOS))]
        views, boxes, mask = (
            torch.stack([photo[name] for photo in photos]) for name in ("views", "boxes", "view_mask")
        )
        expected = view_tokens(backbone, views.flatten(0, 1), boxes, mask, 2)
        for name, theirs in expected._asdict().items():
            ours = torch.stack([getattr(row.tokens, name) for row in rows[first : first + len(photos)]])
            assert torch.equal(ours, theirs.to(torch.bfloat16).view_as(ours)), name


def test_a_cpu_computes_several_passes_at_the_same_time(backbone, data, four_threads):
    # It opens when two passes wait for it; one pass after another would break it.
    barrier = threading.Barrier(2, timeout=30)
    extractor = Extractor(backbone, 2, OPTIONS, 0)
    full_pass = extractor.full_pass
    extractor.full_pass = lambda views: (barrier.wait(), full_pass(views))[1]
    assert len(list(extractor.run(data, items(8)))) == 8


def test_threads_are_as_before_when_extraction_ends_or_is_cut_off(backbone, data, four_threads):
    rows = Extractor(backbone, 2, OPTIONS, 0).run(data, items())
    next(rows)
    assert torch.get_num_threads() == 1  # four passes share four threads
    rows.close()
    assert torch.get_num_threads() == 4
    list(Extractor(backbone, 2, OPTIONS, 0).run(data, items()))
    assert torch.get_num_threads() == 4


def test_an_error_in_a_pass_reaches_the_caller(backbone, data):
    extractor = Extractor(backbone, 2, OPTIONS, 0)
    extractor.full_pass = lambda views: (_ for _ in ()).throw(ValueError("a pass failed"))
    with pytest.raises(ValueError, match="a pass failed"):
        list(extractor.run(data, items()))


def test_views_are_copied_only_where_some_add_nothing(data, monkeypatch):
    cut, made = data["train"].cut, []
    monkeypatch.setattr(data["train"], "cut", lambda *photo: made.append(cut(*photo)) or made[-1])
    (row,) = ViewDataset(data, items())[0]
    assert made[0]["view_mask"].all()
    assert row["views"].data_ptr() == made[0]["views"].data_ptr()
    made.clear()
    monkeypatch.setattr(data["train"], "cut", lambda *photo: {**cut(*photo), "view_mask": torch.arange(12) < 1})
    (row,) = ViewDataset(data, items())[0]
    assert row["views"].shape == (1, 3, 32, 32)


def test_a_cudnn_whose_attention_is_wrong_is_refused_on_a_gpu(monkeypatch):
    cudnn, gpu = replace(OPTIONS, attention="cudnn"), torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    with pytest.raises(UserError, match=r"cudnn needs cuDNN 91501 \(9\.15\.1\) or later, and torch found 91500"):
        refuse_unsupported(cudnn, gpu)
    refuse_unsupported(cudnn, torch.device("cpu"))  # there the option is left out
    refuse_unsupported(OPTIONS, gpu)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    with pytest.raises(UserError, match="found 0"):
        refuse_unsupported(cudnn, gpu)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    refuse_unsupported(cudnn, gpu)


def test_a_pass_that_does_not_fit_into_a_gpus_memory_names_the_option(world, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr("data_prep.features.extraction.view_tokens", fail)
    with pytest.raises(UserError, match=r"Tried to allocate 3\.00 GiB; choose a smaller --batch_views"):
        make_cache(tmp_path / "out", world / "shards", str(world / "backbone"))


def test_a_cache_in_fp8_says_so_and_how_far_it_is_from_the_exact_one(world, tmp_path, capsys):
    make_cache(tmp_path / "exact", world / "shards", str(world / "backbone"))
    make_cache(tmp_path / "fp8", world / "shards", str(world / "backbone"), precision="fp8")
    assert (read_features(tmp_path / "exact").precision, read_features(tmp_path / "fp8").precision) == (
        "float32",
        "float8_e4m3fn",
    )
    found = json.loads((tmp_path / "fp8" / "summary.json").read_text())["rank_zero"]
    assert 0.99 < found["cosine_of_cls"] < 1
    assert 0.99 < found["cosine_of_cells"] < 1
    assert f"{found['cosine_of_cls']:.5f} (CLS)" in capsys.readouterr().err
    assert "cosine_of_cls" not in json.loads((tmp_path / "exact" / "summary.json").read_text())["rank_zero"]


@pytest.mark.parametrize(("first", "then"), [("auto", "fp8"), ("fp8", "auto")])
def test_a_cache_in_fp8_is_not_taken_for_an_exact_one_nor_the_other_way(world, tmp_path, first, then, monkeypatch):
    place = tmp_path / "out", world / "shards", str(world / "backbone")
    make_cache(*place, precision=first)
    with pytest.raises(UserError, match=r"holds features made in float\S+, not float\S+; choose another --out"):
        make_cache(*place, precision=then)
    with monkeypatch.context() as patch:  # files of a run that was cut off are not mixed in either
        patch.setattr("data_prep.features.job.Job.finish", lambda *_: (_ for _ in ()).throw(UserError("enough")))
        with pytest.raises(UserError, match="enough"):
            make_cache(tmp_path / "other", *place[1:], precision=first)
    make_cache(tmp_path / "other", *place[1:], precision=then)
    assert read_features(tmp_path / "other").precision == {"auto": "float32", "fp8": "float8_e4m3fn"}[then]
    summary = json.loads((tmp_path / "other" / "summary.json").read_text())
    assert summary["rank_zero"]["rows"] == PHOTOS


def test_fp8_is_refused_where_torch_has_none_before_the_backbone_is_loaded(world, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", fail)
    monkeypatch.setattr("data_prep.features.job.FrozenBackbone", lambda *_: pytest.fail("nothing is to be loaded"))
    with pytest.raises(UserError, match=r"--precision fp8 needs .* \(torch\._scaled_mm is only .*leave out"):
        features(str(world / "shards"), tmp_path / "out", device="cpu", precision="fp8")
