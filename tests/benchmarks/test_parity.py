import numpy as np
import pytest

from benchmarks.parity import matrix, row
from benchmarks.parity_cells import SMALL, Cell, Curve


def test_the_matrix_has_every_combination():
    cells = list(matrix((1, 2, 4)))
    assert len(set(cells)) == len(cells) == 4 * (1 + 2 + 3) * 2
    assert {cell for cell in cells if not cell.clip} == {cell for cell in cells if cell.stage == 0 < cell.sharding - 1}


def test_products_with_the_hessian_are_compared_in_all_forms_that_they_allow():
    products, drawn = (list(matrix((1, 2, 4), optimizer)) for optimizer in ("sophia_h", "sophia_g"))
    assert {cell.stage for cell in products} == {0, 1, 2}
    assert (len(set(products)), len(set(drawn))) == (3 * 6 * 2, 4 * 6 * 2)


@pytest.mark.parametrize(
    ("matrix_change", "single_change", "met"), [(0, 0, True), (2e-5, 0, False), (0, 5e-5, True), (0, 2e-4, False)]
)
def test_a_difference_in_the_curvature_is_found_and_that_of_one_number_may_be_larger(matrix_change, single_change, met):
    losses, norms = np.full((3, 4), 2.0), np.full(3, 0.5)
    bare = Curve(losses, norms, {"a.weight": np.array([1e-6, 1e-3]), "b.bias": np.array([1e-7])})
    moved = {"a.weight": np.array([1e-6, 1e-3 * (1 + matrix_change)]), "b.bias": np.array([1e-7 * (1 + single_change)])}
    assert row(Cell(2, 2, 2, optimizer="sophia_h"), Curve(losses, norms, moved), bare).met is met


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
