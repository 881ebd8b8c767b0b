import json
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipeline.config import TrainConfig
from pipeline.distributed.agreement import Agreement
from pipeline.errors import UserError
from pipeline.model.config import TERMS, ModelConfig
from pipeline.model.cpu_kernels import HAS_ONEDNN
from pipeline.model.moe import ROWS_PER_BLOCK, SparseExperts
from pipeline.training import telemetry
from pipeline.training.telemetry import Meter, Profiler, expert_load
from pipeline.training.throughput import flop_counter


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of one."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield Agreement(hang_minutes=1)
    dist.destroy_process_group()


@pytest.fixture
def meter(alone):
    return Meter(torch.device("cpu"), 8, alone)


def losses(value):
    return torch.full((1 + len(TERMS),), value)


def test_skipped_steps_count_for_the_rate_and_not_for_the_loss(meter):
    for value, taken in ((1.0, True), (torch.nan, False), (3.0, True)):
        meter.add_step(losses(value), taken)
    time.sleep(0.03)  # so that the rounding of both figures does not show
    values = meter.read()
    assert values["loss"] == values[f"loss/{TERMS[-1]}"] == 2.0
    assert values["images_per_s"] * values["step_s"] == pytest.approx(8, rel=0.02)
    meter.add_step(losses(torch.nan), False)
    assert "loss" not in meter.read()


def test_waiting_for_data_is_a_share_of_the_step_and_validations_are_no_part_of_it(meter):
    with meter.waiting_for_data():
        time.sleep(0.06)
    with meter.forward():
        time.sleep(0.02)
    with meter.paused():
        time.sleep(0.2)
    meter.add_step(losses(1.0), True)
    values = meter.read()
    assert 0.08 <= values["step_s"] < 0.2
    assert 0.4 < values["data_wait_share"] < 0.9
    assert values["rank_s"][0] >= 0.08
    assert 0 < values["rss_gib"] < 64


def test_each_steps_seconds_begin_where_those_of_the_step_before_ended_and_leave_pauses_out(meter, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: next(moments))
    moments = iter([meter.started + seconds for seconds in (2.0, 2.0, 12.0, 15.0)])
    monkeypatch.setattr(telemetry, "time", clock)
    assert meter.add_step(losses(1.0), True) == pytest.approx(2.0)
    with meter.paused():
        pass
    assert meter.add_step(losses(1.0), True) == pytest.approx(3.0)


def test_expert_load_counts_the_tokens_that_exist():
    logits = torch.tensor([[[3.0, 2, 1], [3, 1, 2], [0, 0, 9]], [[1, 3, 2], [9, 0, 0], [9, 0, 0]]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert expert_load(logits, mask, 1).tolist() == [2, 1, 1]
    assert expert_load(logits, mask, 2).tolist()[0] == 2 + 1  # the third token of the first has expert 0 second


def test_the_load_of_each_layer_is_told_relative_to_an_even_one(meter):
    even = torch.tensor([[[1.0, 0], [0, 1]]])
    uneven = torch.tensor([[[1.0, 0], [1, 0]]])
    answer = SimpleNamespace(router_logits=(even, uneven), token_mask=torch.ones(1, 2, dtype=torch.bool))
    meter.add_load(answer, 1)
    meter.add_step(losses(1.0), True)
    values = meter.read()
    assert values["expert_load"] == [[1, 1], [2, 0]]
    assert values["expert_load_max"] == 2


def test_a_straggler_is_named_when_it_is_slow_line_after_line_and_once_in_a_while(meter):
    even, slow = [0.10, 0.11, 0.12, 0.10], [0.10, 0.11, 0.30, 0.10]
    for rank_s in (slow, slow, even, slow, slow):
        assert meter.warn_of_straggler(rank_s) is None
    warning = meter.warn_of_straggler(slow)
    assert "rank 2 is a straggler" in warning
    assert "300 ms, others' 100 ms" in warning
    assert meter.warn_of_straggler(slow) is None
    meter.warned_s -= 601
    assert meter.warn_of_straggler(slow) is not None
    for _ in range(4):
        assert meter.warn_of_straggler([0.10]) is None


def test_a_profile_holds_the_steps_of_its_window(tmp_path):
    profiler = Profiler("2:3", tmp_path, 1)
    for step in range(1, 6):
        with profiler.step(step), torch.profiler.record_function(f"step {step}"):
            torch.ones(2) + 1
    trace = json.loads((tmp_path / "profile" / "rank-1.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {f"step {step}" for step in range(1, 6)} & names == {"step 2", "step 3"}


@pytest.mark.parametrize("tokens", [64, 7])
def test_products_of_experts_are_counted_in_each_form(tokens):
    """With every token at every expert the numbers of rows are known; forward, backward, and two of each."""
    width, hidden, experts = 16, 8, 2
    config = ModelConfig(
        width=width, heads=4, fusion_heads=4, experts=experts, experts_per_token=experts, expert_width=hidden
    )
    module, found = SparseExperts(config), {}
    for form, dtype, grouped_mm in (
        ("loop", torch.bfloat16, False), ("grouped", torch.bfloat16, True), ("oneDNN", torch.float32, False),
    ):  # fmt: skip
        module.to(dtype).block.experts.grouped_mm = grouped_mm
        with flop_counter() as counter:
            module(torch.randn(1, tokens, width, dtype=dtype, requires_grad=True))[0].sum().backward()
        found[form] = counter.get_total_flops()
    router, rows = 3 * 2 * tokens * width * experts, tokens * experts
    expected = 3 * 2 * rows * 3 * width * hidden
    assert found["loop"] == found["grouped"] == router + expected
    if HAS_ONEDNN:
        padded = -(-tokens // ROWS_PER_BLOCK) * ROWS_PER_BLOCK
        assert found["oneDNN"] == router + expected * padded // tokens


@pytest.mark.parametrize("window", ["3", "3:2", "0:2", "a:b", "2:"])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(UserError, match=r"train\.profile"):
        TrainConfig(profile=window)
