"""One sample of a shard: the content of `<key>.json` beside `<key>.jpg`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metadata:
    """Facts about a photo that are not in its pixels; None is NULL. Words are those of `vocabulary`, in lower case."""

    gps: tuple[float, float] | None = None
    """Latitude and longitude in degrees."""
    weather: tuple[str, ...] | None = None
    daytime: str | None = None
    scene: str | None = None
    city: str | None = None
    description: str | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Metadata:
        """The inverse of `asdict`, from JSON, where tuples became lists."""
        gps, weather = values["gps"], values["weather"]
        return cls(
            gps=None if gps is None else (float(gps[0]), float(gps[1])),
            weather=None if weather is None else tuple(weather),
            **{name: values[name] for name in ("daytime", "scene", "city", "description")},
        )


@dataclass(frozen=True)
class Record:
    """A sample's description; the photo's bytes are stored beside it, unchanged."""

    key: str
    label: int | None
    """1 roadwork, 0 none, None unknown."""
    split: str
    source: str
    """Where the photo came from, relative to the source that was read."""
    sha256: str
    """SHA-256 of the photo's bytes."""
    width: int
    """Width in pixels, after EXIF orientation."""
    height: int
    group: int
    """Near-duplicates (one video, one place) share a group; a group is in one split."""
    gps_cluster: int
    sample_weight: float
    video: str | None = None
    """Name of the video that the photo is a frame of."""
    metadata: Metadata = field(default_factory=Metadata)
    text_vector: tuple[float, ...] | None = None
    """Embedding of the description by the text encoder that the index names; None for NULL."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {**vars(self), "metadata": vars(self.metadata)}  # `asdict` copies deeply and takes ten times as long

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: The values are not those of a record.
        """
        vector = values["text_vector"]
        typed = {"metadata": Metadata.from_json(values["metadata"]), "text_vector": vector and tuple(vector)}
        return cls(**{**values, **typed})
