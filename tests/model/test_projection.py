import numpy as np
import torch

from pipeline.model.projection import InputProjection, sinusoids
from tests.model.reference import rms_norm


def test_sinusoids_are_octaves_from_half_a_period_per_unit():
    values = np.linspace(0, 1, 11)
    expected = [[wave(np.pi * 2**k * value) for wave in (np.sin, np.cos) for k in range(5)] for value in values]
    ours = sinusoids(torch.from_numpy(values)[:, None], frequencies=5)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)


def test_tokens_are_projected_normed_and_placed():
    torch.manual_seed(0)
    projection = InputProjection(dim=6, width=8).double()
    torch.nn.init.normal_(projection.norm.weight)
    cls, cells = torch.randn(2, 3, 6).double(), torch.randn(2, 3, 4, 12).double()
    boxes = torch.rand(2, 3, 5, 4).double()
    tokens = projection(cls, cells, boxes)
    assert tokens.shape == (2, 3, 5, 8)
    x0, y0, x1, y1 = boxes.unbind(-1)
    place = sinusoids(torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1))
    place = place @ projection.box.weight.T + projection.box.bias
    first = cls @ projection.cls.weight.T + projection.cls.bias
    rest = cells @ projection.cells.weight.T + projection.cells.bias
    weight = projection.norm.weight
    torch.testing.assert_close(tokens[:, :, 0], rms_norm(first, weight) + place[:, :, 0])
    torch.testing.assert_close(tokens[:, :, 1:], rms_norm(rest, weight) + place[:, :, 1:])


def test_the_same_content_in_two_places_gives_different_tokens():
    torch.manual_seed(0)
    projection = InputProjection(dim=6, width=8)
    cls, cells = torch.randn(1, 1, 6).expand(1, 2, 6), torch.randn(1, 1, 4, 12).expand(1, 2, 4, 12)
    boxes = torch.tensor([[[0.0, 0.0, 0.4, 0.4], [0.3, 0.0, 0.7, 0.4]]])
    first, second = projection(cls, cells, boxes[:, :, None])[0]
    assert (first - second).abs().amax(dim=-1).min() > 0.01
