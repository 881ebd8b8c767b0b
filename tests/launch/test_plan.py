"""Pairs of configurations and a recipe, resolved or refused with the reason."""

import itertools
import json
from pathlib import Path

import pytest
import yaml

from pipeline.config import Config, OptimConfig, TrainConfig
from pipeline.distributed.settings import describe_engine
from pipeline.errors import UserError
from pipeline.launch.plan import resolve
from pipeline.model.config import ModelConfig

ROOT = Path(__file__).parents[2]
ACCELERATE = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))
LAUNCH = {
    "distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "zero.json"}, "num_machines": 1,
    "num_processes": 2, "use_cpu": False,
}  # fmt: skip
ZERO = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}


def pair(folder: Path, launch: dict | None = None, zero: dict | None = None) -> Path:
    """Write a pair of files; returns the accelerate one."""
    (folder / "zero.json").write_text(json.dumps({**ZERO, **(zero or {})}))
    values = {**LAUNCH, "deepspeed_config": {"deepspeed_config_file": str(folder / "zero.json")}, **(launch or {})}
    (folder / "launch.yaml").write_text(yaml.safe_dump(values))
    return folder / "launch.yaml"


@pytest.mark.parametrize(
    ("accelerate", "deepspeed"), list(itertools.product(ACCELERATE, DEEPSPEED)), ids=lambda path: path.stem
)
def test_every_ready_file_goes_with_every_other(tmp_path, accelerate, deepspeed):
    values = yaml.safe_load(accelerate.read_text())
    values["deepspeed_config"]["deepspeed_config_file"] = str(deepspeed)
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(values))
    precision = "fp32" if deepspeed.stem == "zero0" else "bf16"
    plan = resolve(Config(), tmp_path / "launch.yaml", None, None, precision)
    batching = plan.engine.batching
    assert plan.world_size == values["num_processes"]
    assert plan.world_size * batching.micro_batch_size * batching.accumulation == 64
    assert plan.engine.deepspeed["train_micro_batch_size_per_gpu"] == batching.micro_batch_size
    assert plan.engine.deepspeed["gradient_accumulation_steps"] == batching.accumulation
    assert plan.engine.deepspeed["gradient_clipping"] == 1.0
    assert plan.engine.deepspeed["bf16"] == {"enabled": precision == "bf16"}
    assert (
        f"stage {json.loads(deepspeed.read_text())['zero_optimization']['stage']}"
        in dict(describe_engine(plan.engine, Config()))["zero"]
    )


def test_the_command_line_has_the_last_word_on_processes_and_experts_are_placed(tmp_path):
    config = Config(train=TrainConfig(expert_parallel=2))
    plan = resolve(config, pair(tmp_path, {"num_processes": 2}), None, 8, "fp32")
    assert (plan.world_size, plan.engine.sharding.expert_parallel) == (8, 2)
    assert plan.engine.deepspeed["expert_parallel"]["autoep_size"] == 2
    told = dict(describe_engine(plan.engine, config))
    assert told["experts"] == "4 per layer, 2 on each of 2 processes, in 4 such groups"


def test_what_gives_way_is_said(tmp_path):
    config = Config(train=TrainConfig(expert_parallel=4))
    plan = resolve(config, pair(tmp_path, {"num_processes": 1}, {"gradient_clipping": 5}), None, None, "fp32")
    assert plan.engine.deepspeed["gradient_clipping"] == config.optim.grad_clip
    assert plan.engine.notes == (
        "gradient_clipping of zero.json is not used: the recipe decides it",
        "train.expert_parallel is 4, but one process alone keeps all experts",
    )


@pytest.mark.parametrize(
    ("launch", "zero", "sentence"),
    [
        ({"distributed_type": "MULTI_GPU"}, {}, "distributed_type is 'MULTI_GPU'"),
        ({"use_cpu": True}, {}, "turns DeepSpeed off"),
        ({"deepspeed_config": {}}, {}, "no deepspeed_config_file"),
        ({"mixed_precision": "bf16"}, {}, "mixed_precision must not stand"),
        ({"num_machines": 2, "num_processes": 3}, {}, "3 processes cannot be shared evenly among the 2 machines"),
        ({"num_processes": 3}, {}, "choose 63 or 66"),
        ({}, {"zero_optimization": {"stage": 4}}, "stage is 4"),
        ({}, {"zero_optimization": {"stage": 0}}, "use stage 1"),
        ({}, {"optimizer": {"type": "Adam"}}, "it has the section optimizer"),
        ({}, {"scheduler": {"type": "WarmupLR"}}, "it has the section scheduler"),
        ({}, {"elasticity": {}}, "it has the section elasticity"),
        ({}, {"fp16": {"enabled": True}}, "fp16 is enabled"),
        ({}, {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "reduce_bucket_size is 'auto'"),
        ({}, {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
        ({}, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "zero_force_ds_cpu"),
        ({}, {"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer must be true"),
    ],
)  # fmt: skip
def test_a_pair_that_does_not_work_is_refused_with_the_reason(tmp_path, launch, zero, sentence):
    with pytest.raises(UserError) as error:
        resolve(Config(), pair(tmp_path, launch, zero), None, None, "bf16")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("config", "stage", "sentence"),
    [
        (Config(train=TrainConfig(expert_parallel=3)), 2, "does not divide the 4 experts"),
        (Config(train=TrainConfig(expert_parallel=4)), 2, "does not divide the 2 processes"),
        (Config(train=TrainConfig(expert_parallel=2), model=ModelConfig(head="single_view")), 2, "has no experts"),
        (Config(train=TrainConfig(expert_parallel=2), optim=OptimConfig(grad_clip=1.0)), 0, "stage"),
    ],
)
def test_experts_that_cannot_be_placed_are_refused_as_training_refuses_them(tmp_path, config, stage, sentence):
    with pytest.raises(UserError) as error:
        resolve(config, pair(tmp_path, {}, {"zero_optimization": {"stage": stage}}), None, None, "fp32")
    assert sentence in str(error.value)


def test_products_with_the_hessian_are_refused_at_stage_3_and_drawn_labels_are_not(tmp_path):
    files = pair(tmp_path, {}, {"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=r"sophia_h needs ZeRO stage 0, 1 or 2: .* sophia_g"):
        resolve(Config(optim=OptimConfig(name="sophia_h")), files, None, None, "fp32")
    assert resolve(Config(optim=OptimConfig(name="sophia_g")), files, None, None, "fp32").engine.sharding.stage == 3


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.yaml"):
        resolve(Config(), tmp_path / "none.yaml", None, None, "bf16")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="does not hold keys with values"):
        resolve(Config(), tmp_path / "list.yaml", None, None, "bf16")
    with pytest.raises(UserError, match="cannot read the DeepSpeed configuration"):
        resolve(
            Config(), pair(tmp_path, {"deepspeed_config": {"deepspeed_config_file": "gone.json"}}), None, None, "bf16"
        )
