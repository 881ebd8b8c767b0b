import pytest
import torch

from pipeline.model.pyramid import Pyramid
from tests.model.reference import rms_norm


def test_levels_have_the_missions_widths():
    pyramid = Pyramid(width=512, grid=4)
    linears = [m for m in pyramid.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(512, 256), (512, 128), (896, 512)]


@pytest.mark.parametrize("grid", [2, 4])
def test_cells_are_fused_with_their_quadrant_and_the_whole(grid):
    torch.manual_seed(grid)
    pyramid = Pyramid(width=8, grid=grid).double()
    torch.nn.init.normal_(pyramid.norm.weight)
    middle, coarse, fuse = (m for m in pyramid.modules() if isinstance(m, torch.nn.Linear))
    tokens = torch.randn(2, 3, 1 + grid * grid, 8).double()
    fused = pyramid(tokens)
    cells = tokens[:, :, 1:].unflatten(2, (grid, grid))
    for row in range(grid):
        for column in range(grid):
            top, left = row // 2 * 2, column // 2 * 2
            quadrant = cells[:, :, top : top + 2, left : left + 2].mean(dim=(2, 3))
            whole = cells.mean(dim=(2, 3))
            cell = cells[:, :, row, column]
            levels = [cell, quadrant @ middle.weight.T + middle.bias, whole @ coarse.weight.T + coarse.bias]
            joined = torch.cat(levels, dim=-1) @ fuse.weight.T + fuse.bias
            expected = rms_norm(joined + cell, pyramid.norm.weight)
            torch.testing.assert_close(fused[:, :, 1 + row * grid + column], expected)


def test_cls_passes_unchanged():
    tokens = torch.randn(2, 3, 17, 8)
    assert torch.equal(Pyramid(width=8, grid=4)(tokens)[:, :, 0], tokens[:, :, 0])
