"""The trunk as a whole: what a pruner's gate and a cell's place do to the answer, and what version 1 computed."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from pipeline.model.config import LossConfig
from pipeline.model.trunk import Trunk
from pipeline.model.version_1 import TrunkV1
from tests.model.synthetic import DIM, VIEWS, all_views, learner, photos, train
from tests.small_run import small_config


def of_version(version, **sizes):
    torch.manual_seed(0)
    config = small_config("none", **{"metadata": (), "dropout": 0.0, **sizes})
    return (TrunkV1 if version == 1 else Trunk)(config, DIM).double().eval()


def in_float64(encoded):
    tensors = {name: getattr(encoded, name) for name in ("cls", "cells", "boxes", "gates")}
    return replace(encoded, **{name: tensor.double() for name, tensor in tensors.items()})


def answer(trunk, encoded):
    fields = dict.fromkeys(("gps", "weather", "daytime", "scene", "text"))
    return trunk(encoded, fields, True)


# Cells' places


def with_quarters_swapped(encoded):
    """The same views, each with its cells in the reverse order; CLS and boxes stay."""
    return replace(encoded, cells=encoded.cells.flip(2))


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_where_a_cell_is_in_its_view_matters_but_not_in_version_1(seed):
    encoded = in_float64(all_views(photos(4, seed)))
    moved = {}
    for version in (1, 2):
        trunk = of_version(version, evidence=False)
        before, after = answer(trunk, encoded), answer(trunk, with_quarters_swapped(encoded))
        moved[version] = (after.logits - before.logits).abs().max().item()
    assert moved[1] < 1e-12
    assert moved[2] > 1e-4


# The pruner's gates


@torch.no_grad()
def test_a_lower_gate_moves_the_answer_towards_that_without_the_view():
    """Version 1 gates the tokens, which the first layer's norm undoes: its keys and values hardly move."""
    encoded = in_float64(all_views(photos(4, seed=0)))
    closed = replace(encoded, gates=torch.cat([torch.ones(4, 1), torch.full((4, VIEWS - 1), 0.1)], dim=1).double())
    trunk, seen = of_version(1), []
    trunk.layers[0].attention.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    answer(trunk, encoded), answer(trunk, closed)
    assert (seen[1] - seen[0]).abs().max() < 1e-3 * seen[0].abs().max()
    alone = replace(encoded, mask=torch.arange(VIEWS).expand(4, -1) < 1)
    trunk = of_version(2, evidence=False, fusion="mean")
    vectors = torch.randn(4, VIEWS, 32).double()
    fused = [trunk.fuse(vectors, state)[0] for state in (encoded, closed, alone)]
    assert (fused[1] - fused[2]).norm() < 0.6 * (fused[0] - fused[2]).norm()


def slope_and_change(model, batch):
    """-d z / d log gate of each view but the global, and z without the view less z with it, over photos and views."""
    encoded = model.encode(batch, keep_all=True)
    gates = encoded.gates.detach().requires_grad_()
    z = model.log_odds(model.answer(replace(encoded, gates=gates)))
    (gradient,) = torch.autograd.grad(z.sum(), gates)
    closed = replace(encoded, gates=gates.detach())
    with torch.no_grad():
        without = [
            model.log_odds(model.answer(replace(closed, mask=encoded.mask & (torch.arange(VIEWS) != view))))
            for view in range(1, VIEWS)
        ]
    changes = torch.stack(without, dim=1) - z.detach()[:, None]
    return -(gates * gradient)[:, 1:].detach().flatten().numpy(), changes.flatten().numpy()


def test_the_slope_in_a_views_gate_foretells_what_leaving_the_view_out_does():
    """The gate's derivative is all that the roadwork loss tells the pruner, so its sign has to be right."""
    found = {}
    for version in (1, 2):
        pairs = [
            slope_and_change(train(learner(seed, version=version, evidence=False), 60), photos(48, 999))
            for seed in range(3)
        ]
        found[version] = [spearmanr(*pair)[0] for pair in pairs]
    assert min(found[2]) > 0.7
    assert max(found[1]) < min(found[2])


@pytest.mark.parametrize("fusion", ["gated", "mean"])
@torch.no_grad()
def test_a_gate_of_zero_is_the_same_as_leaving_the_view_out(fusion):
    encoded, trunk = in_float64(all_views(photos(4, seed=0))), of_version(2, evidence=False, fusion=fusion)
    closed, masked = encoded.gates.clone(), encoded.mask.clone()
    closed[:, [3, 7]], masked[:, [3, 7]] = 0.0, False
    found, expected = answer(trunk, replace(encoded, gates=closed)), answer(trunk, replace(encoded, mask=masked))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(answer(trunk, encoded).logits, expected.logits, rtol=1e-3)


def test_the_roadwork_loss_alone_teaches_the_pruner_while_views_are_pruned():
    terms = {"distillation": 0.0, "consistency": 0.0, "segmentation": 0.0, "weather": 0.0, "balance": 0.0}
    model = learner(0, LossConfig(**terms, router_z=0.0, evidence=0.0, evidence_masks=0.0)).train()
    output = model(photos(8, seed=1), with_loss=True)
    assert output.view_indices.shape[1] == 6 < VIEWS
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.encoder.pruner.named_parameters()}
    assert gradients
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())


# Version 1


def test_both_versions_have_the_same_parameters_and_the_evidence_adds_its_own():
    first, second, without = (
        {name: tuple(p.shape) for name, p in trunk.named_parameters()}
        for trunk in (of_version(1), of_version(2), of_version(2, evidence=False))
    )
    assert first == second
    assert {name: shape for name, shape in second.items() if not name.startswith("evidence.")} == without
    assert first != without
