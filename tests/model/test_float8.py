"""Linear layers in FP8 beside the same products in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.float8 import Float8Linear, to_e4m3, to_float8
from tests.small_run import make_backbone

# All magnitudes of e4m3 (arXiv 2209.05433, table 1): subnormals, then 15 exponents, the last without its largest.
MAGNITUDES = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)


def rounded(rows):
    """Rows scaled to 448, rounded to the nearest of `MAGNITUDES`, and scaled back, in float64."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / 448
    nearest = np.abs(np.abs(rows / scale)[..., None] - MAGNITUDES).argmin(axis=-1)
    return np.sign(rows) * MAGNITUDES[nearest] * scale


def noise(*shape):
    """Values of many magnitudes."""
    generator = np.random.default_rng(0)
    return generator.normal(size=shape) * 10 ** generator.uniform(-3, 1, size=shape)


def test_rows_are_rounded_to_the_nearest_value_of_fp8_on_a_scale_of_their_own():
    rows = noise(20, 64)
    rows[3] *= 1e4
    found, scale = to_e4m3(torch.from_numpy(rows).float())
    assert (found.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (20, 1))
    np.testing.assert_allclose(found.double().numpy() * scale.double().numpy(), rounded(rows), rtol=1e-6)


def test_a_row_of_zeros_stays_zero():
    found, scale = to_e4m3(torch.zeros(1, 16))
    assert not (found.float() * scale).any()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_product_of_rounded_matrices(bias):
    linear = nn.Linear(48, 32, bias=bias)
    linear.weight.data.copy_(torch.from_numpy(noise(32, 48)))
    x = noise(2 * 5, 48)
    found = Float8Linear(linear.requires_grad_(False))(torch.from_numpy(x).float().view(2, 5, 48))
    offset = linear.bias.detach().double().numpy() if bias else 0
    expected = rounded(x) @ rounded(linear.weight.detach().double().numpy()).T
    assert found.shape == (2, 5, 32)
    assert found.dtype == torch.float32
    size = np.abs(expected).max()
    np.testing.assert_allclose(found.view(10, 32).double().numpy() - offset, expected, rtol=2**-8, atol=1e-5 * size)


def test_all_products_of_the_layers_are_replaced_and_the_tokens_stay_near(tmp_path):
    backbone = FrozenBackbone(make_backbone(tmp_path))
    views = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    exact, _ = backbone(views)
    to_float8(backbone.model)
    parts = [type(part).__name__ for part in backbone.model.modules()]
    assert (parts.count("Linear"), parts.count("Float8Linear")) == (0, 6)  # q, k, v, o, up, down
    cls, _ = backbone(views)
    cosines = torch.cosine_similarity(cls, exact, dim=-1)
    assert 0.99 < cosines.min() < cosines.max() < 1


def test_widths_that_fp8_cannot_have_are_refused():
    layer = FrozenBackbone("scenes-tiny").model
    layer.model.layer[1].mlp.up_proj = nn.Linear(96, 100)
    with pytest.raises(UserError, match=r"the backbone's mlp\.up_proj is 96 x 100, and FP8 needs multiples of 16"):
        to_float8(layer)
