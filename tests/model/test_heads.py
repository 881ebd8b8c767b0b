import numpy as np
import pytest
import torch

from pipeline.model.heads import BinaryHead, SegmentationHead, WeatherHead
from tests.model.reference import silu

GLOBAL = (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(("kind", "classes"), [(BinaryHead, 2), (WeatherHead, 8)])
def test_classifiers_are_two_layers_with_half_the_width_between(kind, classes):
    torch.manual_seed(0)
    head = kind(512, dropout=0.1).eval()
    first, last = (m for m in head.modules() if isinstance(m, torch.nn.Linear))
    assert [tuple(first.weight.shape), tuple(last.weight.shape)] == [(256, 512), (classes, 256)]
    x = torch.randn(2, 8, 512)
    expected = silu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(head(x), expected)


def test_dropout_acts_in_training_only():
    head, x = BinaryHead(64, dropout=0.5), torch.ones(1, 64)
    assert not torch.equal(head.train()(x), head(x))
    assert torch.equal(head.eval()(x), head(x))


def stitch_on_a_raster(logits, boxes, mask, side, pixels):
    """Logits [K, g, g, n] painted on a fine raster by their weight, then averaged over the output's cells."""
    grid, classes = logits.shape[1], logits.shape[-1]
    total, cover = np.zeros((pixels, pixels, classes)), np.zeros((pixels, pixels, 1))
    centres = (np.arange(pixels) + 0.5) / pixels
    for view, (x0, y0, x1, y1) in enumerate(boxes):
        if not mask[view]:
            continue
        columns = np.floor((centres - x0) / (x1 - x0) * grid).astype(int)
        rows = np.floor((centres - y0) / (y1 - y0) * grid).astype(int)
        for y, row in enumerate(rows):
            for x, column in enumerate(columns):
                if 0 <= row < grid and 0 <= column < grid:
                    weight = 1 / ((x1 - x0) * (y1 - y0))
                    total[y, x] += weight * logits[view, row, column]
                    cover[y, x] += weight
    scale = pixels // side
    total, cover = (a.reshape(side, scale, side, scale, -1).sum(axis=(1, 3)) for a in (total, cover))
    return (total / cover).transpose(2, 0, 1)


def test_segmentation_stitches_the_views_by_their_boxes():
    torch.manual_seed(0)
    head = SegmentationHead(width=8, side=16, grid=4).double()
    boxes = np.array([
        [GLOBAL, (0, 0, 0.4, 0.4), (0.3, 0.6, 0.7, 1), (0, 0, 0.75, 1), (0.6, 0.3, 1, 0.7)],
        [GLOBAL, (0.3, 0, 0.7, 0.4), (0, 0.25, 1, 1), (0.6, 0.6, 1, 1), (0, 0, 1, 0.75)],
    ])  # fmt: skip
    mask = np.array([[True, True, True, True, False], [True, False, True, True, True]])
    cells = torch.randn(2, 5, 16, 8).double()
    ours = head(cells, torch.from_numpy(boxes), torch.from_numpy(mask))
    assert ours.shape == (2, 6, 16, 16)
    logits = head.classify(cells).detach().numpy().reshape(2, 5, 4, 4, 6)
    for image in range(2):
        # 80 pixels hold whole cells of every view: 0.4 * 80 / 4 = 8, 0.75 * 80 / 4 = 15
        expected = stitch_on_a_raster(logits[image], boxes[image], mask[image], side=16, pixels=80)
        np.testing.assert_allclose(ours[image].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_global_view_alone_is_its_own_grid():
    torch.manual_seed(0)
    head = SegmentationHead(width=8, side=4, grid=4)
    cells = torch.randn(1, 1, 16, 8)
    stitched = head(cells, torch.tensor([[GLOBAL]]), torch.ones(1, 1, dtype=torch.bool))
    expected = head.classify(cells)[0, 0].T.reshape(6, 4, 4)
    torch.testing.assert_close(stitched[0], expected)


def test_views_that_do_not_exist_leave_no_trace():
    torch.manual_seed(0)
    head = SegmentationHead(width=8, side=8, grid=2)
    cells = torch.randn(1, 2, 4, 8)
    boxes, mask = torch.tensor([[GLOBAL, (0.0, 0.0, 0.4, 0.4)]]), torch.tensor([[True, False]])
    both = head(cells, boxes, mask)
    assert torch.equal(both, head(cells * torch.tensor([1.0, 9.0])[:, None, None], boxes, mask))
    torch.testing.assert_close(both, head(cells[:, :1], boxes[:, :1], mask[:, :1]))
