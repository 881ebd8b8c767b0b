"""Grouped products of experts: asked for by the recipe, refused where they cannot be, and not for curvature."""

import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.nn.functional as F

from benchmarks import loops
from benchmarks.parity_cells import BATCH, STEPS, Cell, build, config, ds_settings, micro_batches
from benchmarks.processes import run_apart
from pipeline.config import ROOT, Config, ModelConfig, TrainConfig
from pipeline.distributed.experts import check_grouped_mm
from pipeline.distributed.settings import engine_settings
from pipeline.errors import UserError
from pipeline.training.plan import Schedule

LAYERS = 2


@pytest.mark.parametrize(
    ("grouped_mm", "changes", "size", "precision", "why"),
    [
        (True, {"expert_width": 100}, 1, "fp32", r"train\.grouped_mm needs multiples of 8 .* 512 and 100; .* false"),
        (True, {"width": 36, "heads": 1, "fusion_heads": 1}, 1, "bf16", "which are 36 and 2048"),
        (False, {"expert_width": 100}, 2, "bf16", r"train\.expert_parallel in bf16 needs multiples .* to 1$"),
        (True, {"head": "mean_pool"}, 1, "bf16", "this head has no experts"),
        (True, {"experts": 1, "experts_per_token": 1}, 1, "bf16", "this head has no experts"),
    ],
)
def test_what_grouped_products_cannot_do_is_refused_with_the_reason(grouped_mm, changes, size, precision, why):
    with pytest.raises(UserError, match=why):
        check_grouped_mm(grouped_mm, ModelConfig(**changes), size, precision)


def test_other_widths_are_only_refused_where_grouped_products_have_to_do_with_them():
    odd = ModelConfig(expert_width=100)
    check_grouped_mm(False, odd, 1, "bf16")
    check_grouped_mm(False, odd, 2, "fp32")
    check_grouped_mm(True, ModelConfig(), 2, "bf16")
    check_grouped_mm(False, ModelConfig(head="mean_pool"), 1, "bf16")


@pytest.mark.parametrize(("key", "value"), [("grouped_mm", True), ("expert_parallel", 2)])
def test_training_refuses_them_before_it_starts(key, value):
    recipe = Config(train=TrainConfig(**{key: value}), model=ModelConfig(expert_width=100))
    with pytest.raises(UserError, match=rf"train\.{key}.* needs multiples of 8"):
        engine_settings(recipe, ROOT / "ds_configs" / "zero2.json", 2, "bf16")


def calls(grouped_mm):
    """Grouped products in an estimate by sophia_h, and in the step after it."""
    cell = Cell(2, 1, 1, optimizer="sophia_h")
    recipe = config(cell)
    recipe.train.grouped_mm = grouped_mm
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "deepspeed.json"
        file.write_text(json.dumps(ds_settings(cell)))
        trainer = loops.make_trainer(recipe, build(cell), file, Schedule(BATCH, STEPS, frozenset()))
    parts = micro_batches(cell, trainer, 0)
    counts, _, _ = trainer._agree(parts, None)
    with patch("torch.nn.functional.grouped_mm", wraps=F.grouped_mm) as product:
        trainer.hessian.take(0, parts, counts, False)
        in_estimate = product.call_count
        trainer.state.step = 1  # without an estimate
        trainer._take_step(parts, counts)
    return in_estimate, product.call_count - in_estimate


@pytest.mark.dist
def test_a_step_multiplies_in_groups_where_the_recipe_says_so_and_an_estimate_never_does():
    assert run_apart(calls, 1, True) == (0, 2 * LAYERS)
    assert run_apart(calls, 1, False) == (0, 0)
