import numpy as np
import pytest

from benchmarks.parity import matrix, row
from benchmarks.parity_cells import SMALL, Cell, Curve


def test_the_matrix_has_every_combination():
    cells = list(matrix((1, 2, 4)))
    assert len(set(cells)) == len(cells) == 4 * (1 + 2 + 3) * 2
    assert {cell for cell in cells if not cell.clip} == {cell for cell in cells if cell.stage == 0 < cell.sharding - 1}


@pytest.mark.parametrize(("change", "met"), [(0.0, True), (5e-6, True), (2e-5, False)])
@pytest.mark.parametrize("place", ["loss", "term", "norm"])
def test_a_difference_anywhere_is_found(place, change, met):
    bare = Curve(np.full((3, 4), 2.0), np.full(3, 0.5))
    curve = Curve(bare.losses.copy(), bare.norms.copy())
    target = {"loss": curve.losses[2, :1], "term": curve.losses[1, 3:], "norm": curve.norms[2:]}[place]
    target *= 1 + change
    found = row(Cell(2, 2, 2), curve, bare)
    assert found.ours == pytest.approx(change, rel=1e-6, abs=1e-12)
    assert found.met is met


def test_small_terms_are_compared_as_they_are_and_norms_that_nobody_tells_are_left_out():
    bare = Curve(np.zeros((1, 1)), np.array([0.5]))
    assert Curve(np.full((1, 1), 1e-6), np.array([np.nan])).difference(bare) == pytest.approx(1e-6 / SMALL)
