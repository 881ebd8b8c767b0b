"""The pictures of the documentation: `python docs/pictures.py --run runs/demo`, after `./launch.sh demo`.

They are written beside this file. `views.jpg` and `scenes.jpg` are drawn from fixed seeds, and `report.png` from the
results of a run.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image, ImageDraw, ImageFont

from data_prep.scenes import SceneConfig, render
from pipeline.data.views import CROPS, TILES, extract_views, view_boxes
from pipeline.evaluation.report import page, plots
from pipeline.names import TILE_GRID, VIEW_NAMES

DOCS = Path(__file__).parent
VIEWS_SCENE = SceneConfig(size=(2016, 1512), difficulty=0.5, seed=18)
VIEWS_INDEX = 7
VIEW_SIDE = 192  # in pixels; the picture shows the views as they are
PHOTO_WIDTH = 800
GRID_COLUMNS = 4
LABEL_PX, GAP_PX = 28, 10
# A colour for each tile, one for both crops, and one for the global view.
TILE_COLOURS = ("#ff4d4d", "#ff9d2e", "#ffe14d", "#5fd35f", "#35d0d0", "#4d9bff", "#a67bff", "#ff70c8", "#cf9a62")
CROP_COLOUR, GLOBAL_COLOUR, INK, SOFT = "#ffffff", "#30343b", "#262b33", "#626b77"
SCENES = SceneConfig(size=(1024, 768), difficulty=0.3, seed=3)
SCENES_INDICES = (2, 3, 4, 5, 6, 8, 7, 1)  # one frame of a video each
FIGURE_DPI = 130
MISTAKES = 6


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="an evaluated run; without one, report.png stays as it is")
    run = parser.parse_args().run
    views_picture().save(DOCS / "views.jpg", quality=88)
    scenes_picture().save(DOCS / "scenes.jpg", quality=85)
    if run is not None:
        report_picture(run).save(DOCS / "report.png", optimize=True)


def views_picture() -> Image.Image:
    """A procedural scene with the outlines of its views on the left, and the twelve views on the right."""
    photo = render(VIEWS_SCENE, VIEWS_INDEX).image.copy()  # the scene's own is read-only, which torch warns of
    height, width, _ = photo.shape
    views = extract_views(photo, VIEW_SIDE).permute(0, 2, 3, 1).numpy()
    rows = len(VIEW_NAMES) // GRID_COLUMNS
    step = VIEW_SIDE + GAP_PX, VIEW_SIDE + LABEL_PX + GAP_PX
    left = PHOTO_WIDTH + 2 * GAP_PX  # of the grid
    canvas = Image.new("RGB", (left + GRID_COLUMNS * step[0], rows * step[1] + GAP_PX), "white")
    draw, font, top = ImageDraw.Draw(canvas), _font(19), GAP_PX + LABEL_PX
    outlined = _outlined(photo, round(PHOTO_WIDTH * height / width), view_boxes(width, height, VIEW_SIDE).numpy())
    canvas.paste(outlined, (GAP_PX, top))
    draw.text((GAP_PX, GAP_PX), f"a procedural scene of {width}x{height} pixels", INK, font)
    notes = "colours: the nine tiles, which overlap; white: the two crops, which keep\nthe photo's proportions"
    draw.text((GAP_PX, top + outlined.height + 6), notes, SOFT, font, spacing=5)
    for number, (name, view) in enumerate(zip(VIEW_NAMES, views, strict=True)):
        x = left + number % GRID_COLUMNS * step[0]
        y = GAP_PX + number // GRID_COLUMNS * step[1]
        draw.text((x + 21, y), name, INK, font)
        draw.rectangle((x, y + 4, x + 14, y + 18), _colour(number), "#9aa3ae")
        canvas.paste(Image.fromarray(view), (x, y + LABEL_PX))
    return canvas


def _outlined(photo: np.ndarray, height: int, boxes: np.ndarray) -> Image.Image:
    """The photo, PHOTO_WIDTH wide, with the outlines of its tiles and crops; boxes [12, 4] in [0, 1]."""
    picture = Image.fromarray(photo).resize((PHOTO_WIDTH, height), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for number in (*CROPS, *TILES):
        # A few pixels inwards, by row and column, or else edges that meet would hide each other.
        inwards = 1 if number in CROPS else 5 + 3 * ((number - 1) // TILE_GRID) + 3 * ((number - 1) % TILE_GRID)
        x0, y0, x1, y1 = boxes[number] * (PHOTO_WIDTH, height, PHOTO_WIDTH, height)
        box = (x0 + inwards, y0 + inwards, x1 - inwards - 1, y1 - inwards - 1)
        draw.rectangle(box, None, _colour(number), 3 if number in CROPS else 2)
    return picture


def _colour(number: int) -> str:
    if number in TILES:
        return TILE_COLOURS[number - TILES[0]]
    return CROP_COLOUR if number in CROPS else GLOBAL_COLOUR


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def scenes_picture() -> Image.Image:
    """Eight procedural scenes."""
    canvas = Image.new("RGB", (1600, 600))
    for number, index in enumerate(SCENES_INDICES):
        scene = Image.fromarray(render(SCENES, index).image).resize((400, 300), Image.Resampling.LANCZOS)
        canvas.paste(scene, (number % 4 * 400, number // 4 * 300))
    return canvas


def report_picture(run: Path) -> Image.Image:
    """The main parts of a run's report, with the figures that the page has, drawn by the same functions."""
    summary, rows = page.read_results(run, "native"), pd.read_csv(run / "predictions.csv")
    rows = rows[rows["split"] == "test"].reset_index(drop=True)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(12, 10.4), dpi=FIGURE_DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1.9, 6.0, 2.2))
        headline, scores = top.subplots(2, 1, height_ratios=(1.15, 1))
        _headline(headline, run.resolve().name, summary)
        _scores(scores, summary)
        axes = middle.subplots(2, 3).ravel()
        for place, draw in zip(axes[:-1], _drawings(run, rows), strict=True):
            draw(place)
        _confusion(axes[-1], summary["test"]["confusion"])
        bottom.suptitle("Worst mistakes, and in blue the tiles that the model kept", fontsize=10.5, x=0.01, ha="left")
        photos = run / "scenes"
        mistakes = page.worst_mistakes(rows, "test", lambda _, row: (photos / rows["source"][row]).read_bytes())
        for place, mistake in zip(bottom.subplots(1, MISTAKES), mistakes, strict=False):
            _mistake(place, mistake)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return Image.open(stream, formats=("PNG",)).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=256)


