"""What the engine of a run gets, and that training itself refuses what cannot work, before any process joins."""

from __future__ import annotations

import json

import pytest

from pipeline import train as room
from pipeline.config import RECIPES, ROOT, Config, OptimConfig, TrainConfig, read_config
from pipeline.distributed.settings import (
    DEFAULT_DEEPSPEED,
    Sharding,
    describe_engine,
    engine_settings,
    launched_file,
    read_deepspeed,
    resolve_precision,
)
from pipeline.errors import UserError
from pipeline.model.config import LossConfig, ModelConfig
from pipeline.train import train

ZERO = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


class Begun(Exception):
    """Training would start, with this engine."""

    def __init__(self, engine):
        super().__init__("the processes join")
        self.engine = engine


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Train with a DeepSpeed file, as far as the start of the processes; returns the engine's settings."""

    def start(engine, log_with, hang_minutes):
        raise Begun(engine)

    def until_start(zero=None, config=None, processes=2, bf16=True, text=None):
        path = tmp_path / "zero.json"
        path.write_text(json.dumps({**ZERO, **(zero or {})}) if text is None else text)
        monkeypatch.setattr(room, "start", start)
        monkeypatch.setattr(room, "has_bf16", lambda: bf16)
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        config = config or Config()
        config.data.shards = str(tmp_path / "none")
        with pytest.raises(Begun) as begun:
            train(config, dry_run=True)
        return begun.value.engine

    return until_start


