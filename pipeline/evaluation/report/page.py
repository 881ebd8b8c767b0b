"""Collect a run folder's results and render `report.html`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.data.index import SPLITS
from pipeline.data.photo import decode
from pipeline.evaluation.report import plots
from pipeline.evaluation.results import read_results, streetvision_results
from pipeline.files import write_text
from pipeline.names import TILE_GRID, VIEW_NAMES, Profile

if TYPE_CHECKING:
    from jinja2 import Environment

WORST = 12
THUMBNAIL_PX = 360
# Heading and key in a split's summary of each column, in the order of the page's table.
COLUMNS = (
    ("MCC", "mcc_null_metadata"),
    ("MCC with metadata", "mcc"),
    ("AUROC", "auroc"),
    ("Avg. precision", "average_precision"),
    ("Accuracy", "accuracy"),
    ("F1", "f1"),
    ("ECE", "ece"),
)

Photo = Callable[[str, int], bytes]
HeatMap = Callable[[str, int], np.ndarray | None]


def write_report(
    run: Path, profile: Profile, predictions: pd.DataFrame, photo: Photo, heat_map: HeatMap | None = None
) -> Path:
    """Render the evaluation of a run as one page that loads nothing from elsewhere.

    Args:
        run: The run folder. `metrics.jsonl`, `config.yaml` and `provenance.json` are shown where they exist.
        profile: The profile whose summary.json is shown; the page is written beside that.
        predictions: The rows of `predictions.csv`, split after split, each in the order of the shards.
        photo: Gives a photo's bytes for a split's name and a row of it.
        heat_map: Gives the evidence in that photo, see `pipeline.evaluation.inference.evidence_map`, or None.

    Returns:
        The page's path.
    """
    summary, native = read_results(run, profile), profile == "native"
    names = [str(name) for name in predictions["split"].unique() if name in summary]
    headline = "test" if "test" in names else names[-1]
    rows = predictions[predictions["split"] == headline].reset_index(drop=True)
    streetvision, environment = streetvision_results(run) if native else {}, templates()
    page = environment.get_template("report.html").render(
        run=run.resolve().name if native else f"{run.resolve().name}, {profile}",
        data=summary["evaluation"]["data"],
        headline=headline,
        scores=summary[headline],
        splits={name: summary[name] for name in names}
        | {f"{name}, streetvision": streetvision[name] for name in SPLITS if name in streetvision},
        streetvision=streetvision,
        columns=COLUMNS,
        summary=summary,
        curves=_curves(run),
        drawings=_drawings(rows),
        mistakes=worst_mistakes(rows, headline, photo, heat_map),
        grid=range(TILE_GRID),
        files={name: (run / name).read_text() for name in ("config.yaml", "provenance.json") if (run / name).exists()},
    )
    path = (run if native else run / profile) / "report.html"
    write_text(path, page)
    return path


def templates(*folders: Path) -> Environment:
    """Page templates from `folders` and from this folder, whose `style.html` gives all pages one look."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "interval": interval}
    return environment


def number(value: float | None) -> str:
    """A number with three decimals, or a dash for None."""
    return "–" if value is None else f"{value:.3f}"


def interval(bounds: list[float] | None) -> str:
    """An interval's bounds with two decimals, or an empty string for None."""
    return "" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def worst_mistakes(
    rows: pd.DataFrame, split: str, photo: Photo, heat_map: HeatMap | None = None
) -> list[dict[str, Any]]:
    """The wrong predictions farthest from their labels, worst first, with thumbnails.

    Args:
        rows: One split, whose row numbers are the index.
        split: Its name.
        photo: See `write_report`.
        heat_map: See `write_report`.
    """
    known = rows.dropna(subset=["label"])
    wrong = known[known["prediction"] != known["label"]]
    distance = (wrong["label"].astype(float) - wrong["probability_null"]).abs()
    chosen = wrong.loc[distance.sort_values(ascending=False, kind="stable").index[:WORST]]
    return [
        {
            "key": mistake["key"],
            "label": "roadwork" if mistake["label"] == 1 else "none",
            "probability": mistake["probability_null"],
            "kept": mistake["kept_views"].split(";"),
            **pictures(photo(split, row), heat_map and heat_map(split, row)),
        }
        for row, mistake in zip(chosen.index.tolist(), chosen.to_dict("records"), strict=True)
    ]


def pictures(data: bytes, heat: np.ndarray | None) -> dict[str, str | None]:
    """A photo's thumbnail as `picture`, and the same under its evidence as `evidence`; None without any."""
    small = reduced(data)
    return {"picture": data_url(small), "evidence": None if heat is None else data_url(plots.heat_map(small, heat))}


def thumbnail(data: bytes) -> str:
    """The data URL of a small JPEG of a photo."""
    return data_url(reduced(data))


def reduced(data: bytes) -> Image.Image:
    """A photo at the size of thumbnails."""
    image = Image.fromarray(decode(data))
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return image


def data_url(image: Image.Image) -> str:
    """A picture as a JPEG in a URL."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def view_shares(rows: pd.DataFrame) -> dict[str, float]:
    """The share of photos in which each view was kept; empty where the model prunes no views."""
    kept = rows["kept_views"].str.split(";").explode().value_counts() / len(rows)
    shares = {name: float(kept.get(name, 0.0)) for name in VIEW_NAMES}
    pruned = any(0 < share < 1 for share in shares.values())
    return shares if pruned else {}


def _drawings(rows: pd.DataFrame) -> list[str]:
    known = rows.dropna(subset=["label"])
    labels = known["label"].to_numpy(np.int64)
    probabilities = known["probability_null"].to_numpy(np.float64)
    shares = view_shares(rows)
    return [
        plots.reliability_diagram(labels, probabilities),
        plots.score_histogram(labels, probabilities),
        *([plots.view_frequencies(shares)] if shares else []),
    ]


def _curves(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    # A line has no loss where every step since the one before was skipped.
    train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train" and "loss" in line]
    val = [(line["step"], line["mcc"], line["loss"]) for line in lines if line["kind"] == "val"]
    drawings = []
    if train:
        drawings.append(plots.loss_curve(*zip(*train, strict=True)))
    if val:
        drawings.append(plots.validation_curve(*zip(*val, strict=True)))
    return drawings
