"""ZeRO stages, sharded experts, processes and accumulation: none of them changes what is computed."""

import json

import pytest
import torch

from benchmarks.parity_cells import Cell, bare_loop, batch, build, run
from pipeline.config import ROOT, CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig, to_yaml
from pipeline.data.batch import collate
from pipeline.data.stand_in import StandIn
from pipeline.distributed.experts import resolve_expert_parallel
from pipeline.distributed.settings import engine_settings
from pipeline.errors import UserError
from pipeline.model.roadwork import RoadworkModel
from tests.small_run import make_backbone, make_shards, random_labels, small_config
from tests.training.test_training import finish, launch

pytestmark = pytest.mark.dist

# Every stage, placement, number of processes and accumulation, and each pair of a stage and a placement of experts.
CELLS = (
    Cell(3, 1, 1, 2),
    Cell(0, 1, 2, 2),
    Cell(1, 2, 2, 2),
    Cell(2, 1, 2, 1, offload=True),
    Cell(3, 2, 2, 1),
    Cell(0, 2, 4, 1, clip=False),  # with clipping it is refused, see below
    Cell(1, 1, 4, 2),
    Cell(2, 2, 4, 2),
    Cell(3, 4, 4, 1),
    Cell(2, 4, 4, 1, idle=True),
    Cell(1, 1, 1, 2, optimizer="sophia_h"),
    Cell(0, 1, 2, 2, optimizer="sophia_h"),
    Cell(1, 2, 2, 2, optimizer="sophia_h", idle=True),
    Cell(2, 1, 2, 1, optimizer="sophia_g", offload=True),
    Cell(3, 2, 2, 2, optimizer="sophia_g"),
    Cell(2, 2, 4, 1, optimizer="sophia_h"),
    Cell(3, 2, 2, 1, heads=2),
    Cell(1, 2, 2, 1, heads=2, optimizer="sophia_g"),
    Cell(2, 1, 2, 1, heads=2, optimizer="sophia_h"),
)


@pytest.fixture(scope="module")
def curves():
    """Each cell's curve; one start of processes for all cells of a world size."""
    found = {}
    for processes in (1, 2, 4):
        cells = [cell for cell in CELLS if cell.processes == processes]
        found |= dict(zip(cells, run(cells), strict=True))
    return found


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_losses_terms_and_gradient_norms_are_those_of_a_bare_loop(curves, cell):
    expected = bare_loop(cell)
    assert curves[cell].losses[:, 0] == pytest.approx(expected.losses[:, 0], rel=1e-5)
    # Sophia steps as far along a weight of hardly any curvature as along others, whichever way its gradient of nearly 0
    # points: rounding turns some steps of the pruner around.
    assert curves[cell].difference(expected) < (1e-5 if cell.optimizer == "adamw" else 1e-4)
    assert bool(expected.hessian) == (cell.optimizer != "adamw")
    assert curves[cell].hessian_difference(expected, single=False) < 1e-5
    assert curves[cell].hessian_difference(expected, single=True) < 1e-4


def test_the_cells_can_tell_forms_apart():
    """Otherwise nothing above means anything: clipping, and who gets the tokens, show in the curves."""
    usual, free, idle, *sophia = (
        bare_loop(Cell(1, 1, 1, **changes))
        for changes in ({}, {"clip": False}, {"idle": True}, {"optimizer": "sophia_h"}, {"optimizer": "sophia_g"})
    )
    assert usual.difference(bare_loop(Cell(1, 1, 1, heads=2))) > 1e-3
    assert usual.difference(free) > 1e-3
    assert usual.difference(idle) > 1e-3
    assert all(usual.difference(other) > 1e-3 for other in sophia)
    assert sophia[0].difference(sophia[1]) > 1e-3
    assert sophia[0].hessian_difference(sophia[1], single=False) > 1e-1


