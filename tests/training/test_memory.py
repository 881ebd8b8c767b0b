"""Memory of a process before it runs, against DeepSpeed's estimator, arithmetic and allocations."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from data_prep.scenes.pretraining import scenes_tiny_config
from pipeline.config import Config, TrainConfig
from pipeline.distributed.settings import Sharding
from pipeline.model.config import ModelConfig
from pipeline.optim.config import OptimConfig
from pipeline.training import memory
from pipeline.training.memory import (
    Parameters,
    buffer_bytes,
    build_head,
    count,
    need,
    saved_by_the_head,
    state_bytes,
    waiting_bytes,
)
from tests.small_run import small_config

MILLION = 10**6
HEAD = Config(model=small_config("scenes-tiny"))


def states(sharding: Sharding, precision: str = "bf16", shared: int = MILLION, experts: int = 0) -> tuple[float, float]:
    return state_bytes(Parameters(shared, experts, 0), precision, sharding)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        # Weights 2, gradient 2, fp32 master 4, two moments of 4, average 4; a slash is where ZeRO cuts.
        (1, 2 + 2 + 4 + 12 / 4),
        (2, 2 + 4 + (2 + 12) / 4),
        (3, (2 + 4 + 2 + 12) / 4),
    ],
)
def test_each_stage_spreads_one_thing_more_over_four_processes(stage, expected):
    assert states(Sharding(4, stage)) == (pytest.approx(MILLION * expected), 0)


def test_stage_zero_in_fp32_keeps_everything_once():
    assert states(Sharding(4, 0), "fp32") == (MILLION * (4 + 4 + 8 + 4), 0)


@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_stage_two_is_deepspeeds_estimate_but_for_the_average_and_its_second_gradient(processes):
    """DeepSpeed counts a gradient in fp32 beside the one in 16 bits; its optimizer does not keep one."""
    _, theirs = estimate_zero2_model_states_mem_needs(MILLION, processes, 1, cpu_offload=False)
    ours, _ = states(Sharding(processes, 2))
    assert ours == pytest.approx(theirs + 4 * MILLION - 4 * MILLION / processes)


@pytest.mark.parametrize(("stage", "copies"), [(2, 4), (3, 4)])
def test_gradients_that_add_up_in_fp32_take_four_bytes_instead_of_two(stage, copies):
    usual, more = (states(Sharding(copies, stage, adds_in_fp32=kept))[0] for kept in (False, True))
    assert more - usual == pytest.approx(2 * MILLION / copies)
    assert states(Sharding(copies, stage, adds_in_fp32=True), "fp32") == states(Sharding(copies, stage), "fp32")


def test_offloading_moves_optimizer_state_to_the_host():
    device, host = states(Sharding(2, 2, offload=True))
    assert (device, host) == (MILLION * (2 + 4), MILLION * (2 + 12) / 2)


def test_sharded_experts_divide_what_a_process_holds_whole_and_nothing_else():
    whole, _ = states(Sharding(4, 2), shared=0, experts=MILLION)
    halved, _ = states(Sharding(4, 2, expert_parallel=2), shared=0, experts=MILLION)
    # Half of the experts, whose optimizer state the two processes with the same ones share.
    assert whole - halved == MILLION * (2 + 4) / 2
    assert states(Sharding(4, 2, expert_parallel=4))[0] == states(Sharding(4, 2))[0]


def test_the_numbers_of_a_deepspeed_file_are_read():
    zero = {"stage": 3, "overlap_comm": True, "reduce_bucket_size": 100, "stage3_max_live_parameters": 7}
    found = Sharding.of({"zero_optimization": {**zero, "offload_optimizer": {"device": "cpu"}}}, 8, 2)
    assert found == Sharding(8, 3, 2, offload=True, bucket=200, live=7)
    assert buffer_bytes(Parameters(1000, 0, 0), "bf16", found) == 2 * (200 + 7)
    assert buffer_bytes(Parameters(5, 0, 0), "bf16", found) == 2 * (200 + 5)
    reduced = Sharding.of({"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32",
                           "zero_optimization": {"stage": 2, "reduce_bucket_size": 100}}, 8, 1)  # fmt: skip
    assert reduced == Sharding(8, 2, bucket=100, live=10**9, adds_in_fp32=True, reduces_in_fp32=True)
    assert buffer_bytes(Parameters(5, 0, 0), "bf16", reduced) == (2 + 4) * 100
    assert buffer_bytes(Parameters(5, 0, 0), "fp32", reduced) == 4 * 100


def test_counting_allocates_nothing_and_finds_the_experts():
    found = count(HEAD, scenes_tiny_config())
    sizes = HEAD.model
    assert found.experts == sizes.layers * sizes.experts * 3 * sizes.width * sizes.expert_width
    full = count(Config(model=ModelConfig()), scenes_tiny_config())
    assert full.experts == 4 * 4 * 3 * 512 * 2048


@pytest.mark.parametrize("kind", ["roadwork", "cell_mil"])
def test_each_head_of_several_is_counted(kind):
    """Weights, optimizer state and activations; the pruner is there once, whatever the number of heads."""
    backbone, sizes = scenes_tiny_config(), small_config("scenes-tiny", head=kind)
    one, three = (Config(model=sizes, train=TrainConfig(heads=heads)) for heads in (1, 3))
    head = sum(p.numel() for p in build_head(one, backbone).head.parameters())
    found, expected = count(three, backbone), count(one, backbone)
    assert found.trained - expected.trained == 2 * head
    assert found.experts == 3 * expected.experts
    assert found.frozen == expected.frozen
    assert sum(saved_by_the_head(three, backbone)) > 2 * sum(saved_by_the_head(one, backbone))
    needs = [need(config, backbone, "fp32", Sharding(1), 4) for config in (one, three)]
    assert needs[1].states > needs[0].states
    assert needs[1].device > needs[0].device


def test_what_the_head_keeps_grows_by_the_photo():
    """Three photos need what one and two foretell."""
    from pipeline.training.memory import _saved, build_head, noise

    torch.manual_seed(0)
    fixed, per_photo = saved_by_the_head(HEAD, scenes_tiny_config())
    assert per_photo > 0
    three = _saved(build_head(HEAD, scenes_tiny_config()).train(), noise(HEAD, scenes_tiny_config(), 3), False)
    assert three == pytest.approx(fixed + 3 * per_photo, rel=0.05)


def test_features_in_memory_leave_no_batches_waiting_for_a_process():
    held = Config(model=HEAD.model)
    held.data.features = "cache"
    backbone = scenes_tiny_config()
    assert waiting_bytes(held, backbone, 2, 4) == 2 * waiting_bytes(held, backbone, 1, 4) > 0
    held.data.features_in = "host"
    assert waiting_bytes(held, backbone, 2, 4) == 0


def test_a_cache_spares_the_backbones_activations_and_a_larger_micro_batch_costs():
    backbone, sharding = scenes_tiny_config(), Sharding(1)
    online = need(HEAD, backbone, "fp32", sharding, 4)
    assert need(HEAD, backbone, "fp32", sharding, 8).activations > 1.5 * online.activations
    cached = Config(model=HEAD.model)
    cached.data.features = "cache"
    assert need(cached, backbone, "fp32", sharding, 4).activations < online.activations
    assert online.device == online.states + online.buffers + online.backbone + online.activations


def test_only_products_with_the_hessian_need_more_activations():
    backbone = scenes_tiny_config()
    usual, products, drawn = (
        need(Config(model=HEAD.model, optim=OptimConfig(name=name)), backbone, "fp32", Sharding(1), 4)
        for name in ("adamw", "sophia_h", "sophia_g")
    )
    # Rounding may send a token to another expert, which pads its rows.
    assert drawn.activations == pytest.approx(usual.activations, rel=0.01)
    assert replace(drawn, activations=usual.activations) == usual
    assert (products.states, products.host) == (usual.states, usual.host)
    assert 1.5 * usual.activations < products.activations < 10 * usual.activations


@pytest.mark.parametrize("optimizer", ["adamw", "sophia_h"])
def test_what_is_measured_is_freed(optimizer, monkeypatch):
    """A head of full size and its activations are half a gigabyte."""
    built = []

    def build(config, backbone):
        head = build_head(config, backbone)
        built.extend(weakref.ref(parameter) for parameter in head.parameters())
        return head

    monkeypatch.setattr(memory, "build_head", build)
    saved_by_the_head(replace(HEAD, optim=OptimConfig(name=optimizer)), scenes_tiny_config())
    gc.collect()
    assert built
    assert all(parameter() is None for parameter in built)
