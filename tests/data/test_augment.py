import io
import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from data_prep.scenes import SceneConfig, render
from pipeline.data.augment import (
    LEVELS,
    Placement,
    augmented_copy,
    copy_placement,
    recoloured,
    streetvision,
    streetvision_placement,
)

WIDTH, HEIGHT = 400, 300


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return np.array(render(SceneConfig(seed=7), 3).image)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def ramps() -> np.ndarray:
    """A photo whose colours say where each pixel is, and whose blue tells it from the black outside."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return np.stack([x / WIDTH * 255, y / HEIGHT * 255, np.full_like(x, 255)], axis=-1).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def fitted(copy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The affine map from a copy's pixels to the photo's, by least squares: matrix [2, 2] and offset [2]."""
    y, x = np.mgrid[: copy.shape[0], : copy.shape[1]] + 0.5
    inside = ndimage.binary_erosion(copy[..., 2] == 255, iterations=3)
    ours = np.stack([x[inside], y[inside], np.ones(inside.sum())], axis=-1)
    theirs = copy[inside][:, :2] / 255 * [WIDTH, HEIGHT]
    solution = np.linalg.lstsq(ours, theirs, rcond=None)[0]
    return solution[:2].T, solution[2]


def chroma(image: np.ndarray) -> float:
    return float(np.abs(image - image.mean(axis=-1, keepdims=True)).mean())


@pytest.mark.parametrize("level", range(LEVELS))
@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (33, 900), (100, 100)])
def test_the_client_sends_224_pixels_whatever_the_photo(level, shape):
    image = rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    sent = streetvision(image, level, rng(1))
    assert (sent.shape, sent.dtype) == ((224, 224, 3), np.uint8)


@pytest.mark.parametrize("level", range(LEVELS))
def test_a_copy_follows_from_the_generator_alone(scene, level):
    np.testing.assert_array_equal(streetvision(scene, level, rng(5)), streetvision(scene, level, rng(5)))
    np.testing.assert_array_equal(augmented_copy(scene, rng(5)), augmented_copy(scene, rng(5)))
    assert not np.array_equal(augmented_copy(scene, rng(5)), augmented_copy(scene, rng(6)))
    if level:
        assert not np.array_equal(streetvision(scene, level, rng(5)), streetvision(scene, level, rng(6)))


def test_level_0_is_the_centre_square(scene):
    height, width = scene.shape[:2]
    left = (width - height) // 2
    expected = Image.fromarray(scene[:, left : left + height]).resize((224, 224), Image.Resampling.LANCZOS)
    assert psnr(streetvision(scene, 0, rng(0)), np.asarray(expected)) > 40


def test_level_1_turns_by_up_to_20_degrees_and_crops_a_square_inside_the_centre_square():
    image, angles, areas, flips = ramps(), [], [], []
    for seed in range(150):
        matrix, offset = fitted(streetvision(image, 1, rng(seed)))
        turn = matrix / np.sqrt(abs(np.linalg.det(matrix)))
        assert turn @ turn.T == pytest.approx(np.eye(2), abs=0.02)  # neither sheared nor stretched
        up = turn[:, 1] * np.sign(turn[1, 1])
        angles.append(math.degrees(math.atan2(up[0], up[1])))
        areas.append(abs(np.linalg.det(matrix)) * (224 / HEIGHT) ** 2)
        flips.append((turn[1, 1] < 0, np.linalg.det(turn) * turn[1, 1] < 0))
        centre = matrix @ [112, 112] + offset
        assert math.dist(centre, (WIDTH / 2, HEIGHT / 2)) <= (1 - math.sqrt(areas[-1])) * HEIGHT / math.sqrt(2) + 1
    assert stats.kstest(angles, stats.uniform(-20, 40).cdf).pvalue > 0.01
    assert max(np.abs(angles)) <= 20.1
    assert stats.kstest(areas, stats.uniform(0.2, 0.8).cdf).pvalue > 0.01
    assert min(areas) > 0.195
    assert max(areas) < 1.005
    assert np.mean(flips, axis=0) == pytest.approx([0.5, 0.5], abs=0.12)


def test_level_2_takes_colour_and_contrast_away():
    image = ndimage.gaussian_filter(rng(0).normal(size=(300, 300, 3)), (3, 3, 0))
    image = (128 + 40 * image / image.std()).clip(0, 255).astype(np.uint8)
    saturations, contrasts = [], []
    for seed in range(40):
        before, after = streetvision(image, 1, rng(seed)), streetvision(image, 2, rng(seed))
        contrasts.append(after.mean(axis=-1).std() / before.mean(axis=-1).std())
        saturations.append(chroma(after) / chroma(before) / contrasts[-1])
    assert (min(saturations), max(saturations)) == pytest.approx((0.3, 1.0), abs=0.1)
    assert (min(contrasts), max(contrasts)) == pytest.approx((0.6, 1.0), abs=0.1)


