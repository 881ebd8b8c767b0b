"""What is odd about the coordinates of a whole set: counted while it is read, and told once."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from pipeline.names import EARTH_RADIUS_KM

FAR_NORTH = 66.0  # degrees: few streets lie beyond the polar circles, and swapped coordinates of America do
APART_KM = 50.0
LONGEST_EXAMPLE = 60

Place = tuple[float, float]


class GpsNotes:
    """Counts of what could not be read, and of what was read and looks wrong, with the first example of each."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.problems: Counter[str] = Counter()
        """Reason to number of coordinates that were given and became NULL."""
        self._places = 0
        self._doubts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, name: str, told: Any, place: Place | None, problem: str | None, exif: Place | None = None) -> None:
        """Take note of one row.

        Args:
            name: Name of the photo, or the number of the row.
            told: The cells as they are written.
            place: Latitude and longitude as they were read, or None.
            problem: Why coordinates that were given could not be read.
            exif: Latitude and longitude in the photo's EXIF.
        """
        if problem is not None:
            self.problems[problem] += 1
            self._note(problem, name, told)
        if place is None:
            return
        self._places += 1
        doubts = {"beyond": abs(place[0]) > FAR_NORTH}
        if exif is not None:
            swapped = _distance_km(place, exif) > APART_KM > _distance_km((place[1], place[0]), exif)
            doubts |= {"swapped": swapped, "apart": not swapped and _distance_km(place, exif) > APART_KM}
        for doubt in (doubt for doubt, holds in doubts.items() if holds):
            self._doubts[doubt] += 1
            self._note(doubt, name, told)

    def reasons(self) -> str:
        """Why coordinates became NULL, with counts and examples; empty where none did."""
        counts = sorted(self.problems.items())
        return "; ".join(f"{count} {problem} (such as {self._examples[problem]})" for problem, count in counts)

    def doubts(self, source: str) -> list[str]:
        """A sentence for each way in which what was read looks wrong.

        Args:
            source: What the coordinates are of: "the photos", or a table.
        """
        lines = []
        if self._doubts["swapped"]:
            lines.append(
                f"GPS of {source}: {self._doubts['swapped']} of {self._places} places have latitude and longitude "
                f"swapped, says the photos' EXIF (such as {self._examples['swapped']}); correct the table"
            )
        elif 2 * self._doubts["beyond"] > self._places:
            lines.append(
                f"GPS of {source}: {self._doubts['beyond']} of {self._places} places lie beyond {FAR_NORTH:g} degrees "
                f"of latitude, perhaps latitude and longitude are swapped (such as {self._examples['beyond']}); "
                "latitude comes first"
            )
        if self._doubts["apart"]:
            lines.append(
                f"GPS of {source}: {self._doubts['apart']} of {self._places} places are more than {APART_KM:g} km from "
                f"what the photos' EXIF says (such as {self._examples['apart']}); the table counts"
            )
        return lines

    def _note(self, kind: str, name: str, told: Any) -> None:
        if kind not in self._examples:
            text = repr(told)
            shown = text if len(text) <= LONGEST_EXAMPLE else f"{text[:LONGEST_EXAMPLE]}..."
            self._examples[kind] = f"{shown} of {name!r}"


def _distance_km(first: Place, second: Place) -> float:
    """Great-circle distance of two places in degrees (haversine formula); a latitude beyond the poles is far away."""
    if max(abs(first[0]), abs(second[0])) > 90:
        return math.inf
    (lat1, lon1), (lat2, lon2) = (tuple(map(math.radians, place)) for place in (first, second))
    half = math.sin((lat2 - lat1) / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin((lon2 - lon1) / 2) ** 2
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, math.sqrt(half)))
