"""One sample of a shard: the content of `<key>.json` beside `<key>.jpg`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.data.index import Label
from pipeline.errors import shown
from pipeline.names import DAYTIME, SCENE, WEATHER
from pipeline.parsing.typed_json import Positive, Whole


@dataclass(frozen=True)
class Metadata:
    """Facts about a photo that are not in its pixels; None is NULL. Words are those of `pipeline.names`."""

    gps: tuple[float, float] | None = None
    """Latitude and longitude in degrees."""
    weather: tuple[str, ...] | None = None
    daytime: str | None = None
    scene: str | None = None
    city: str | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no place on Earth, and words that are not in the vocabulary."""
        if self.gps is not None and not (abs(self.gps[0]) <= 90 and abs(self.gps[1]) <= 180):
            raise ValueError(f"gps is {list(self.gps)}, which is no latitude and longitude in degrees")
        for name, words, known in (
            ("weather", self.weather or (), WEATHER), ("daytime", (self.daytime,), DAYTIME),
            ("scene", (self.scene,), SCENE),
        ):  # fmt: skip
            unknown = [word for word in words if word is not None and word not in known]
            if unknown:
                raise ValueError(f"{name} has {shown(unknown[0])}, which is not in the vocabulary")


@dataclass(frozen=True)
class Record:
    """A sample's description; the photo's bytes are stored beside it, unchanged."""

    key: str
    label: Label | None
    """1 roadwork, 0 none, None unknown."""
    split: str
    source: str
    """Where the photo came from, relative to the source that was read."""
    sha256: str
    """SHA-256 of the photo's bytes."""
    width: Positive
    """Width in pixels, after EXIF orientation."""
    height: Positive
    group: int
    """Near-duplicates (one video, one place) share a group; a group is in one split."""
    gps_cluster: Whole
    sample_weight: float
    video: str | None = None
    """Name of the video that the photo is a frame of."""
    metadata: Metadata = field(default_factory=Metadata)
    text_vector: tuple[float, ...] | None = None
    """Embedding of the description by the text encoder that the index names; None for NULL."""
    mask_sha256: str | None = None
    """SHA-256 of the mask's bytes; None without a mask, and in shards of before December 2026."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {**vars(self), "metadata": vars(self.metadata)}  # `asdict` copies deeply and takes ten times as long
