"""What a run decides before it writes: a header, and one list of samples for each tar.

The plan is on the disk, so that any process on any machine that sees the folder can write a tar, and so that a run that
was killed can be resumed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.shards.options import Arguments
from pipeline.data.index import Cluster, Field

TARS_FOLDER = "plan"


@dataclass(frozen=True)
class PlannedTar:
    """A tar to be written."""

    name: str
    split: str
    samples: int
    bytes: int
    """Approximate size; the header of a plan is written before the tar."""


@dataclass(frozen=True)
class Wanted:
    """What a run is asked for; a plan for anything else does not fit."""

    arguments: Arguments
    version: str
    """Version of the program."""
    source: str
    source_stamp: str
    """Digest of the source's files, without their bytes."""
    text_encoder: str
    """Hub id or folder of the sentence encoder; empty without one."""


@dataclass(frozen=True)
class Plan(Wanted):
    """The header of a plan."""

    text_dim: int
    """Length of a description's vector; 0 without an encoder."""
    source_kind: str
    tars: tuple[PlannedTar, ...]
    clusters: tuple[Cluster, ...]
    fields: dict[str, Field]
    """Metadata field to what it gives away about the label."""
    source_sha256: str
    rejected: dict[str, int]
    unknown_words: dict[str, dict[str, int]]
    summary: dict[str, Any]
    """What the summary says of the decisions; the written tars are added at the end."""

    def answers(self, wanted: Wanted) -> bool:
        """Whether this plan fits what a run is asked for."""
        return all(getattr(self, field.name) == getattr(wanted, field.name) for field in fields(wanted))

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: The values are not those of a plan.
        """
        arguments, tars = Arguments(**values["arguments"]), tuple(PlannedTar(**tar) for tar in values["tars"])
        clusters = (Cluster(**{**c, "centre": c["centre"] and tuple(c["centre"])}) for c in values["clusters"])
        known = {name: Field(**field) for name, field in values["fields"].items()}
        parsed = {"arguments": arguments, "tars": tars, "clusters": tuple(clusters), "fields": known}
        return cls(**{**values, **parsed})


def entries_path(folder: Path, tar: str) -> Path:
    """Where a plan keeps the list of a tar's samples."""
    return (folder / TARS_FOLDER / tar).with_suffix(".json")


def read_entries(folder: Path, tar: str) -> list[dict[str, Any]]:
    """The samples that a tar is to hold, as `planning` describes them."""
    entries: list[dict[str, Any]] = json.loads(entries_path(folder, tar).read_text())
    return entries
