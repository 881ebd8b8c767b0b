"""The results of a run's evaluations, which its folder holds: light to import, without plots and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.names import Profile

SCORES = ("train", "val", "test", "baseline")


def read_results(run: Path, profile: Profile) -> dict[str, Any]:
    """The summary.json of a profile; empty where nothing was measured.

    Args:
        run: The run folder.
        profile: The profile; `native` includes what training wrote.
    """
    path = run / "summary.json" if profile == "native" else run / profile / "summary.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    # Version 0.1 kept other profiles as a part of the native summary.
    return {} if profile == "native" else read_results(run, "native").get(profile, {})


def streetvision_results(run: Path) -> dict[str, Any]:
    """The scores in the profile `streetvision`; empty where shards or model are not those of the native ones."""
    found, native = read_results(run, "streetvision"), read_results(run, "native")
    return found if found and same_subject(found["evaluation"], native["evaluation"]) else {}


def without_stale(results: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """A summary without scores of other photos or of another model, which would stand beside those of a new evaluation.

    Args:
        results: The summary so far.
        about: Its part `evaluation` to be.
    """
    stale = not same_subject(results.get("evaluation", {}), about)
    return {key: value for key, value in results.items() if not (stale and key in SCORES)}


def same_subject(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two evaluations, given by that part of their summaries, are of the same photos and the same model."""
    return all(first.get(key) == second.get(key) for key in ("source_sha256", "model_sha256"))
