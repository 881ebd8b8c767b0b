"""A small map of a set: where its photos were taken, which split they went to, and how they are weighted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.index import SPLITS
from pipeline.evaluation.report.plots import INK, STYLE
from pipeline.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by colour-blind readers too (Okabe and Ito 2008), and by their shapes.
SPLIT_COLOURS = ("#0072b2", "#009e73", "#d55e00")
SPLIT_MARKERS = ("o", "^", "s")
PAPER, HALO = "#f4f6f8", "#ffffff"
SIZE, DPI = (11.0, 5.6), 110  # inches
MOST_DOTS = 20_000  # of one split; more cover each other and take seconds to draw
MOST_ROWS = 24  # of the bars; a last row sums up the others
SMALLEST_EXTENT = 0.02  # degrees, about 2 km, so that a single place is drawn as one
MARGIN = 0.08
NARROWEST, WIDEST = 1.25, 1.6  # width to height of the map on the ground
LARGEST_DISC = 900.0  # square points
LABEL_SIZE = (0.045, 0.04)  # shares of the map's width and height
FRAME = {"left": 0.05, "right": 0.995, "top": 0.945, "bottom": 0.09, "wspace": 0.2}  # shares of the figure
LEAST_ROWS = 8  # there is room for this many bars at least, so that a few bars do not become thick


def draw_map(
    path: Path, points: np.ndarray, splits: np.ndarray, clusters: np.ndarray, weights: np.ndarray, centres: np.ndarray
) -> None:
    """Draw photos, clusters and weights as a PNG; equal arguments give equal bytes.

    Args:
        path: File to write.
        points: Latitude and longitude in degrees, [N, 2], NaN for NULL.
        splits: Each photo's split as its position in `SPLITS`, int64 [N].
        clusters: Number of each photo's cluster, int64 [N]; 0 where the GPS is NULL, from 1 in the order of `centres`.
        weights: Sampling weights, [N].
        centres: Latitude and longitude of the clusters' centres in degrees, [k, 2].
    """
    # matplotlib takes a second to import, and only this needs it.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    style: Any = {**STYLE, "font.size": 9, "axes.grid": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE)
        # Fixed places: matplotlib's own layout draws everything three times.
        place, counts, means = figure.subplots(1, 3, width_ratios=(3.2, 1.3, 0.8), gridspec_kw=FRAME)
        counts.sharey(means)
        middle = _draw_places(place, points, splits, weights)
        if len(centres):
            _draw_centres(place, clusters, centres, middle)
        _draw_clusters(counts, means, *cluster_rows(splits, clusters, weights, len(centres)))
        dots = zip(SPLITS, SPLIT_COLOURS, SPLIT_MARKERS, strict=True)
        handles = [Line2D([], [], linestyle="", color=c, marker=m, markersize=5, label=name) for name, c, m in dots]
        figure.legend(handles=handles, loc="lower left", ncols=len(SPLITS), handletextpad=0)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, stream.getvalue())


def _draw_places(axes: Axes, points: np.ndarray, splits: np.ndarray, weights: np.ndarray) -> float:
    """Photos as dots whose area grows with their weight; returns the longitude in the middle."""
    axes.set(title="Photos, and the clusters by number", facecolor=PAPER)
    known = ~np.isnan(points[:, 0])
    if not known.any():
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no photo has GPS", ha="center", va="center", transform=axes.transAxes)
        return 0.0
    middle = middle_longitude(points[known, 1])
    east = unwrap(points[:, 1], middle)
    for number, (colour, marker) in enumerate(zip(SPLIT_COLOURS, SPLIT_MARKERS, strict=True)):
        rows = np.flatnonzero(known & (splits == number))
        rows = rows[:: 1 + len(rows) // MOST_DOTS]
        area = 12 * np.sqrt(weights[rows])
        axes.scatter(east[rows], points[rows, 0], s=area, c=colour, marker=marker, alpha=0.5, linewidths=0)
    _frame(axes, east[known], points[known, 0])
    return middle


def _frame(axes: Axes, east: np.ndarray, north: np.ndarray) -> None:
    """Show all photos, as far east as north on the ground, with degrees along the edges."""
    from matplotlib.ticker import FuncFormatter

    # A degree of longitude shrinks towards the poles; in the middle of the map it is drawn true.
    shrink = max(np.cos(np.radians((north.min() + north.max()) / 2)), 0.1)
    high, wide = (max(np.ptp(values), SMALLEST_EXTENT) * (1 + 2 * MARGIN) for values in (north, east))
    high, wide = max(high, wide * shrink / WIDEST), max(wide, high * NARROWEST / shrink)
    axes.set_xlim((east.min() + east.max() - wide) / 2, (east.min() + east.max() + wide) / 2)
    axes.set_ylim((north.min() + north.max() - high) / 2, (north.min() + north.max() + high) / 2)
    axes.set_aspect(1 / shrink, anchor="N")
    for axis, names in ((axes.xaxis, "EW"), (axes.yaxis, "NS")):
        axis.set_major_formatter(FuncFormatter(lambda value, _, names=names: format_degrees(value, *names)))
        axis.set_tick_params(length=0, labelsize=8)
    axes.grid(color=HALO)
    axes.locator_params(nbins=6)


def _draw_centres(axes: Axes, clusters: np.ndarray, centres: np.ndarray, middle: float) -> None:
    """Draw a disc at each centre, as large as the cluster, and the cluster's number; close discs share a label."""
    east, north = unwrap(centres[:, 1], middle), centres[:, 0]
    photos = np.bincount(clusters, minlength=len(centres) + 1)[1:]
    axes.scatter(east, north, s=LARGEST_DISC * photos / photos.max(), c=INK, alpha=0.13, linewidths=0, zorder=1)
    on_map = axes.transAxes.inverted().transform(axes.transData.transform(np.stack([east, north], axis=1)))
    for rows in crowds(on_map):
        axes.annotate(
            enumeration(rows + 1), (east[rows[0]], north[rows[0]]), (8, 8), textcoords="offset points", fontsize=8,
            ha="left", va="center", color=INK, zorder=3,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": HALO, "edgecolor": INK, "linewidth": 0.5, "alpha": 0.9},
        )  # fmt: skip


