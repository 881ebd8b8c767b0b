"""`python -m benchmarks.study`."""

from __future__ import annotations

from benchmarks.study import study
from pipeline.cli import command

if __name__ == "__main__":
    raise SystemExit(command(study))
