"""The model of training on many processes: its arithmetic, and its account of one small engine."""

import math
from dataclasses import replace

import pytest

from benchmarks import scaling
from benchmarks.scaling import MICRO, Assumptions, Costs, HeadCount, calibrate, gpu_costs, gpu_step_s, predict
from benchmarks.scaling_worker import Measured
from data_prep.scenes.backbone import scenes_tiny_config
from pipeline.config import Config, DataConfig, to_yaml
from pipeline.distributed.settings import Sharding
from pipeline.training.memory import Parameters, count, state_bytes
from tests.small_run import small_config

COSTS = Costs(
    fixed_s=0.1, photo_s=0.02, optimizer_s=0.4, reduced_bytes=4e6, gathered_bytes=4e6, collectives=6
)  # fmt: skip


def step(photos: int, accumulation: int) -> Measured:
    seconds = accumulation * (COSTS.fixed_s + photos * COSTS.photo_s) + COSTS.optimizer_s
    return Measured(seconds, 1e6 + accumulation * COSTS.reduced_bytes, COSTS.collectives, 0, 0.0, math.inf)


def test_the_parts_of_a_step_are_found_again_from_three_shapes():
    shapes = [(MICRO, 1), (MICRO, 2), (2 * MICRO, 1)]
    found = calibrate({shape: step(*shape) for shape in shapes}, 1_000_000)
    assert vars(found) == pytest.approx(vars(COSTS))


def test_a_process_alone_computes_and_several_share_the_optimizer_and_pay_for_bytes():
    alone = predict(COSTS, 4, 4, 1, slowdown=1.0, bytes_per_s=math.inf, latency_s=0.0)
    assert alone == pytest.approx(4 * (0.1 + 4 * 0.02) + 0.4)
    two = predict(COSTS, 4, 2, 2, slowdown=1.0, bytes_per_s=1e8, latency_s=0.001)
    assert two == pytest.approx(2 * 0.18 + 0.2 + (2 * 4e6 + 2e6) / 1e8 + 9 * 0.001)


def test_gpus_lose_more_where_the_slow_network_begins_and_nothing_where_links_are_free():
    assumed = Assumptions()
    config = Config(model=small_config("scenes-tiny"))
    parameters, head = Parameters(10**8, 0, 0), HeadCount(flops=1e12, kernels=0, tokens=100)

    def step_s(gpus: int, assumed: Assumptions) -> float:
        # The optimizer's share is left out: it is the one part that more GPUs make shorter.
        costs = gpu_costs(config, parameters, head, 16, gpus, assumed)
        return gpu_step_s(config, parameters, head, 16, gpus, assumed) - costs.optimizer_s / gpus

    lost = [step_s(gpus, assumed) - step_s(1, assumed) for gpus in (1, 8, 16, 512)]
    assert lost == sorted(lost)
    assert lost[2] > 5 * lost[1] > 0
    free = replace(
        assumed, node_bytes_per_s=math.inf, fabric_bytes_per_s=math.inf, node_latency_s=0.0, fabric_latency_s=0.0
    )
    assert step_s(512, free) == pytest.approx(step_s(1, free))


def test_experts_that_are_shared_send_tokens_and_save_gradients():
    config = Config(model=small_config("scenes-tiny"))
    parameters, head = Parameters(0, 10**8, 0), HeadCount(flops=1e12, kernels=0, tokens=1000)
    whole = gpu_costs(config, parameters, head, 16, 8, Assumptions())
    before = gpu_step_s(config, parameters, head, 16, 8, Assumptions())
    config.train.expert_parallel = 2
    halved = gpu_costs(config, parameters, head, 16, 8, Assumptions())
    assert halved.reduced_bytes == whole.reduced_bytes / 2
    slow_links = replace(Assumptions(), node_latency_s=1.0)
    calls = gpu_step_s(config, parameters, head, 16, 8, slow_links) - 3 * (halved.collectives)
    assert calls == pytest.approx(4 * config.model.layers, abs=1)
    assert gpu_step_s(config, parameters, head, 16, 8, Assumptions()) < before


def test_predictions_say_that_they_are_predictions():
    rows = scaling.predicted(replace(Assumptions()), 3.0)
    assert len(rows) == 2 * len(scaling.GPUS)
    assert all(row.note.startswith("predicted, not measured") for row in rows)
    assert all(0 < row.ratio <= 1 for row in rows)
    cached, online = rows[0].ours, rows[len(scaling.GPUS)].ours
    assert cached > 10 * online  # the backbone is what costs


@pytest.mark.slow
def test_two_processes_hold_and_send_what_the_model_says(tmp_path):
    config = Config(data=DataConfig(workers=0), model=small_config("scenes-tiny"))
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    found = scaling._arm(tmp_path / "recipe.yaml", 2)()[MICRO, scaling.SHARE // (MICRO * 2)]
    parameters = count(config, scenes_tiny_config())
    held, _ = state_bytes(parameters, "fp32", Sharding(2))
    assert found.state_bytes == pytest.approx(held, rel=0.01)
    # Two micro-batches of gradients; parameters without one (metadata is NULL here) send none.
    assert 0.5 < found.sent_bytes / (2 * 4 * parameters.trained) < 1.5
    assert found.bytes_per_s > 0
