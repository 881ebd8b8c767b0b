"""The benchmark of views, on a few small photos: every arm does the work that its row claims."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import view_peers as peers
from benchmarks import views as benchmark
from benchmarks.views import PhotoSet, Plan, decode_and_resize, draw, halved, measure, read
from pipeline.data.dataset import prepare
from pipeline.data.photo import decode
from pipeline.data.views import view_boxes
from pipeline.errors import UserError
from pipeline.model.config import InputSpec


@pytest.fixture(scope="module")
def photos() -> PhotoSet:
    return draw(Plan("800x600", photos=2, rounds=2), seed=1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


def test_a_small_run_compares_all_arms(photos, monkeypatch):
    monkeypatch.setattr(benchmark, "SIDE", 128)
    rows = measure(photos, rounds=2, seed=0)
    assert [row.goal for row in rows] == [">= 8", "<= 1.05", ">= 1", ">= 10", ">= 1"]
    assert all(0 < row.interval[0] <= row.ratio <= row.interval[1] for row in rows)
    assert rows[2].met
    assert rows[2].ours > 50
    assert "half scale, 112 px" in rows[3].what  # 2.5 * 112 = 280 <= 300 < 2.5 * 128


def test_pillow_cuts_each_view_from_the_photo_at_its_box(photos):
    data = photos.files[0]
    views = peers.decode_once(data, 64)
    image, boxes = Image.open(io.BytesIO(data)), view_boxes(800, 600, 64)
    for view in (0, 5, 11):
        x0, y0, x1, y1 = (boxes[view].double() * torch.tensor([800, 600, 800, 600])).tolist()
        expected = image.resize((64, 64), Image.Resampling.LANCZOS, box=(x0, y0, x1, y1))
        np.testing.assert_array_equal(views[view].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_half_scale_is_measured_on_photos_that_are_halved(photos):
    data, side = photos.files[0], photos.half_side
    views = prepare(data, halved(side))["views"]
    assert not torch.equal(views, prepare(data, InputSpec(side))["views"])
    assert side % 16 == 0


def test_the_least_work_decodes_every_pixel_and_ends_in_the_canvas(photos):
    canvas = decode_and_resize(photos.files[0], 64)
    expected = Image.fromarray(decode(photos.files[0])).resize((160, 160), Image.Resampling.LANCZOS)
    assert psnr(canvas.permute(1, 2, 0), torch.from_numpy(np.array(expected))) > 50


def test_real_photos_must_be_large(photos, tmp_path):
    (tmp_path / "small.jpg").write_bytes(photos.files[0])
    with pytest.raises(UserError, match=r"no \.jpg of 4 megapixels"):
        read(tmp_path, Plan("", photos=1, rounds=2))
    Image.new("RGB", (2400, 1800)).save(tmp_path / "large.jpg")
    found = read(tmp_path, Plan("", photos=5, rounds=2))
    assert (found.kind, len(found.files), str(found.floor_goal)) == ("2400x1800 real photos", 1, "<= 1.15")
