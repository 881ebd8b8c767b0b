"""The SLURM that the other tests of this folder use."""

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_a_step_runs_on_both_nodes(cluster: Cluster):
    said = cluster.run("srun", "--nodes=2", "--label", "bash", "-c", "echo $SLURMD_NODENAME $SLURM_PROCID")
    assert sorted(said.splitlines()) == ["0: node1 0", "1: node2 1"]
