"""Photos of one place: within some distance of each other on the ground, directly or through others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial import KDTree

from data_prep.decisions.gps import EARTH_RADIUS_M, unit_sphere
from data_prep.decisions.links import chain, join

LEAST_RADIUS_M = 0.001  # what is closer is the same place: rounding of coordinates moves it by a millionth of that
# Cells that are up to two apart in every direction can hold photos within the radius, which is sqrt(3) cells long.
CELLS_APART = 2
CELL_PAIRS_AT_ONCE = 256


def near_pairs(points: np.ndarray, radius_m: float) -> Iterator[np.ndarray]:
    """Link photos within a great-circle distance of each other.

    A camera that stood still has millions of pairs; few of them are looked at. Space is cut into cells whose
    diagonal is the radius: photos in one cell are near each other without a comparison, and two cells that no link
    connects yet need only one near pair between them.

    Args:
        points: Latitude and longitude in degrees, [N, 2], NaN for NULL, which is near nothing.
        radius_m: Largest distance in metres; less than a millimetre counts as a millimetre.

    Yields:
        Pairs of photos within the radius, int64 [pairs, 2], fewer than N pairs in all. Together they connect the same
        photos as a comparison of all with all would.
    """
    known = np.flatnonzero(~np.isnan(points[:, 0]))
    if not len(known):
        return
    vectors = unit_sphere(points[known])
    angle = min(max(radius_m, LEAST_RADIUS_M) / EARTH_RADIUS_M, np.pi)
    chord = 2 * np.sin(angle / 2)  # great-circle distance and straight line grow together
    cells, cell = np.unique(np.floor(vectors * (np.sqrt(3) / chord)), axis=0, return_inverse=True)
    cell = cell.ravel()
    yield known[chain(cell)]
    for links in _Cells(vectors, cells, cell, chord).links():
        yield known[links]


class _Cells:
    """Occupied cells of space, and the photos in each."""

    def __init__(self, vectors: np.ndarray, cells: np.ndarray, cell: np.ndarray, chord: float):
        """Sort photos by cell.

        Args:
            vectors: Places of the photos on the unit sphere, [N, 3].
            cells: Position of each cell in the grid, whole numbers, [M, 3].
            cell: Number of each photo's cell, int64 [N].
            chord: Largest straight distance between two photos that are near each other, in radii of the Earth.
        """
        self.cells, self.chord = cells, chord
        self.order = np.argsort(cell, kind="stable")
        self.vectors = vectors[self.order]
        self.starts = np.searchsorted(cell[self.order], np.arange(len(cells) + 1))

    def links(self) -> Iterator[np.ndarray]:
        """Yield pairs of near photos that connect cells, int64 [pairs, 2]."""
        pairs = self._neighbours()
        # The first photos of both cells will do where photos lie close to each other, or alone in their cells.
        component, links = self._join(np.arange(len(self.cells)), pairs, self.starts[pairs])
        yield links
        pairs = pairs[component[pairs[:, 0]] != component[pairs[:, 1]]]
        for start in range(0, len(pairs), CELL_PAIRS_AT_ONCE):
            some = pairs[start : start + CELL_PAIRS_AT_ONCE]
            some = some[component[some[:, 0]] != component[some[:, 1]]]
            closest = [self._closest(*pair) for pair in some.tolist()]
            component, links = self._join(component, some, np.array(closest, dtype=np.int64).reshape(-1, 2))
            yield links

    def _neighbours(self) -> np.ndarray:
        """Pairs of cells whose photos may be near each other, judged by the boxes that hold them: int64 [pairs, 2]."""
        pairs = KDTree(self.cells).query_pairs(CELLS_APART + 0.5, p=np.inf, output_type="ndarray")
        left, right = pairs.T
        lowest = np.minimum.reduceat(self.vectors, self.starts[:-1])
        highest = np.maximum.reduceat(self.vectors, self.starts[:-1])
        gap = np.maximum(lowest[left] - highest[right], lowest[right] - highest[left])
        return pairs[np.linalg.norm(np.maximum(gap, 0), axis=1) <= self.chord]

    def _closest(self, left: int, right: int) -> tuple[int, int]:
        """The closest two photos of two cells."""
        here, there = (slice(self.starts[cell], self.starts[cell + 1]) for cell in (left, right))
        distances, nearest = KDTree(self.vectors[there]).query(self.vectors[here])
        best = distances.argmin()
        return here.start + best, there.start + nearest[best]

    def _join(self, component: np.ndarray, pairs: np.ndarray, photos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Join the pairs of cells whose photos are near each other.

        Args:
            component: Number of each cell's component, int64 [M].
            pairs: Pairs of cells, int64 [pairs, 2].
            photos: One photo of each cell of a pair, as its position in `order`, int64 [pairs, 2].

        Returns:
            The new components of cells, and the pairs of photos that made them, int64 [links, 2].
        """
        near = np.linalg.norm(self.vectors[photos[:, 0]] - self.vectors[photos[:, 1]], axis=1) <= self.chord
        component, needed = join(component, pairs[near])
        return component, self.order[photos[near][needed]]
