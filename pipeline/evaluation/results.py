"""The results of a run's evaluations, which its folder holds: light to import, without plots and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.names import Profile


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
    """The scores in the profile `streetvision`; empty where they were measured on other shards than the native ones."""
    found, native = read_results(run, "streetvision"), read_results(run, "native")
    same = found and found["evaluation"]["source_sha256"] == native["evaluation"]["source_sha256"]
    return found if same else {}