def _drawings(run: Path, rows: pd.DataFrame) -> list[Callable[[Axes], None]]:
    """What draws the report's figures on axes, caught before it becomes an SVG."""

    def catch(draw: Callable[[Axes], None], label: str, size: Any = None) -> Callable[[Axes], None]:
        return draw

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train" and "loss" in line]
    score = [(line["step"], line["mcc"], line["loss"]) for line in lines if line["kind"] == "val"]
    labels, probabilities = rows["label"].to_numpy(np.int64), rows["probability_null"].to_numpy(np.float64)
    with mock.patch.object(plots, "svg", catch):
        drawings: list[Any] = [
            plots.loss_curve(*zip(*loss, strict=True)),
            plots.validation_curve(*zip(*score, strict=True)),
            plots.view_frequencies(page.view_shares(rows)),
            plots.reliability_diagram(labels, probabilities),
            plots.score_histogram(labels, probabilities),
        ]
    return drawings


def _headline(axes: Axes, name: str, summary: dict[str, Any]) -> None:
    test, baseline = summary["test"], summary["baseline"]
    axes.axis("off")
    axes.set(xlim=(0, 12), ylim=(0, 1))
    axes.text(0, 1, name, fontsize=16, fontweight="bold", va="top")
    axes.text(1.15, 0.97, summary["evaluation"]["data"], fontsize=10, color="#9c3b03", va="top",
              bbox={"boxstyle": "round,pad=0.3", "facecolor": "#fdeee5", "edgecolor": "none"})  # fmt: skip
    axes.text(0, 0.0, page.number(test["mcc_null_metadata"]), fontsize=34, color=plots.ROADWORK, fontweight="bold")
    axes.text(1.75, 0.32, f"MCC on {test['n']} test photos, metadata NULL", fontsize=11)
    low_high = page.interval(test["ci95"]["mcc_null_metadata"])
    axes.text(1.75, 0.02, f"95 % interval {low_high}", fontsize=10, color=SOFT)
    text = f"The baseline {baseline['head']} on the same frozen backbone and photos:\n"
    text += f"MCC {page.number(baseline['mcc'])} ({page.interval(baseline['ci95'])})"
    axes.text(6.3, 0.02, text, fontsize=10, color=SOFT, linespacing=1.6)


def _scores(axes: Axes, summary: dict[str, Any]) -> None:
    axes.axis("off")
    titles = ["Split", "Photos", *(title for title, _ in page.COLUMNS)]
    names = [name for name in ("val", "test") if name in summary]
    cells = [
        [name, str(summary[name]["n"]), *(page.number(summary[name][key]) for _, key in page.COLUMNS)] for name in names
    ]
    widths = [0.06, 0.08, 0.08, 0.17, 0.1, 0.14, 0.12, 0.1, 0.1]
    table = axes.table(cells, colLabels=titles, colWidths=widths, cellLoc="right", colLoc="right", edges="horizontal",
                       bbox=(0, 0, 1, 1))  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor(plots.GRID)
        cell.set_text_props(fontweight="bold" if row == 0 else "normal")


def _confusion(axes: Axes, counts: dict[str, int]) -> None:
    axes.grid(visible=False)
    axes.set(xlim=(0, 2), ylim=(2, 0), title=f"Confusion, {sum(counts.values())} photos")
    axes.set_xticks((0.5, 1.5), ("called none", "called roadwork"))
    axes.set_yticks((0.5, 1.5), ("none", "roadwork"), rotation=90, va="center")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for number, key in enumerate(("tn", "fp", "fn", "tp")):
        x, y = number % 2, number // 2
        colour = "#e4edf6" if x == y else "#fbe3d5"
        axes.add_patch(FancyBboxPatch((x + 0.06, y + 0.06), 0.88, 0.88, "round,pad=0,rounding_size=0.06", color=colour))
        axes.text(x + 0.5, y + 0.5, str(counts[key]), fontsize=14, ha="center", va="center")


def _mistake(axes: Axes, mistake: dict[str, Any]) -> None:
    """One thumbnail of the worst mistakes, with the tiles that the model kept in blue."""
    data = base64.b64decode(mistake["picture"].partition(",")[2])
    axes.imshow(np.asarray(Image.open(io.BytesIO(data), formats=("JPEG",))))
    axes.axis("off")
    axes.text(0, -0.05, f"{mistake['label']} at {mistake['probability']:.2f}", transform=axes.transAxes, va="top")
    tiles = axes.inset_axes((0.79, -0.24, 0.21, 0.2))
    tiles.axis("off")
    tiles.set(xlim=(0, TILE_GRID), ylim=(TILE_GRID, 0))
    for number in range(TILE_GRID**2):
        row, column = divmod(number, TILE_GRID)
        kept = f"tile_{row}_{column}" in mistake["kept"]
        tiles.add_patch(Rectangle((column + 0.08, row + 0.1), 0.84, 0.8, color=plots.NONE if kept else plots.GRID))


if __name__ == "__main__":
    main()
