"""`python -m benchmarks NAME`: every benchmark, and the tables of their results."""

from __future__ import annotations

from benchmarks.features import features
from benchmarks.loader import loader
from benchmarks.prep import prep
from benchmarks.tables import tables
from benchmarks.views import views
from pipeline.cli import commands

if __name__ == "__main__":
    raise SystemExit(
        commands(
            {"features": features, "loader": loader, "prep": prep, "tables": tables, "views": views},
            prog="python -m benchmarks",
            description="Measure beside other tools in the same run; --quick is rough and takes a minute or two.",
        )
    )
