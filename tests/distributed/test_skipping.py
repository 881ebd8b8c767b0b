"""A step that is not finite on one rank is taken on none, under any ZeRO stage."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.warm import python

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.dist


def test_no_zero_stage_takes_a_step_whose_loss_or_gradient_is_not_finite_on_one_rank():
    worker = Path(__file__).with_name("skipping_worker.py")
    command = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("ZeRO ")]
    expected = [f"ZeRO {stage}, {kind}: skipped" for stage in range(4) for kind in ("loss", "gradient")]
    assert said == [*expected, "ZeRO 0, gradient of sharded experts: skipped"]
