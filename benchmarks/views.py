"""Speed and fidelity of `pipeline.data.dataset.prepare`, from the bytes of a JPEG to twelve views, on one core.

It is compared with Pillow, and with the least work that any way must do: decode the photo, and resize it once. The
fidelity of a photo is that of its worst view, against Pillow's Lanczos resize of the same view from the photo.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from benchmarks import view_peers as peers
from benchmarks.form import Goal, Report, Row, compare, interleave, machine, one_core, publish, timed, versions
from data_prep.scenes.data_set import KIND, scenes
from pipeline.cli import command
from pipeline.data.dataset import prepare
from pipeline.data.photo import probe
from pipeline.data.views import CANVAS_RATIO, canvas_side, resize
from pipeline.errors import UserError
from pipeline.model.config import InputSpec
from pipeline.progress import say

PACKAGES = ("torch", "pillow", "simplejpeg")
SIDE = 512
LEAST_PIXELS = 4_000_000
FIDELITY_DB, HALF_FIDELITY_DB = 50.0, 43.0
FAST_REPEATS = 4  # runs of a fast arm for one of a slow one, so that neither is measured on too little
ONCE_GOAL, HALF_GOAL = Goal(8), Goal(10)
FLOOR_GOAL, REAL_FLOOR_GOAL = Goal(1.05, at_most=True), Goal(1.15, at_most=True)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    size: str
    photos: int
    """Largest number of photos of each kind."""
    rounds: int


FULL = Plan("4032x3024", photos=6, rounds=7)
QUICK = Plan("4032x3024", photos=2, rounds=3)


@dataclass(frozen=True)
class PhotoSet:
    """JPEG files of one kind."""

    kind: str
    files: list[bytes]
    floor_goal: Goal
    """Goal for our time against decoding and one resize; real photos have fewer pixels, so the views weigh more."""

    @property
    def half_side(self) -> int:
        """The largest view side up to `SIDE` at which all photos may be decoded at half scale."""
        shortest = min(min(probe(data)) for data in self.files) // 2
        return min(SIDE, int(shortest / CANVAS_RATIO) // 16 * 16)


def views(quick: bool = False, out: Path | None = None, photos: Path | None = None, seed: int = 0) -> Path:
    """Measure how fast one core makes twelve views of a photo, and how close they are to Pillow's.

    Args:
        quick: Fewer photos and rounds, in 90 seconds on two cores.
        out: Folder for views.json; benchmarks/results if not given, or runs/benchmarks with --quick.
        photos: Folder of real JPEG photos of 4 megapixels or more to measure on, beside procedural ones.
        seed: Seed of the scenes and of the order of measuring.
    """
    plan = QUICK if quick else FULL
    sets = [draw(plan, seed)]
    if photos is None:
        say("without --photos FOLDER, procedural scenes are all that is measured")
    else:
        sets.append(read(photos, plan))
    with one_core():
        rows = [row for photo_set in sets for row in measure(photo_set, plan.rounds, seed)]
    return publish(Report("views", machine(), versions(PACKAGES), seed, tuple(rows)), out, quick)


def draw(plan: Plan, seed: int) -> PhotoSet:
    """Draw procedural scenes as JPEG files."""
    with tempfile.TemporaryDirectory(prefix="roadwork-views-") as place:
        scenes(Path(place), plan.photos, plan.size, seed=seed, workers=1)
        files = [path.read_bytes() for path in sorted((Path(place) / "images").iterdir())]
    return PhotoSet(f"{plan.size} {KIND}", files, FLOOR_GOAL)


def read(folder: Path, plan: Plan) -> PhotoSet:
    """The first large photos of a folder and its sub-folders.

    Raises:
        UserError: There are no large photos.
    """
    found = (path.read_bytes() for path in sorted(folder.rglob("*.jpg")))
    files = [data for data in found if np.prod(probe(data)) >= LEAST_PIXELS][: plan.photos]
    if not files:
        raise UserError(f"--photos {folder} has no .jpg of {LEAST_PIXELS / 1e6:.0f} megapixels or more; name another")
    sizes = sorted({"x".join(map(str, probe(data))) for data in files})
    return PhotoSet(f"{' and '.join(sizes)} real photos", files, REAL_FLOOR_GOAL)


def measure(photos: PhotoSet, rounds: int, seed: int) -> list[Row]:
    """All rows for one kind of photo."""
    half_side = photos.half_side
    arms = {
        "ours": partial(seconds, photos, partial(prepare, spec=InputSpec(SIDE)), FAST_REPEATS),
        "least": partial(seconds, photos, partial(decode_and_resize, side=SIDE), FAST_REPEATS),
        "once": partial(seconds, photos, partial(peers.decode_once, side=SIDE)),
        "half": partial(seconds, photos, partial(prepare, spec=halved(half_side)), FAST_REPEATS),
        "once for half": partial(seconds, photos, partial(peers.decode_once, side=half_side)),
    }
    for arm in arms.values():
        arm()
    taken = interleave(arms, rounds, seed)
    rates = {name: [1 / second for second in times] for name, times in taken.items()}
    ms = {name: [1e3 * second for second in times] for name, times in taken.items()}
    counted = f"{len(photos.files)} photos, {rounds} rounds"
    what, half = f"12 views of {SIDE} px, {photos.kind}", f"half scale, {half_side} px, {photos.kind}"
    unit = "photos/s per core"
    least = f"{counted}; theirs is simplejpeg, then torch's Lanczos on channels-last memory, to 1 of 12 views"
    halves = f"{counted}; the largest views up to {SIDE} px at which such photos, halved, reach the canvas"
    once, floor = "Pillow: decode once, Lanczos per view", "decoding and one resize to the canvas"
    return [
        compare(what, once, rates["ours"], rates["once"], unit, ONCE_GOAL, counted),
        compare(what, floor, ms["ours"], ms["least"], "ms per photo", photos.floor_goal, least),
        fidelity(what, photos, InputSpec(SIDE), FIDELITY_DB),
        compare(half, once, rates["half"], rates["once for half"], unit, HALF_GOAL, halves),
        fidelity(half, photos, halved(half_side), HALF_FIDELITY_DB),
    ]


def seconds(photos: PhotoSet, work: Callable[[bytes], object], repeats: int = 1) -> float:
    """Core time per photo, in seconds."""

    def run() -> None:
        for _ in range(repeats):
            for data in photos.files:
                work(data)

    return timed(run).core_s / repeats / len(photos.files)


def halved(side: int) -> InputSpec:
    """The input spec that is measured as half scale."""
    return InputSpec(side, decode_scale="half")


def decode_and_resize(data: bytes, side: int) -> torch.Tensor:
    """The least that any way to twelve views does."""
    image = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
    return resize(image, canvas_side(side), canvas_side(side))


def fidelity(what: str, photos: PhotoSet, spec: InputSpec, floor_db: float) -> Row:
    """A row of how close each photo's worst view is to Pillow's, against the goal."""
    per_view = np.array([view_psnr(data, spec) for data in photos.files])
    worst = per_view.min(axis=1)
    note = (
        f"PSNR of each photo's worst view against Pillow, worst of all {worst.min():.1f} dB; mean over global view, "
        f"tiles and crops {per_view[:, 0].mean():.1f}, {per_view[:, 1:10].mean():.1f}, {per_view[:, 10:].mean():.1f} dB"
    )
    return compare(what, f"{floor_db:g} dB", worst.tolist(), [floor_db] * len(worst), "dB", Goal(1), note)


def view_psnr(data: bytes, spec: InputSpec) -> list[float]:
    """PSNR of each view against Pillow's, in dB."""
    ours = prepare(data, spec)["views"].double()
    errors = (ours - peers.decode_once(data, spec.view_side).double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255**2 / errors)).tolist()


if __name__ == "__main__":
    raise SystemExit(command(views))
