"""Processes of the benchmarks: they know of one another, find no GPU, and end with rank 0's answer or its error."""

import os

import pytest
import torch

from benchmarks.processes import run_apart
from pipeline.devices import CPU_ONLY

pytestmark = pytest.mark.dist


def look(word):
    """What a process finds."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", *CPU_ONLY)
    return word, {name: os.environ.get(name) for name in names}, torch.get_num_threads(), torch.cuda.is_available()


def fail():
    """End one of two processes."""
    raise ValueError(f"rank {os.environ['RANK']} ends")


def test_a_process_is_told_its_place_and_computes_on_the_cpu_in_one_thread():
    before = dict(os.environ)
    word, found, threads, has_gpu = run_apart(look, 2, "hello")
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    assert (word, found) == ("hello", {**told, **CPU_ONLY})
    assert (threads, has_gpu) == (1, False)
    assert dict(os.environ) == before


def test_an_error_in_a_process_is_raised_here():
    with pytest.raises(Exception, match="rank 0 ends"):
        run_apart(fail, 1)
