"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.checkpoints.files import name_of, newest_first, step_of


@dataclass
class Retention:
    """Keeps the latest checkpoints, those of every n-th step for good, and the one of the best validation."""

    latest: int
    """How many of the latest stay."""
    every: int
    """Checkpoints whose step is a multiple of this stay for good; 0 keeps none for good."""
    best: int | None = None
    """Step of the best validation so far."""

    def kept(self, names: Iterable[str]) -> set[str]:
        """The checkpoints among `names` that stay."""
        ordered = newest_first(names)
        for_good = {name for name in ordered if self.every and step_of(name) % self.every == 0}
        best = {name for name in ordered if name == self._best_name}
        return {*ordered[: self.latest], *for_good, *best}

    def pointers(self, names: Iterable[str]) -> dict[str, str | None]:
        """The checkpoints that `last` and `best` point to among `names`; None where there is none."""
        ordered = newest_first(names)
        best = self._best_name
        return {"last": next(iter(ordered), None), "best": best if best in ordered else None}

    @property
    def _best_name(self) -> str | None:
        return None if self.best is None else name_of(self.best)
