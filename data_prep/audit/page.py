"""The audit as one page of HTML that loads nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.audit.checks import Distances, Finding, Section
from data_prep.audit.photos import Photos
from data_prep.work.workplace import MAP_NAME
from pipeline.data.index import SPLITS
from pipeline.evaluation.report.page import templates, thumbnail
from pipeline.evaluation.report.plots import INK, svg
from pipeline.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURED = 8  # findings of each kind that are shown with their photos; each photo is some 15 kB of the page
PAIR_COLOURS = ("#333a45", "#8e5bb5", "#c08a00")  # not those of the splits on the map
CLOSEST_M = 1.0  # the left end of the distances' logarithmic axis


def write_page(
    out: Path, name: str, summary: dict[str, Any], sections: Sequence[Section], photos: Photos,
    distances: Sequence[Distances],
) -> None:  # fmt: skip
    """Render `out/audit.html`.

    Args:
        out: Folder that has map.png already.
        name: Name of the data set.
        summary: Content of summary.json.
        sections: What the checks found.
        photos: All photos.
        distances: Distances between the splits.
    """
    environment = templates(Path(__file__).parent)
    environment.filters |= {"metres": metres, "percent": percent}
    map_png = base64.b64encode((out / MAP_NAME).read_bytes()).decode()
    page = environment.get_template("audit.html").render(
        name=name,
        summary=summary,
        sections=sections,
        split_names=SPLITS,
        pictures={s.name: [_picture(finding, photos) for finding in s.findings[:PICTURED]] for s in sections},
        map=f"data:image/png;base64,{map_png}",
        drawing=distance_curves(distances, summary["distance_m"]) if distances else "",
    )
    # A file's name may not be valid UTF-8: invalid bytes are shown by their numbers.
    write_bytes(out / "audit.html", page.encode(errors="backslashreplace"))


def metres(value: float) -> str:
    """A distance for a reader, such as `31.2 m`, `640 m`, `12.5 km`, `1,340 km`."""
    if value < 1000:
        return f"{value:.1f} m" if value < 100 else f"{value:.0f} m"
    return f"{value / 1000:.1f} km" if value < 100_000 else f"{value / 1000:,.0f} km"


def percent(share: float | None) -> str:
    """A share in per cent with one decimal, or a dash where there is none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def distance_curves(distances: Sequence[Distances], distance_m: float) -> str:
    """For each pair of splits, the share of photos whose nearest neighbour is at most so far away."""

    def draw(axes: Axes) -> None:
        for pair, colour in zip(distances, PAIR_COLOURS, strict=False):
            ordered = np.maximum(np.sort(pair.metres), CLOSEST_M)
            shares = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
            axes.step(ordered, shares, where="post", color=colour, label=f"{pair.later} to {pair.earlier}")
        axes.axvline(max(distance_m, CLOSEST_M), color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(title="Distance to the nearest photo", xlabel="metres", ylabel="% of photos", xscale="log")
        axes.set(ylim=(0, 102), xlim=(CLOSEST_M, None))
        axes.legend(loc="upper left", fontsize=9)

    return svg(draw, "distance to the nearest photo of another split")


def _picture(finding: Finding, photos: Photos) -> dict[str, Any]:
    shown = [
        {
            "split": photos.entries[row].split,
            "source": photos.records[row].source,
            "key": photos.records[row].key,
            "label": {1: "roadwork", 0: "none", None: "no label"}[photos.records[row].label],
            "picture": thumbnail(photos.entries[row].read_photo()),
        }
        for row in finding.rows
    ]
    return {"note": finding.note, "photos": shown}