def crowds(places: np.ndarray) -> list[np.ndarray]:
    """Rows of `places` that share a label: each place joins the first earlier one within a label's size of it.

    Args:
        places: Positions on the map, as shares of its width and height, [N, 2].
    """
    owners: list[int] = []
    owner = np.empty(len(places), dtype=np.int64)
    for row, place in enumerate(places):
        near = [o for o in owners if (np.abs(places[o] - place) < LABEL_SIZE).all()]
        owner[row] = near[0] if near else row
        owners += [] if near else [row]
    return [np.flatnonzero(owner == o) for o in owners]


def enumeration(numbers: np.ndarray) -> str:
    """Numbers of clusters for a label: `3`, `3, 7`, or `3, 7, …` where there are more."""
    first = ", ".join(map(str, numbers[:2]))
    return first if len(numbers) <= 2 else f"{first}, …"


def _draw_clusters(counts: Axes, means: Axes, names: list[str], photos: np.ndarray, weight: np.ndarray) -> None:
    """Draw a bar for each cluster: its photos by split, and the mean weight of its training photos."""
    rows = np.arange(len(names))
    left = np.zeros(len(names))
    for of_split, colour in zip(photos.T, SPLIT_COLOURS, strict=True):
        counts.barh(rows, of_split, 0.72, left, color=colour)
        left += of_split
    bottom = max(len(names), LEAST_ROWS) - 0.4
    counts.set(title="Photos by cluster", yticks=rows, yticklabels=names, ylim=(bottom, -0.6))
    counts.set_xlim(0, 1.25 * left.max())
    for row, total in enumerate(left):
        counts.annotate(f"{total:.0f}", (total, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
    counts.tick_params(axis="y", length=0)
    counts.locator_params(axis="x", nbins=3)

    trained = np.flatnonzero(~np.isnan(weight))
    means.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    means.hlines(trained, 1, weight[trained], color=SPLIT_COLOURS[0], linewidth=2)
    means.plot(weight[trained], trained, "o", color=SPLIT_COLOURS[0], markersize=4.5)
    widest = max(abs(weight[trained] - 1).max(initial=0), 0.1)
    means.set(title="Mean weight", xlim=(max(0, 1 - 1.2 * widest), 1 + 2.6 * widest))
    for row in trained.tolist():
        end = max(weight[row], 1)
        means.annotate(f"{weight[row]:.2f}", (end, row), (5, 0), textcoords="offset points", va="center", fontsize=8)
    means.tick_params(axis="y", length=0, labelleft=False)
    means.locator_params(axis="x", nbins=3)


def cluster_rows(
    splits: np.ndarray, clusters: np.ndarray, weights: np.ndarray, number: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The rows of bars: clusters by number, all clusters beyond the 24th together, and last the photos without GPS.

    Args:
        splits, clusters, weights: See `draw_map`.
        number: Number of clusters.

    Returns:
        Names of the rows; photos, int64 [rows, splits]; mean weight of the training photos [rows], NaN without any.
    """
    train = splits == SPLITS.index("train")
    shown = number if number <= MOST_ROWS else MOST_ROWS - 1
    row = np.where(clusters == 0, shown + 1, np.minimum(clusters - 1, shown))
    photos = np.zeros((shown + 2, len(SPLITS)), dtype=np.int64)
    np.add.at(photos, (row, splits), 1)
    weight = np.bincount(row[train], weights[train], minlength=shown + 2)
    names = [*(str(n) for n in range(1, shown + 1)), f"{shown + 1} to {number}", "no GPS"]
    filled = np.flatnonzero(photos.any(axis=1))
    trained = photos[filled, SPLITS.index("train")]
    mean = np.full(len(filled), np.nan)
    np.divide(weight[filled], trained, out=mean, where=trained > 0)
    return [names[n] for n in filled], photos[filled], mean


def middle_longitude(longitudes: np.ndarray) -> float:
    """The longitude opposite the widest gap: seen from there, a set across the date line is in one piece."""
    ordered = np.unique(longitudes)
    gaps = np.diff(ordered, append=ordered[0] + 360)
    widest = int(np.argmax(gaps))
    return float(unwrap(ordered[widest] + gaps[widest] / 2 + 180, 0))


def unwrap(longitudes: Any, middle: float) -> Any:
    """The same longitudes, counted so that all lie within 180 degrees of `middle`."""
    return middle + (longitudes - middle + 180) % 360 - 180


def format_degrees(value: float, positive: str, negative: str) -> str:
    """Degrees for a reader: -71.25 becomes 71.25°W, and 190 east of Greenwich 170°W."""
    value = round(unwrap(value, 0), 4)
    return f"{abs(value):g}°{(positive if value > 0 else negative) if value else ''}"
