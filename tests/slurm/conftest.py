"""One SLURM for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs, start


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A SLURM of two nodes on this machine."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"SLURM is not installed: no {', '.join(missing)} (Debian: munge slurmctld slurmd slurm-client)")
    with start(tmp_path_factory.mktemp("slurm")) as running:
        yield running
