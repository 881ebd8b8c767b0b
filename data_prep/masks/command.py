"""The command `masks`: segmentation targets from SAM 3 for photos without annotations.

A mask is named by its photo's hash. So one folder of masks fits every source that holds the photo, identical copies
share a mask, and a photo whose mask exists is not segmented again.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.photos.inspection import Reject, count_kinds, mask_path, read_photo, write_rejects
from data_prep.sources.content import Input, Location
from data_prep.sources.opening import open_source
from data_prep.work.parallel import Workers
from data_prep.work.workplace import REJECTS_NAME, check_apart
from pipeline.data.photo import BadPhoto, decode, decode_mask
from pipeline.data.photo_files import read_file
from pipeline.errors import UserError, require
from pipeline.files import write_bytes, write_json, write_summary
from pipeline.names import MASK_CLASSES
from pipeline.progress import say, track

SETTINGS_NAME = "masks.json"
Segment = Callable[[np.ndarray, Sequence[tuple[int, int]]], list[np.ndarray]]
"""Gives maps of classes [H, W] for squares [B, S, S, 3] and the photos' heights and widths; see `sam3.Segmenter`."""


@dataclass(frozen=True)
class Prepared:
    """A photo that has no mask yet."""

    sha256: str
    size: tuple[int, int]
    """Height and width in pixels, upright."""
    pixels: np.ndarray
    """uint8 [S, S, 3]: the whole photo, squeezed to a square."""


@dataclass(frozen=True)
class Done:
    """A photo that has a mask."""

    pixels: tuple[int, ...]
    """How many pixels each class has, in the order of MASK_CLASSES."""

    @classmethod
    def of(cls, mask: np.ndarray) -> Done:
        """Count the pixels of a mask, uint8 [H, W]."""
        counts = np.bincount(mask.ravel(), minlength=len(MASK_CLASSES) + 1)
        return cls(tuple(counts[1 : len(MASK_CLASSES) + 1].tolist()))


@dataclass
class Tally:
    """What became of the inputs so far."""

    written: int = 0
    skipped: int = 0
    rejects: list[Reject] = field(default_factory=list)
    empty: int = 0
    photos: Counter[str] = field(default_factory=Counter)
    pixels: Counter[str] = field(default_factory=Counter)

    def add(self, done: Done) -> None:
        """Count the classes of one photo's mask."""
        found = {name: count for name, count in zip(MASK_CLASSES, done.pixels, strict=True) if count}
        self.photos.update(found.keys())
        self.pixels.update(found)
        self.empty += not found

    def to_json(self) -> dict[str, Any]:
        """The counts for the summary. The counts of classes include the masks that were there already."""
        return {
            "inputs": self.written + self.skipped + len(self.rejects),
            "written": self.written,
            "skipped": self.skipped,
            "rejected": count_kinds(self.rejects),
            "classes": {name: {"photos": self.photos[name], "pixels": self.pixels[name]} for name in MASK_CLASSES},
            "empty": self.empty,
        }


