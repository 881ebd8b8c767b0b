"""The report's drawings, each as an inline SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.evaluation.metrics import DEFAULT_THRESHOLD, reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROADWORK, NONE, INK, GRID = "#d9560b", "#3b6ea5", "#333a45", "#e3e6ea"
HEAT, HEAT_OPACITY = "YlOrRd", 0.8  # the latter where a place is certain
SIZE = (4.6, 3.1)  # inches; the page scales drawings to its width
MOST_POINTS = 300  # longer curves are averaged down to this: more points do not show, and make the page heavy
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#9aa3ae",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}


def loss_curve(steps: Sequence[float], losses: Sequence[float]) -> str:
    """Training loss over the optimizer steps."""

    def draw(axes: Axes) -> None:
        axes.plot(*thin(steps, losses), color=INK, linewidth=1.4)
        axes.set(title="Training loss", xlabel="step")
        axes.locator_params(axis="x", integer=True)

    return svg(draw, "training loss")


def validation_curve(steps: Sequence[int], scores: Sequence[float], losses: Sequence[float]) -> str:
    """Validation MCC over the optimizer steps; the weights with the lowest validation loss, which stay, are marked."""

    def draw(axes: Axes) -> None:
        kept = int(np.argmin(losses))
        axes.plot(steps, scores, color=ROADWORK, linewidth=1.4, marker="o", markersize=3)
        axes.plot(steps[kept], scores[kept], "o", color=ROADWORK, markersize=8, markerfacecolor="white")
        axes.set(title=f"Validation MCC, {scores[kept]:.3f} at the lowest loss", xlabel="step")
        axes.locator_params(axis="x", integer=True)

    return svg(draw, "validation MCC")


def thin(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbouring points so that at most `MOST_POINTS` are left."""
    parts = np.array_split(np.arange(len(steps)), max(1, min(MOST_POINTS, len(steps))))
    average = [(np.mean(np.take(steps, part)), np.mean(np.take(values, part))) for part in parts if len(part)]
    found = np.array(average).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def reliability_diagram(labels: np.ndarray, probabilities: np.ndarray) -> str:
    """Share of roadwork over the predicted probability, in 15 bins; a disc's area shows the bin's photos."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#9aa3ae", linestyle=(0, (4, 3)), linewidth=1)
        bins = reliability(labels, probabilities)
        x, y = [b["probability"] for b in bins], [b["roadwork"] for b in bins]
        area = [12 + 400 * b["n"] / len(labels) for b in bins]
        axes.plot(x, y, color=ROADWORK, linewidth=1, alpha=0.5)
        axes.scatter(x, y, area, color=ROADWORK, alpha=0.85, linewidths=0)
        axes.set(title="Reliability", xlabel="predicted probability", ylabel="share of roadwork")
        axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))

    return svg(draw, "reliability diagram")


def score_histogram(labels: np.ndarray, probabilities: np.ndarray) -> str:
    """Histogram of the predicted probability for each class, with the cut."""

    def draw(axes: Axes) -> None:
        both = [probabilities[labels == 0], probabilities[labels == 1]]
        edges = np.linspace(0, 1, 21).tolist()
        axes.hist(both, edges, stacked=True, color=[NONE, ROADWORK], label=["none", "roadwork"])
        axes.axvline(DEFAULT_THRESHOLD, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="cut")
        axes.set(title="Scores", xlabel="predicted probability", ylabel="photos", xlim=(0, 1))
        axes.legend(loc="best", fontsize=9)

    return svg(draw, "histogram of scores")


def view_frequencies(shares: dict[str, float]) -> str:
    """How often each view was kept, in the views' own order."""

    def draw(axes: Axes) -> None:
        names = [name.replace("_", " ") for name in shares]
        bars = axes.barh(names, [100 * share for share in shares.values()], color=NONE, height=0.7)
        axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=9)
        axes.invert_yaxis()
        axes.set(title="Views kept", xlabel="% of photos", xlim=(0, 112))
        axes.grid(axis="y", visible=False)

    return svg(draw, "how often each view is kept")


def heat_map(photo: Image.Image, probabilities: np.ndarray) -> Image.Image:
    """A grey photo under yellow to red, which hide it the more, the higher the probability.

    Colour and opacity grow with the square root, so that weak evidence, all there is in a photo that was missed, shows.

    Args:
        photo: The photo.
        probabilities: Those of a grid over the whole photo, float32 [side, side].
    """
    import matplotlib

    smooth = np.asarray(Image.fromarray(probabilities).resize(photo.size, Image.Resampling.BILINEAR))
    shown = np.sqrt(smooth.clip(0, 1))
    grey = np.asarray(photo.convert("L"), dtype=np.float32)[..., None]
    colour = 255 * matplotlib.colormaps[HEAT](shown)[..., :3]
    return Image.fromarray((grey + HEAT_OPACITY * shown[..., None] * (colour - grey)).round().astype(np.uint8))


def svg(draw: Callable[[Axes], None], label: str, size: tuple[float, float] = SIZE) -> str:
    """Let `draw` fill axes, and return them as an SVG element for a page.

    Args:
        draw: Draws on the axes.
        label: The drawing's name for screen readers.
        size: Width and height in inches, in which text has its size in points.
    """
    # matplotlib takes a second to import, and only reports need it.
    import matplotlib
    from matplotlib.figure import Figure

    # The salt keeps the ids of one drawing apart from the next one's on the page, and equal between runs.
    style: Any = {**STYLE, "svg.hashsalt": label}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
