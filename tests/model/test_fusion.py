import numpy as np
import pytest
import torch

from pipeline.model.config import ModelConfig
from pipeline.model.fusion import GatedFusion, build_fusion
from tests.model.reference import multihead_attention, sigmoid, silu


@pytest.fixture
def fusion():
    torch.manual_seed(0)
    module = GatedFusion(width=32, heads=4)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


VIEWS = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1))
PRUNER = torch.rand(3, 6, generator=torch.Generator().manual_seed(2))
MASK = torch.arange(6) < torch.tensor([[6], [4], [1]])


def test_fusion_equals_its_equations(fusion):
    fusion.double()
    fused, gates = fusion(VIEWS.double(), MASK, PRUNER.double())
    first, last = fusion.gate[0], fusion.gate[2]
    assert (first.in_features, first.out_features, last.out_features) == (32, 8, 1)
    for image in range(3):
        x, keep = VIEWS[image].double(), MASK[image]
        g = sigmoid(silu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias).squeeze(-1) * keep
        share = keep * PRUNER[image].double()  # the factor of exp(logit) that adding its logarithm gives
        c = x + multihead_attention(fusion.cross, x, share)
        r = c + multihead_attention(fusion.refine, c, share)
        torch.testing.assert_close(gates[image], g)
        w = g * PRUNER[image].double()
        torch.testing.assert_close(fused[image], (w[:, None] * r).sum(dim=0) / (w.sum() + 1e-6))


@pytest.mark.parametrize("inference", [True, False])
def test_views_that_do_not_exist_are_irrelevant(fusion, inference):
    """Also on the fast path that PyTorch takes in inference alone."""
    fusion.train(not inference)
    with torch.inference_mode(inference):
        before = fusion(VIEWS, MASK, PRUNER)
        after = fusion(torch.where(MASK[..., None], VIEWS, 50 * VIEWS - 3), MASK, PRUNER)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


def test_inference_equals_training(fusion):
    training = fusion.train()(VIEWS, MASK, PRUNER)
    with torch.inference_mode():
        inference = fusion.eval()(VIEWS, MASK, PRUNER)
    for a, b in zip(training, inference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gates_are_importance_between_zero_and_one_and_zero_where_masked(fusion):
    _, gates = fusion(VIEWS, MASK, PRUNER)
    assert ((gates > 0) == MASK).all()
    assert (gates < 1).all()


def test_the_order_of_views_is_irrelevant(fusion):
    order = torch.tensor([2, 5, 0, 3, 1, 4])
    fused, gates = fusion(VIEWS, MASK, PRUNER)
    permuted, permuted_gates = fusion(VIEWS[:, order], MASK[:, order], PRUNER[:, order])
    torch.testing.assert_close(permuted, fused)
    torch.testing.assert_close(permuted_gates, gates[:, order])


def test_a_photo_without_importance_anywhere_stays_finite(fusion):
    fusion.gate[2].bias.data.fill_(-200.0)
    fused, _ = fusion(VIEWS, MASK, PRUNER)
    fused.sum().backward()
    assert fused.isfinite().all()
    assert all(p.grad.isfinite().all() for p in fusion.parameters())


def test_the_mean_is_over_existing_views_alone_under_the_pruners_gates():
    fused, importance = build_fusion(ModelConfig(fusion="mean"))(VIEWS, MASK, PRUNER)
    for image in range(3):
        views, weights = VIEWS[image][MASK[image]].numpy(), PRUNER[image][MASK[image]].numpy()
        np.testing.assert_allclose(fused[image], np.average(views, axis=0, weights=weights), rtol=1e-5)
    assert importance is None


@pytest.mark.parametrize("kind", ["gated", "mean"])
def test_a_pruner_gate_of_zero_leaves_a_view_out_of_the_sum(kind):
    """The fusion's attention still sees the view, so for `gated` the rest is not that of a masked view."""
    torch.manual_seed(0)
    fusion = build_fusion(ModelConfig(fusion=kind, width=32, fusion_heads=4, heads=4))
    gates = torch.ones(3, 6)
    gates[0, 2] = 0.0
    fused, _ = fusion(VIEWS, MASK, gates.requires_grad_())
    moved = VIEWS.clone()
    moved[0, 2] += 1.0
    again, _ = fusion(moved, MASK, gates)
    assert kind == "gated" or torch.equal(fused, again)
    fused.sum().backward()
    assert ((gates.grad != 0) == MASK)[:2].all()  # the third photo's only view has all the weight at any gate
