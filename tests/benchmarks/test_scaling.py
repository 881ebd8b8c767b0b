"""The model of training on many processes: its arithmetic, and its account of one small engine."""

import math

import pytest

from benchmarks.processes import run_apart
from benchmarks.scaling import ALONE, MICRO, Costs, parts_of, predict
from benchmarks.scaling_worker import Measured, measure
from data_prep.scenes.pretraining import scenes_tiny_config
from pipeline.config import Config, DataConfig
from pipeline.distributed.settings import Sharding
from pipeline.training.memory import count, state_bytes
from tests.small_run import small_config

COSTS = Costs(
    fixed_s=0.1, photo_s=0.02, optimizer_s=0.4, reduced_bytes=4e6, gathered_bytes=4e6, collectives=6
)  # fmt: skip


def step(photos: int, accumulation: int) -> Measured:
    seconds = accumulation * (COSTS.fixed_s + photos * COSTS.photo_s) + COSTS.optimizer_s
    return Measured(seconds, 1e6 + accumulation * COSTS.reduced_bytes, COSTS.collectives, 0, 0.0, math.inf)


def test_the_parts_of_a_step_are_found_again_from_three_shapes():
    found = parts_of({shape: step(*shape) for shape in ALONE}, 1_000_000)
    assert vars(found) == pytest.approx(vars(COSTS))


def test_a_process_alone_computes_and_several_share_the_optimizer_and_pay_for_bytes():
    alone = predict(COSTS, 4, 4, 1, slowdown=1.0, bytes_per_s=math.inf, latency_s=0.0)
    assert alone == pytest.approx(4 * (0.1 + 4 * 0.02) + 0.4)
    two = predict(COSTS, 4, 2, 2, slowdown=1.0, bytes_per_s=1e8, latency_s=0.001)
    assert two == pytest.approx(2 * 0.18 + 0.2 + (2 * 4e6 + 2e6) / 1e8 + 9 * 0.001)


@pytest.mark.slow
def test_two_processes_hold_and_send_what_the_model_says():
    config, shape = Config(data=DataConfig(workers=0), model=small_config("scenes-tiny")), (MICRO, 2)
    found = run_apart(measure, 2, config, [shape])[shape]
    parameters = count(config, scenes_tiny_config())
    held, _ = state_bytes(parameters, "fp32", Sharding(2))
    assert found.state_bytes == pytest.approx(held, rel=0.01)
    # Two micro-batches of gradients; parameters without one (metadata is NULL here) send none.
    assert 0.5 < found.sent_bytes / (2 * 4 * parameters.trained) < 1.5
    assert found.bytes_per_s > 0
