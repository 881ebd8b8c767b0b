"""`python -m benchmarks NAME`: every benchmark, and the tables of their results."""

from __future__ import annotations

from pipeline.cli import commands

BENCHMARKS = (
    "checkpoint", "features", "gpu", "loader", "parity", "prep", "pruning", "scaling", "sophia", "study", "tables",
    "trainer", "views",
)  # fmt: skip

if __name__ == "__main__":
    about = "Measure beside other tools in the same run; --quick is rough and takes a minute or two."
    places = {name: f"benchmarks.{name}:{name}" for name in BENCHMARKS}
    raise SystemExit(commands(places, prog="python -m benchmarks", description=about))
