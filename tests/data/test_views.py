import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data_prep.scenes import SceneConfig, render
from pipeline.data import photo, views
from pipeline.data.batch import collate
from pipeline.data.dataset import decode_scaled, prepare
from pipeline.data.photo import decode
from pipeline.data.views import extract_views, resize, useful_views, view_boxes
from pipeline.model.config import InputSpec
from pipeline.names import NUM_VIEWS, VIEW_NAMES

SPEC, HALF = InputSpec(64), InputSpec(64, decode_scale="half")


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


@pytest.mark.parametrize("turned", [False, True])
def test_pillow_resizes_where_torch_cannot(scene, turned, monkeypatch):
    image = np.ascontiguousarray(scene.transpose(1, 0, 2)) if turned else scene
    expected = extract_views(image, 128)
    monkeypatch.setattr(views, "TORCH_LANCZOS", False)
    fallback = extract_views(image, 128)
    assert (fallback.shape, fallback.stride()) == (expected.shape, expected.stride())
    for got, wanted in zip(fallback.numpy(), expected.numpy(), strict=True):
        assert psnr(got, wanted) >= 50


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


@pytest.mark.parametrize(("width", "height"), [(32, 32), (32, 900), (5000, 40), (224, 224), (70, 60)])
def test_any_size_gives_the_views_that_are_useful_and_zeros(width, height):
    image = np.full((height, width, 3), 120, dtype=np.uint8)
    got, useful = extract_views(image, 64), useful_views(width, height, 64)
    assert got.shape == (NUM_VIEWS, 3, 64, 64)
    assert (got[useful] == 120).all()
    assert (got[~useful] == 0).all()


def test_views_lie_in_memory_as_the_resize_and_the_device_want_them(scene):
    got = extract_views(scene, 64)
    assert got.is_contiguous(memory_format=torch.channels_last)
    batch = collate([{"views": got}, {"views": got}])["views"]
    assert batch.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch, torch.stack([got, got]))


GLOBAL_ALONE = [True] + [False] * 11
ALL_BUT_TILES = [True] + [False] * 9 + [True] * 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((224, 224), GLOBAL_ALONE),
        ((512, 300), GLOBAL_ALONE),
        ((513, 512), ALL_BUT_TILES),
        ((640, 480), ALL_BUT_TILES),
        ((480, 640), ALL_BUT_TILES),
        ((1024, 512), ALL_BUT_TILES),  # the crops just meet
        ((1024, 513), [True] * 12),  # every view shrinks it
        ((520, 520), [True] * 10 + [False] * 2),
        ((1200, 500), [True] + [False, True, False] * 3 + [True] * 2),  # the crops leave a gap in the middle
        ((500, 1200), [True] + [False] * 3 + [True] * 3 + [False] * 3 + [True] * 2),
        ((2000, 500), [True] * 12),
        ((1024, 768), [True] * 12),
    ],
    ids=str,
)
def test_a_view_counts_where_it_shows_pixels_that_no_coarser_one_shows_unshrunk(size, expected):
    assert useful_views(*size, 512).tolist() == expected


@pytest.mark.parametrize("size", [(224, 224), (513, 512), (640, 480), (500, 1300), (700, 700), (2000, 300)], ids=str)
def test_useful_views_are_those_that_a_search_over_pixels_finds(size):
    """From coarse to fine: is there a pixel that no coarser view shows at its own size or larger?"""
    side, (width, height) = 512, size
    boxes = view_boxes(width, height, side).double() * torch.tensor([width, height, width, height])
    shown, found = torch.zeros(height, width, dtype=torch.bool), {}
    for group in ([0], [10, 11], range(1, 10)):
        places = {}
        for view in group:
            x0, y0, x1, y1 = (round(edge) for edge in boxes[view].tolist())
            places[view] = torch.zeros_like(shown)
            places[view][y0:y1, x0:x1] = True
            is_the_global_view_again = view > 0 and places[view].all()
            found[view] = not is_the_global_view_again and bool((places[view] & ~shown).any())
        for place in places.values():
            if place.any(dim=0).sum() <= side and place.any(dim=1).sum() <= side:
                shown |= place
    assert useful_views(width, height, side).tolist() == [found[view] for view in range(12)]