FAULTS = {
    "a stage that is none": ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage is 4, but must be 0, 1"),
    "a stage in words": ({"zero_optimization": {"stage": "2"}}, r"zero_optimization\.stage is '2', but must be 0"),
    "bf16 at stage 0": ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0, where bf16 weights have no .* use stage 1"),
    "an optimizer": ({"optimizer": {"type": "Adam"}}, "it has the section optimizer, but the recipe's own"),
    "a scheduler": ({"scheduler": {"type": "WarmupLR"}}, "it has the section scheduler, but the recipe's own"),
    **{
        f"the removed section {name}": ({name: {}}, f"it has the section {name}, which DeepSpeed .* no longer knows")
        for name in ("amp", "eigenvalue", "elasticity", "nebula")
    },
    "a section that is none": ({"zero_optimization": 2}, "zero_optimization is 2, but must be an object"),
    "a section within": ({"zero_optimization": {"offload_optimizer": None}}, "offload_optimizer is None, but must be"),
    "a stage as a switch": ({"zero_optimization": {"stage": True}}, "stage is True, but must be 0, 1, 2 or 3"),
    "fp16 as a switch": ({"fp16": True}, "fp16 is True, but must be an object"),
    "fp16": ({"fp16": {"enabled": True}}, r"fp16 is enabled, whose loss scaling .* train\.precision is bf16 or fp32"),
    "auto in ZeRO": (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
        "reduce_bucket_size is 'auto', which is not resolved here; write a number",
    ),
    "auto beside ZeRO": ({"steps_per_print": "auto"}, "steps_per_print is 'auto', which is not resolved here"),
    "offloaded weights": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "offload_param needs stage 3, and this is stage 2",
    ),
    "an offloaded optimizer at stage 0": (
        {"zero_optimization": {"stage": 0, **OFFLOAD}, "zero_force_ds_cpu_optimizer": False},
        "offload_optimizer needs stage 1, 2 or 3, and this is stage 0",
    ),
    "an offloaded optimizer that is DeepSpeed's": (
        {"zero_optimization": {"stage": 2, **OFFLOAD}},
        "offload_optimizer with the recipe's optimizer needs zero_force_ds_cpu_optimizer: false",
    ),
    "fp32 sums at stage 1": (
        {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
        r"data_types\.grad_accum_dtype fp32 at ZeRO stage 1, which does not work in bf16; use stage 2",
    ),
    "an untested optimizer": (
        {"zero_allow_untested_optimizer": False},
        "zero_allow_untested_optimizer must be true, or DeepSpeed refuses the recipe's optimizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("zero", "sentence"), FAULTS.values(), ids=FAULTS)
def test_training_refuses_a_deepspeed_file_that_does_not_work_with_the_reason(begin, zero, sentence):
    with pytest.raises(UserError, match=sentence) as refusal:
        begin(zero)
    assert "\n" not in str(refusal.value)


COMBINATIONS = {
    "mixup with one photo": (
        {}, Config(loss=LossConfig(mixup_alpha=0.2), train=TrainConfig(micro_batch_size=1)), 2, True,
        r"loss\.mixup_alpha is 0\.2, but each forward pass has one photo",
    ),
    "second derivatives at stage 3": (
        {"zero_optimization": {"stage": 3}}, Config(optim=OptimConfig(name="sophia_h")), 2, True,
        "sophia_h needs ZeRO stage 0, 1 or 2: .* sophia_g",
    ),
    "experts over a number that does not divide them": (
        {}, Config(train=TrainConfig(expert_parallel=3)), 3, True, "does not divide the 4 experts of a layer",
    ),
    "experts over a number that does not divide the processes": (
        {}, Config(train=TrainConfig(expert_parallel=4)), 2, True, "does not divide the 2 processes .* choose 1 or 2",
    ),
    "experts of a baseline": (
        {}, Config(train=TrainConfig(expert_parallel=2), model=ModelConfig(head="single_view")), 2, True,
        "a baseline head has no experts; set it to 1",
    ),
    "experts that are clipped at stage 0": (
        {"zero_optimization": {"stage": 0}}, Config(train=TrainConfig(expert_parallel=2)), 2, False,
        r"train\.expert_parallel needs ZeRO stage 1, 2 or 3, or optim\.grad_clip 0",
    ),
    "a batch that cannot be shared": ({}, Config(), 3, True, r"train\.batch_size is 64, .* choose 63 or 66"),
}  # fmt: skip


@pytest.mark.parametrize(("zero", "config", "processes", "bf16", "sentence"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_training_refuses_a_recipe_that_does_not_go_with_its_file_or_processes(
    begin, zero, config, processes, bf16, sentence
):
    if "batch" not in sentence and processes == 3:
        config.train.batch_size = 63
    with pytest.raises(UserError, match=sentence):
        begin(zero, config, processes, bf16)


@pytest.mark.parametrize(
    ("zero", "config", "processes", "bf16"),
    [
        ({}, Config(loss=LossConfig(mixup_alpha=0.2), train=TrainConfig(micro_batch_size=2)), 2, True),
        ({}, Config(train=TrainConfig(micro_batch_size=1)), 2, True),
        ({"zero_optimization": {"stage": 3}}, Config(optim=OptimConfig(name="sophia_g")), 2, True),
        ({"zero_optimization": {"stage": 2}}, Config(optim=OptimConfig(name="sophia_h")), 2, True),
        ({"zero_optimization": {"stage": 0}, "zero_allow_untested_optimizer": False}, Config(), 2, False),
        ({"zero_optimization": {"stage": 2, **OFFLOAD}, "zero_force_ds_cpu_optimizer": False}, Config(), 2, True),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, Config(), 2, True),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}}, Config(), 2, True),
        ({"fp16": {"enabled": False}}, Config(), 2, True),
        ({"gradient_clipping": "auto", "train_batch_size": "auto", "bf16": {"enabled": False}}, Config(), 2, True),
    ],
)
def test_what_works_is_not_refused(begin, zero, config, processes, bf16):
    assert begin(zero, config, processes, bf16).precision == ("bf16" if bf16 else "fp32")


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_training_refuses_a_file_that_is_none(begin, text):
    with pytest.raises(UserError, match=r"DeepSpeed configuration .*zero\.json"):
        begin(text=text)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"cannot read the DeepSpeed configuration .*gone\.json .*deepspeed_config_file"
    ):
        read_deepspeed(tmp_path / "gone.json")


def test_training_gives_the_engine_the_files_values_and_the_recipes_numbers(begin, tmp_path):
    """Batch, clipping and precision are the recipe's whatever the file says; what gives way is said."""
    given = {
        "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 1000}, "steps_per_print": 7,
        "gradient_clipping": 5.0, "bf16": {"enabled": False},
    }  # fmt: skip
    config = Config(train=TrainConfig(batch_size=48, micro_batch_size=5), optim=OptimConfig(grad_clip=0.25))
    engine = begin(given, config, processes=4)
    assert engine.file == tmp_path / "zero.json"
    # A process's share is 12; the largest micro-batch up to 5 that divides it is 4, three times.
    assert (engine.batching.batch_size, engine.batching.micro_batch_size, engine.batching.accumulation) == (48, 4, 3)
    assert engine.deepspeed == {
        **given, "zero_allow_untested_optimizer": True, "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3, "gradient_clipping": 0.25, "bf16": {"enabled": True},
    }  # fmt: skip
    assert engine.sharding == Sharding(world_size=4, stage=1, bucket=2000, live=10**9)
    assert engine.notes == (
        "gradient_clipping of zero.json is not used: the recipe decides it",
        "bf16 of zero.json is not used: the recipe decides it",
    )  # fmt: skip
    assert json.loads((tmp_path / "zero.json").read_text())["gradient_clipping"] == 5.0


