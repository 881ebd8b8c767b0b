import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import views
from pipeline.data.photo import decode
from pipeline.data.views import NUM_VIEWS, VIEW_NAMES, extract_views, useful_views, view_boxes
from pipeline.scenes import SceneConfig, render


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return np.array(render(SceneConfig(seed=7), 3).image)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def pillow_views(image: np.ndarray, side: int) -> list[np.ndarray]:
    """Each view resized by Pillow from its own box of the photo."""
    height, width = image.shape[:2]
    scale = torch.tensor([width, height, width, height])
    boxes = (view_boxes(width, height, side).double() * scale).tolist()
    whole = Image.fromarray(image)
    return [np.asarray(whole.resize((side, side), Image.Resampling.LANCZOS, box=tuple(box))) for box in boxes]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("side", [128, 512])
def test_views_match_a_resize_from_the_photo_at_50_db(scene, side, turned):
    image = np.ascontiguousarray(scene.transpose(1, 0, 2)) if turned else scene
    ours = extract_views(image, side).permute(0, 2, 3, 1).numpy()
    for name, got, expected in zip(VIEW_NAMES, ours, pillow_views(image, side), strict=True):
        assert psnr(got, expected) >= 50, name


def test_real_photos_match_at_50_db(street_photos):
    for path in (street_photos / "berlin" / "01.jpg", street_photos / "lund" / "01.jpg"):
        image = decode(path.read_bytes())
        ours = extract_views(image, 256).permute(0, 2, 3, 1).numpy()
        assert min(map(psnr, ours, pillow_views(image, 256))) >= 50


def test_pillow_resizes_where_torch_cannot(scene, monkeypatch):
    expected = extract_views(scene, 128)
    monkeypatch.setattr(views, "TORCH_LANCZOS", False)
    fallback = extract_views(scene, 128)
    assert fallback.shape == expected.shape
    assert psnr(fallback.numpy(), expected.numpy()) >= 50


@pytest.mark.parametrize(("width", "height"), [(4032, 3024), (3024, 4032), (640, 640), (1000, 100)])
def test_tiles_cover_every_pixel_and_overlap_by_a_quarter(width, height):
    boxes = view_boxes(width, height, 128)[1:10]
    points = torch.rand(2000, 1, 2, generator=torch.Generator().manual_seed(0))
    inside = ((points >= boxes[:, :2]) & (points <= boxes[:, 2:])).all(dim=-1)
    assert inside.any(dim=1).all()
    assert (boxes[1, 0] - boxes[0, 0]).item() == pytest.approx(0.75 * (boxes[0, 2] - boxes[0, 0]).item())


@pytest.mark.parametrize(("width", "height"), [(4032, 3024), (3024, 4032), (1920, 1080)])
def test_crops_are_squares_of_the_short_side_at_both_ends(width, height):
    first, last = view_boxes(width, height, 512)[10:].double().numpy() * [width, height, width, height]
    short = min(width, height)
    step = max(width, height) / 1280  # boxes are snapped to canvas pixels
    assert (first[2] - first[0], first[3] - first[1]) == pytest.approx((short, short), abs=step)
    assert (first[0], first[1], last[2], last[3]) == pytest.approx((0, 0, width, height))


def test_a_turned_photo_has_turned_views():
    landscape, portrait = view_boxes(1600, 900, 256), view_boxes(900, 1600, 256)
    order = [0, *(1 + 3 * column + row for row in range(3) for column in range(3)), 10, 11]
    torch.testing.assert_close(landscape, portrait[order][:, [1, 0, 3, 2]])


@pytest.mark.parametrize(("width", "height"), [(32, 32), (32, 900), (5000, 40), (224, 224)])
def test_any_size_gives_twelve_views(width, height):
    image = np.full((height, width, 3), 120, dtype=np.uint8)
    got = extract_views(image, 64)
    assert got.shape == (NUM_VIEWS, 3, 64, 64)
    assert (got == 120).all()


def test_views_that_only_enlarge_are_not_useful():
    assert useful_views(224, 224, 512).tolist() == [True] + [False] * 11
    assert useful_views(1024, 768, 512).all()
    assert useful_views(800, 800, 512).tolist() == [True] * 10 + [False, False]


def test_fewer_views_are_the_first_ones(scene):
    torch.testing.assert_close(extract_views(scene, 64, 1), extract_views(scene, 64)[:1])
