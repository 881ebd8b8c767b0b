"""How a process of a training starts and ends."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks.parity_cells import Cell, make_trainer
from benchmarks.processes import run_apart
from pipeline.config import TrainConfig
from pipeline.distributed.agreement import collective_timeout, first_of_node_first
from pipeline.distributed.experts import expert_parallel_size
from pipeline.errors import UserError
from tests.warm import python

SCRIPT = """
import atexit
from pipeline.distributed.startup import end_process

class Held:
    def __del__(self):
        print("taken down")

held = Held()
atexit.register(print, "handlers have run")
print("the last line")
end_process(75)
"""


def test_a_process_ends_with_its_output_and_handlers_and_not_with_the_interpreters_end():
    """What is freed while the interpreter is taken down, such as gloo's tensors, may abort it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, env=environment
    )
    assert process.returncode == 75, process.stderr
    assert process.stdout.splitlines() == ["the last line", "handlers have run"]


def test_an_engine_does_not_wait_for_the_compiler_of_an_optimizer_that_nobody_uses():
    """DeepSpeed imports Muon with every engine, and compiling it loads torch's inductor, which takes seconds."""
    code = "import sys\nfrom pipeline.distributed import startup\n{}\n"
    code += "import deepspeed.runtime.zero.muon.muon_optimizer\nprint('torch._inductor.compile_fx' in sys.modules)"
    loaded = []
    for first in ("", "startup._leave_muon_uncompiled()"):
        done = subprocess.run([python(), "-c", code.format(first)], capture_output=True, text=True, check=True)
        loaded.append(done.stdout.split()[-1])
    assert loaded == ["True", "False"]


TIMEOUTS = """
import deepspeed, torch, torch.distributed as dist
from pathlib import Path
from unittest.mock import patch
from pipeline.config import Config, TrainConfig
from pipeline.distributed.agreement import Agreement
from pipeline.distributed.settings import engine_settings
from pipeline.distributed.startup import start

start(engine_settings(Config(), Path("ds_configs/zero0.json"), 1, "fp32"), [], hang_minutes=90)
with patch.object(dist, "get_backend", lambda: "nccl"):
    agreement = Agreement(hang_minutes=90)
for group in (dist.group.WORLD, deepspeed.comm.new_group([0]), agreement.group):
    print("timeout", group._get_backend(torch.device("cpu")).options._timeout)
"""


def test_every_group_waits_longer_than_the_watchdog():
    """That of the trainer's flags beside NCCL too, and those that DeepSpeed makes for ZeRO and for experts."""
    done = subprocess.run([python(), "-c", TIMEOUTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("timeout")] == ["timeout 1:32:00"] * 3


def groups_of_an_engine(folder):
    """Ranks and timeouts of this process's groups, once experts are shared and ZeRO spreads the rest."""
    cell = Cell(2, 2, 2, 1)
    trainer = make_trainer(cell, folder / f"rank-{os.environ['RANK']}.json")
    assert expert_parallel_size(trainer.accelerator) == 2
    return [
        (dist.get_process_group_ranks(group), group._get_backend(torch.device("cpu")).options._timeout)
        for group in dist.distributed_c10d._world.pg_map
    ]


@pytest.mark.dist
def test_deepspeed_makes_its_groups_for_zero_and_for_experts_with_that_timeout(tmp_path):
    found = run_apart(groups_of_an_engine, 2, tmp_path)
    assert {timeout for _, timeout in found} == {collective_timeout(TrainConfig().hang_minutes)}
    ranks = [ranks for ranks, _ in found]
    assert ranks.count([0, 1]) >= 3  # the default group, ZeRO's, and the one over which tokens go to experts
    assert [0] in ranks  # the one over which the gradients of this rank's experts are reduced


KERNELS = """
import json, os, sys, torch
from pipeline import train

def look(config, dry_run):
    print(json.dumps([
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.backends.cuda.cudnn_sdp_enabled(), torch.cuda.is_initialized(),
    ]), file=sys.__stdout__)

train.train, train.dist.destroy_process_group = look, lambda: None
train.main()
"""


@pytest.mark.parametrize(
    ("words", "kernels"),
    [
        ([], [False, False, None, False, False]),
        (["--train.deterministic", "true"], [True, True, ":4096:8", False, False]),
    ],
)
def test_training_chooses_its_kernels_before_cuda_starts(words, kernels):
    """Without cuDNN's attention, whose backward pass may give NaN; on request, those that add in a fixed order."""
    done = subprocess.run([python(), "-c", KERNELS, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == kernels


def load_in_turns(folder, faulty):
    """The order in which four ranks of two nodes load: ranks 0 and 2 are the first ones of theirs."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(rank % 2)

    def load(first):
        if rank in faulty:
            raise UserError(f"rank {rank} has no weights")
        there = sorted(int(file.name) for file in folder.iterdir())
        time.sleep(0.5 if first else 0)  # as a download takes, so that those who do not wait are there before it ends
        (folder / str(rank)).touch()
        return first, there

    try:
        found = first_of_node_first(load)
    except UserError as error:
        found = str(error)
    everything = [None] * 4
    dist.all_gather_object(everything, found)
    return everything


@pytest.mark.dist
def test_rank_zero_loads_alone_and_then_the_first_rank_of_each_node_and_then_the_others(tmp_path):
    """Nodes may share the folder into which weights are fetched, or have one each."""
    zero, one, two, three = run_apart(load_in_turns, 4, tmp_path, ())
    assert zero == (True, [])
    assert two == (True, [0])
    for first, there in (one, three):
        assert not first
        assert {0, 2} <= set(there)


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_weights_that_one_rank_cannot_load_are_every_ranks_mistake(tmp_path, rank):
    assert run_apart(load_in_turns, 4, tmp_path, (rank,)) == [f"rank {rank} has no weights"] * 4