def masks(
    source: str,
    out: Path,
    *,
    metadata: Path | None = None,
    revision: str | None = None,
    model: str = "facebook/sam3",
    prompts: dict[str, str] | None = None,
    score_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    batch_size: int = 4,
    device: str = "auto",
    workers: int = 0,
    max_images: int | None = None,
) -> Path:
    """Segment photos with SAM 3, one text prompt per class, for `shard --masks`. If interrupted, it resumes.

    Args:
        source: Folder of photos, with or without a metadata table, or a hub data set; as for `shard`.
        out: Folder for the masks, each named by the SHA-256 of its photo.
        metadata: Table of the source; if not given, metadata.* in it.
        revision: Branch, tag or commit of a hub data set.
        model: Hub id or folder of a SAM 3 checkpoint.
        prompts: Short noun phrases for some of the classes, as JSON: {"worker": "construction worker"}. Other classes
            have their names as prompts.
        score_threshold: An object is kept when its score is above this.
        mask_threshold: A pixel belongs to an object when its probability is above this.
        batch_size: Photos in one forward pass.
        device: cpu, cuda, cuda:1, or auto for a GPU where there is one.
        workers: Processes that read and decode photos; 0 takes every core.
        max_images: Stop after this many photos, to look at their masks before the rest. All if not given.
    """
    require(0 < score_threshold < 1, "--score_threshold", score_threshold, "above 0 and below 1")
    require(0 < mask_threshold < 1, "--mask_threshold", mask_threshold, "above 0 and below 1")
    require(batch_size >= 1, "--batch_size", batch_size, "1 or more")
    require(workers >= 0, "--workers", workers, "0 for every core, or the number of processes")
    require(max_images is None or max_images >= 1, "--max_images", max_images, "1 or more")
    phrases = _complete(prompts or {})
    photos = open_source(source, metadata, revision)
    check_apart(source, out)

    from data_prep.masks.sam3 import Segmenter  # takes seconds, and only this command needs it
    from pipeline.devices import pick_device

    thresholds = {"score_threshold": score_threshold, "mask_threshold": mask_threshold}
    segmenter = Segmenter(model, list(phrases.values()), pick_device(device), **thresholds)
    settings = {
        "model": model,
        "model_sha256": segmenter.fingerprint,
        "prompts": phrases,
        **thresholds,
        "precision": str(segmenter.dtype).removeprefix("torch."),
        "transformers": version("transformers"),
    }
    claim(out, settings)
    start = time.monotonic()
    # Without the fields that only `shard` needs, since all inputs are sent to the workers.
    inputs = (replace(item, fields={}, mask=None) for item in islice(photos, max_images))
    total = min((number for number in (photos.total, max_images) if number is not None), default=None)
    with Workers(workers, preload=(look.__module__,)) as pool:
        looked = pool.map(partial(look, out=out, side_px=segmenter.side_px), inputs)
        results = (result for _, result in track(looked, total, "segmenting"))
        tally = segment(results, segmenter, out, batch_size)
    wall_s = time.monotonic() - start
    write_rejects(out / REJECTS_NAME, tally.rejects)
    summary = {
        "source": source,
        "settings": settings,
        "device": str(segmenter.device),
        **tally.to_json(),
        "wall_s": round(wall_s, 3),
        "images_per_s": round(tally.written / wall_s, 3),
    }
    say(
        f"{out}: {tally.written} masks written, {tally.skipped} there already, {len(tally.rejects)} photos rejected; "
        f"{tally.empty} masks show no object"
    )
    return write_summary(out, summary)


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Note in a folder how its masks are made, or check that its masks were made in the same way.

    Raises:
        UserError: The folder's masks were made in another way.
    """
    path = out / SETTINGS_NAME
    if not path.is_file():
        write_json(path, settings)
        return
    theirs = json.loads(path.read_text())
    # The model's name is for people; the same weights may lie anywhere.
    other = next((key for key in settings if key != "model" and settings[key] != theirs.get(key)), None)
    if other is not None:
        raise UserError(
            f"the masks in {out} are made with {other} {theirs.get(other)!r}, not {settings[other]!r}; "
            "choose another --out, or remove the folder to make all of them anew"
        )


def look(item: Input, out: Path, side_px: int) -> Prepared | Done | Reject:
    """Find out whether a photo has a mask in `out`, and make it ready for the model if not."""
    if item.photo is None:
        return Reject(item.name, item.problem, "source")
    assert isinstance(item.photo, Location | bytes)  # other contents are masks only
    data = read_photo(item.name, item.photo)
    if isinstance(data, Reject):
        return data
    sha256 = hashlib.sha256(data).hexdigest()
    if (done := find_mask(out, sha256)) is not None:
        return done
    try:
        pixels = decode(data)
    except BadPhoto as error:
        return Reject(item.name, str(error), "decode")
    # Squeezed, aspect and all: this is how SAM 3 was trained.
    small = Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling.BILINEAR)
    return Prepared(sha256, pixels.shape[:2], np.asarray(small))


def find_mask(out: Path, sha256: str) -> Done | None:
    """The mask that a photo has already; None where it has none, or a damaged one."""
    try:
        return Done.of(decode_mask(read_file(mask_path(out, sha256))))
    except (FileNotFoundError, BadPhoto):
        return None


def segment(results: Iterable[Prepared | Done | Reject], segmenter: Segment, out: Path, batch_size: int) -> Tally:
    """Write the masks of photos that have none, a batch at a time, and count everything."""
    tally, batch = Tally(), dict[str, Prepared]()
    for ahead in results:
        if isinstance(ahead, Prepared) and ahead.sha256 in batch:
            _write_batch(batch, segmenter, out, tally)  # of an identical photo, too: now it has a mask
        # The photo was looked at a while ago; since then a copy of it, or another run, may have written its mask.
        result = (find_mask(out, ahead.sha256) or ahead) if isinstance(ahead, Prepared) else ahead
        if isinstance(result, Reject):
            tally.rejects.append(result)
        elif isinstance(result, Done):
            tally.skipped += 1
            tally.add(result)
        else:
            batch[result.sha256] = result
            if len(batch) == batch_size:
                _write_batch(batch, segmenter, out, tally)
    if batch:
        _write_batch(batch, segmenter, out, tally)
    return tally


def _write_batch(batch: dict[str, Prepared], segmenter: Segment, out: Path, tally: Tally) -> None:
    """Segment the photos of a batch, write and count their masks, and empty the batch."""
    photos = list(batch.values())
    painted = segmenter(np.stack([photo.pixels for photo in photos]), [photo.size for photo in photos])
    for photo, values in zip(photos, painted, strict=True):
        with io.BytesIO() as stream:
            Image.fromarray(values).save(stream, "PNG")
            write_bytes(mask_path(out, photo.sha256), stream.getvalue())
        tally.written += 1
        tally.add(Done.of(values))
    batch.clear()


def _complete(prompts: dict[str, str]) -> dict[str, str]:
    """A prompt for every class, in the order of MASK_CLASSES."""
    for name, prompt in prompts.items():
        require(name in MASK_CLASSES, "a class in --prompts", name, f"one of {', '.join(MASK_CLASSES)}")
        require(bool(prompt.strip()), f"the prompt for {name!r}", prompt, "a short noun phrase")
    return {name: prompts.get(name, name) for name in MASK_CLASSES}