@pytest.mark.parametrize(("width", "height"), [(60, 40), (90, 60), (100, 100), (200, 150)])
def test_views_that_add_nothing_are_not_even_resized(width, height, monkeypatch):
    resized = []
    monkeypatch.setattr(views, "resize", lambda *call: resized.append(call[1:]) or resize(*call))
    extract_views(np.full((height, width, 3), 120, dtype=np.uint8), 64)
    useful = useful_views(width, height, 64)
    if useful.sum() == 1:
        assert resized == [(64, 64)]
    else:  # the canvas, the strip, the global view, and both crops at once
        assert len(resized) == 3 + useful[10:].any()


def test_the_global_view_of_a_small_photo_is_resized_from_its_own_pixels(scene):
    small = np.array(Image.fromarray(scene).resize((200, 150)))
    whole = Image.fromarray(small).resize((256, 256), Image.Resampling.LANCZOS)
    assert psnr(extract_views(small, 256)[0].permute(1, 2, 0).numpy(), np.asarray(whole)) > 60


def test_fewer_views_are_the_first_ones(scene):
    torch.testing.assert_close(extract_views(scene, 64, 1), extract_views(scene, 64)[:1])


def jpeg(image: np.ndarray, orientation: int = 1, kind: str = "JPEG") -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    Image.fromarray(image).save(stream, kind, quality=95, exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("with_simplejpeg", [True, False])
def test_half_scale_decoding_changes_pixels_a_little_and_places_not_at_all(
    scene, orientation, with_simplejpeg, monkeypatch
):
    if not with_simplejpeg:
        monkeypatch.setattr(photo, "simplejpeg", None)
    soft = Image.fromarray(scene).filter(ImageFilter.GaussianBlur(3)).crop((0, 0, 401, 327))  # halves are not whole
    odd = jpeg(np.asarray(soft), orientation)
    full, half = prepare(odd, SPEC), prepare(odd, HALF)
    torch.testing.assert_close(half["boxes"], full["boxes"], rtol=0, atol=0)
    torch.testing.assert_close(half["view_mask"], full["view_mask"])
    assert not torch.equal(half["views"], full["views"])
    for got, expected in zip(half["views"].numpy(), full["views"].numpy(), strict=True):
        assert psnr(got, expected) > 34  # shifted by a pixel, most views are below 27
    image, size = decode_scaled(odd, HALF)
    assert (image.shape[1], image.shape[0]) == tuple(-(-edge // 2) for edge in size)


@pytest.mark.parametrize(("short", "expected"), [(319, 319), (320, 160), (321, 161), (700, 350)])
def test_half_scale_decoding_stops_where_the_photo_would_fall_below_the_canvas(short, expected):
    image = decode_scaled(jpeg(np.zeros((short, 800, 3), dtype=np.uint8)), HALF)[0]  # the canvas has 160 px
    assert image.shape[0] == expected


def test_half_scale_decoding_leaves_other_formats_whole(scene):
    png = jpeg(scene, kind="PNG")
    torch.testing.assert_close(prepare(png, HALF)["views"], prepare(png, SPEC)["views"])


def test_a_photo_does_not_leave_its_pixels_in_the_next_one(scene):
    """Photos are decoded into the same memory, one after the other."""
    first, second = jpeg(scene), jpeg(scene[::-1, :500])
    alone = [prepare(data, SPEC)["views"].clone() for data in (first, second)]
    together = [prepare(data, SPEC)["views"] for data in (first, second)]
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(alone[1], extract_views(decode(second), 64))