@torch.inference_mode()
def test_the_idle_experts_are_idle():
    model = build(Cell(1, 1, 1, idle=True)).eval()
    photos = batch(0, range(8), model)
    for logits in model(photos).router_logits:
        assert set(logits.argmax(dim=-1).flatten().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("wanted", "experts", "world_size", "stage", "grad_clip", "why"),
    [
        (2, None, 2, 2, 1.0, "a baseline head has no experts"),
        (3, 4, 3, 2, 1.0, "does not divide the 4 experts"),
        (4, 4, 6, 2, 1.0, "does not divide the 6 processes of this run; choose 1 or 2"),
        (2, 4, 2, 0, 1.0, "ZeRO stage 1, 2 or 3, or optim.grad_clip 0"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(wanted, experts, world_size, stage, grad_clip, why):
    with pytest.raises(UserError, match=why):
        resolve_expert_parallel(wanted, experts, world_size, stage, grad_clip)


def test_products_with_the_hessian_are_refused_where_no_process_has_whole_weights():
    config, file = Config(optim=OptimConfig(name="sophia_h")), ROOT / "ds_configs" / "zero3.json"
    with pytest.raises(UserError, match=r"sophia_h needs ZeRO stage 0, 1 or 2: .* or sophia_g"):
        engine_settings(config, file, 1, "fp32")


def test_zero_0_in_bf16_is_refused():
    with pytest.raises(UserError, match="use stage 1"):
        engine_settings(Config(), ROOT / "ds_configs" / "zero0.json", 1, "bf16")


def test_experts_are_shared_where_they_can_be_and_stay_whole_on_one_process():
    assert resolve_expert_parallel(2, 4, 4, 0, 0.0) == 2
    assert resolve_expert_parallel(4, 4, 8, 3, 1.0) == 4
    assert resolve_expert_parallel(4, 4, 1, 2, 1.0) == 1


def test_another_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr("pipeline.distributed.experts.version", lambda name: "0.20.0")
    from pipeline.distributed.experts import expert_settings

    assert expert_settings(1, "fp32") == {}
    with pytest.raises(UserError, match=r"deepspeed 0\.19\.8, and this is 0\.20\.0"):
        expert_settings(2, "fp32")


def test_a_launched_run_with_zero_3_and_sharded_experts_validates_and_saves_as_one_process_does(tmp_path):
    """Nine photos to validate on two processes: one has more than the other, and waits for nobody."""
    make_shards(tmp_path / "shards", {"train": random_labels(16, 0), "val": random_labels(9, 1)})
    recipe = Config(
        train=TrainConfig(epochs=2, batch_size=8, micro_batch_size=4, log_every=1, wandb=False, expert_parallel=2),
        data=DataConfig(shards=str(tmp_path / "shards"), epoch_share=1.0, workers=0),
        model=small_config(make_backbone(tmp_path / "backbone"), dropout=0.0, metadata_all_dropout=0.0,
                           metadata_field_dropout=0.0, pruning="off"),
        optim=OptimConfig(lr=3e-3),
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=0),
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    usual = (ROOT / "accelerate_configs" / "cpu_2.yaml").read_text()
    (tmp_path / "zero3.yaml").write_text(usual.replace("ds_configs/zero2.json", "ds_configs/zero3.json"))
    _, alone = finish(launch(tmp_path, tmp_path / "alone", processes=1))
    assert "experts    2 per layer, all on every process" in alone
    spread = ["--config_file", str(tmp_path / "zero3.yaml")]
    _, err = finish(launch(tmp_path, tmp_path / "spread", *spread))
    assert "experts    2 per layer, 1 on each of 2 processes" in err
    ours, theirs = (lines(tmp_path / name) for name in ("spread", "alone"))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    models = [RoadworkModel.from_pretrained(tmp_path / name / "model") for name in ("spread", "alone")]
    config = models[0].config
    noise = StandIn(1, config.input_spec, config.text_dim)
    with torch.inference_mode():
        logits = [model(collate([noise[0]])).logits for model in models]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def lines(run_folder):
    """Training steps and validations, in their order."""
    found = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] in ("train", "val")]