def test_level_2_leaves_what_jpeg_leaves_at_some_quality_from_20_to_80():
    image = rng(0).integers(60, 200, size=(250, 250, 3), dtype=np.uint8)
    found = []
    for seed in range(8):
        sent = streetvision(image, 2, rng(seed))
        # Compression at the same quality again finds coefficients that are on its grid already.
        changes = {quality: np.abs(encoded_again(sent, quality) - sent.astype(int)).mean() for quality in range(5, 96)}
        found.append(min(changes, key=lambda quality: changes[quality]))
        assert changes[found[-1]] < 0.3 * changes[90]
    assert 20 <= min(found) < 45 < max(found) <= 80


def encoded_again(image: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream)).astype(int)


def test_level_3_adds_noise_and_blurs_it():
    grey = np.full((300, 300, 3), 128, dtype=np.uint8)
    deviations = []
    for seed in range(30):
        assert streetvision(grey, 2, rng(seed))[90:134, 90:134].std() == 0
        noise = streetvision(grey, 3, rng(seed))[90:134, 90:134, 0].astype(float)
        deviations.append(noise.std())
        if deviations[-1] > 1.5:  # below, rounding hides the blur
            assert np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1] > 0.1
    assert 0 < min(deviations) < 2 < max(deviations) < 12


@pytest.mark.parametrize("seed", range(4))
def test_a_mask_follows_the_photo(seed):
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[120:180, 150:260] = 255
    mask = (image[..., 0] > 0).astype(np.uint8) * 4
    for placement in (
        streetvision_placement(WIDTH, HEIGHT, 1, rng(seed)),
        copy_placement(WIDTH, HEIGHT, rng(seed)),
    ):
        photo, cut = placement.photo(image)[..., 0], placement.mask(mask)
        assert set(np.unique(cut)) <= {0, 4}
        assert ((photo > 127) != (cut == 4)).mean() < 0.01
    # The geometry is what the complete copy draws first.
    expected = streetvision_placement(WIDTH, HEIGHT, 1, rng(seed)).photo(image)
    np.testing.assert_array_equal(streetvision(image, 1, rng(seed)), expected)


def test_outside_of_a_turned_photo_is_black():
    frame = (0.0, 0.0, 100.0, 100.0)
    turned = Placement(frame, (100, 100), 20.0, frame).photo(np.full((100, 100, 3), 200, dtype=np.uint8))
    assert turned[0, 0].tolist() == turned[-1, -1].tolist() == [0, 0, 0]
    assert turned[50, 50].tolist() == [200, 200, 200]


def test_a_positive_angle_turns_counterclockwise(scene):
    side = min(scene.shape[:2])
    square, frame = scene[:side, :side], (0.0, 0.0, float(side), float(side))
    ours = Placement(frame, (224, 224), 15.0, frame).photo(square)
    pillow = Image.fromarray(square).rotate(15, Image.Resampling.BICUBIC).resize((224, 224), Image.Resampling.LANCZOS)
    assert psnr(ours, np.asarray(pillow)) > 30


def test_a_mild_copy_is_most_of_the_photo_in_another_light():
    image = ramps()
    mirrored = 0
    for seed in range(40):
        copy = augmented_copy(image, rng(seed))
        assert 0.69 <= copy.shape[0] * copy.shape[1] / (HEIGHT * WIDTH) <= 1
        assert copy.shape[1] / copy.shape[0] == pytest.approx(WIDTH / HEIGHT, rel=0.02)
        placement = copy_placement(WIDTH, HEIGHT, rng(seed))
        x0, y0, x1, y1 = placement.window
        expected = image[y0:y1, x0:x1]
        np.testing.assert_array_equal(placement.photo(image), expected[:, ::-1] if placement.mirrored else expected)
        mirrored += placement.mirrored
        assert 0.6 < copy.mean() / placement.photo(image).mean() < 1.5
    assert 8 < mirrored < 32


def test_colours_are_scaled_about_grey():
    image = rng(0).integers(60, 190, size=(64, 64, 3), dtype=np.uint8)
    luma = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    np.testing.assert_allclose(recoloured(image, 1, 1), image, atol=1)
    np.testing.assert_allclose(recoloured(image, 1, 0), np.repeat(luma, 3, axis=-1), atol=1)
    np.testing.assert_allclose(recoloured(image, 1, 0.5), luma + 0.5 * (image - luma), atol=1)
    np.testing.assert_allclose(recoloured(image, 1, 1, 1.2), 1.2 * image, atol=1)
    flat = recoloured(image, 0.5, 1).astype(float)
    assert flat.std() == pytest.approx(0.5 * image.std(), rel=0.02)
    assert flat.mean() == pytest.approx(image.mean(), rel=0.05)