@pytest.mark.parametrize(("processes", "size"), [(1, 1), (2, 2), (4, 2)])
def test_experts_are_shared_as_the_recipe_says_and_one_process_keeps_them_with_a_note(begin, processes, size):
    config = Config(train=TrainConfig(expert_parallel=2))
    engine = begin(config=config, processes=processes)
    assert engine.sharding.expert_parallel == size
    section = engine.deepspeed.get("expert_parallel", {})
    assert (section.get("autoep_size", 1), section.get("use_grouped_mm", True)) == (size, True)
    alone = ("train.expert_parallel is 2, but one process alone keeps all experts",)
    assert engine.notes == (alone if processes == 1 else ())
    told = dict(describe_engine(engine, config))["experts"]
    assert told == {
        1: "4 per layer, all on every process",
        2: "4 per layer, 2 on each of 2 processes",
        4: "4 per layer, 2 on each of 2 processes, in 2 such groups",
    }[processes]  # fmt: skip


def test_the_full_run_shares_its_experts_and_no_other_recipe_does():
    """Shared experts gain nothing while a head fits on one GPU; that run is where they are shown to work."""
    shared = {path.stem: read_config(path).train.expert_parallel for path in RECIPES.glob("*.yaml")}
    assert shared.pop("pretrain_30ep") == 2
    assert "cached_30ep" in shared
    assert set(shared.values()) == {1}


def test_sharded_experts_in_fp32_are_computed_by_the_loop_over_them(begin):
    engine = begin(config=Config(train=TrainConfig(expert_parallel=2)), bf16=False)
    assert engine.deepspeed["expert_parallel"]["use_grouped_mm"] is False
    assert engine.deepspeed["bf16"] == {"enabled": False}


HARDWARE = {"no GPU": (False, False), "an old GPU": (True, False), "a GPU that computes in bf16": (True, True)}
PRECISIONS = {
    ("auto", "no GPU"): "fp32",
    ("auto", "an old GPU"): "fp32",
    ("auto", "a GPU that computes in bf16"): "bf16",
    ("fp32", "no GPU"): "fp32",
    ("fp32", "an old GPU"): "fp32",
    ("fp32", "a GPU that computes in bf16"): "fp32",
    ("bf16", "no GPU"): None,
    ("bf16", "an old GPU"): None,
    ("bf16", "a GPU that computes in bf16"): "bf16",
}


@pytest.mark.parametrize(("wanted", "hardware"), PRECISIONS)
def test_precision_follows_the_recipe_and_the_hardware(wanted, hardware, tmp_path, monkeypatch):
    """Through training: the same table holds for `resolve_precision` alone."""
    present, computes = HARDWARE[hardware]
    monkeypatch.setattr("torch.cuda.is_available", lambda: present)
    # A GPU without bf16 emulates it, slowly; by default torch counts that as support.
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or computes
    )

    def start(engine, log_with, hang_minutes):
        raise Begun(engine)

    monkeypatch.setattr(room, "start", start)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    config = Config(train=TrainConfig(precision=wanted))
    config.data.shards = str(tmp_path / "none")
    expected = PRECISIONS[wanted, hardware]
    if expected is None:
        refusal = r"train\.precision is 'bf16', but no GPU here computes in it; use 'auto' or 'fp32'"
        with pytest.raises(UserError, match=refusal):
            train(config, dry_run=True)
        with pytest.raises(UserError, match=refusal):
            resolve_precision(wanted, computes)
        return
    with pytest.raises(Begun) as begun:
        train(config, dry_run=True)
    assert begun.value.engine.precision == expected == resolve_precision(wanted, computes)
    assert begun.value.engine.deepspeed["bf16"] == {"enabled": expected == "bf16"}


def test_a_relative_file_is_the_projects_own_wherever_the_command_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    assert launched_file() == ROOT / DEFAULT_DEEPSPEED
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds_configs/zero3.json")
    assert launched_file() == ROOT / "ds_configs" / "zero3.json"
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text("{}")
    assert launched_file().samefile(tmp_path / "ds_configs" / "zero3.json")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json")))
def test_every_ready_file_makes_an_engine(name):
    precision = "fp32" if name == "zero0" else "bf16"
    engine = engine_settings(Config(), ROOT / "ds_configs" / f"{name}.json", 2, precision)
    assert engine.sharding.stage == int(name[4])
    assert engine.sharding.offload == name.endswith("offload")
