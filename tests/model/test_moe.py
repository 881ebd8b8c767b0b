import numpy as np
import pytest
import torch

from pipeline.model.config import ModelConfig
from pipeline.model.moe import SparseExperts, balance_loss, build_feed_forward, z_loss
from tests.model.reference import sparse_experts


def experts_of(top_k=2, width=16):
    torch.manual_seed(0)
    config = ModelConfig(width=width, heads=4, fusion_heads=4, experts=4, experts_per_token=top_k, expert_width=24)
    return SparseExperts(config)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_experts_equal_their_transcription(top_k, training):
    module = experts_of(top_k).double().train(training)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 6, 16).double()
    update, logits = module(x)
    for image in range(3):
        expected, expected_logits = sparse_experts(module, x[image], top_k)
        # The router's softmax is fp32 whatever the input.
        torch.testing.assert_close(update[image], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits[image], expected_logits)


def test_every_weight_is_initialised():
    module = experts_of(width=64)
    for parameter in module.parameters():
        assert parameter.mean().abs() < 0.005
        assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    router = module.block.gate.weight
    assert torch.cdist(router, router).fill_diagonal_(1).min() > 0.05, "tied experts would never part"


def test_an_expert_that_no_token_chose_gets_a_gradient_of_zeros():
    module = experts_of(top_k=1).train()
    update, logits = module(torch.randn(1, 1, 16))
    update.sum().backward()
    chosen = logits.argmax()
    for parameter in module.block.experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad.flatten(1).any(dim=1).nonzero().tolist() == [[chosen]]


def test_logits_are_handed_on_with_their_graph():
    module = experts_of()
    _, logits = module(torch.randn(2, 5, 16))
    z_loss(logits, torch.ones(2, 5, dtype=torch.bool)).sum().backward()
    assert module.block.gate.weight.grad.abs().sum() > 0


def random_routing(batch=6, tokens=9, experts=4):
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(batch, tokens, experts, generator=generator).double()
    mask = torch.rand(batch, tokens, generator=generator) < 0.7
    mask[:, 0] = True
    return logits, mask


@pytest.mark.parametrize("top_k", [1, 2])
def test_losses_equal_their_formulas_on_each_image(top_k):
    logits, mask = random_routing()
    ours = balance_loss(logits, mask, top_k), z_loss(logits, mask)
    for image in range(len(logits)):
        rows = logits[image][mask[image]].numpy()
        probability = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
        assigned = np.zeros(4)
        for row in rows:
            assigned[np.argsort(row)[-top_k:]] += 1
        balance = 4 * np.sum(assigned / assigned.sum() * probability.mean(axis=0))
        assert ours[0][image].item() == pytest.approx(balance, rel=1e-12)
        z = np.mean(np.log(np.exp(rows).sum(axis=1)) ** 2)
        assert ours[1][image].item() == pytest.approx(z, rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_is_one_when_even_and_grows_when_not(top_k):
    mask = torch.ones(1, 4, dtype=torch.bool)
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0])
    even = torch.stack([scores.roll(shift) for shift in range(4)])[None]
    assert balance_loss(even, mask, top_k).item() == pytest.approx(1.0)
    same = scores.expand(1, 4, 4)
    assert balance_loss(same, mask, top_k).item() > 1.2


def test_one_expert_for_all_costs_as_much_as_there_are_experts():
    logits = torch.tensor([100.0, 0.0, 0.0, 0.0]).expand(1, 5, 4)
    assert balance_loss(logits, torch.ones(1, 5, dtype=torch.bool), 1).item() == pytest.approx(4.0)


@pytest.mark.parametrize("loss", [lambda *a: balance_loss(*a, 2), z_loss], ids=["balance", "z"])
def test_splitting_a_batch_changes_no_images_loss(loss):
    logits, mask = random_routing()
    parts = [loss(logits[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 3), slice(3, 6))]
    assert torch.equal(loss(logits, mask), torch.cat(parts))


@pytest.mark.parametrize("loss", [lambda *a: balance_loss(*a, 2), z_loss], ids=["balance", "z"])
def test_masked_tokens_do_not_count(loss):
    logits, mask = random_routing()
    changed = torch.where(mask[..., None], logits, -7 * logits + 1)
    assert torch.equal(loss(logits, mask), loss(changed, mask))


def test_the_balance_loss_pulls_probability_from_the_crowded_expert():
    logits = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(1, 5, 1).requires_grad_()
    balance_loss(logits, torch.ones(1, 5, dtype=torch.bool), 1).sum().backward()
    assert (logits.grad[..., 0] > 0).all()
    assert (logits.grad[..., 1:] < 0).all()


def test_one_expert_is_a_dense_swiglu_without_a_router():
    torch.manual_seed(0)
    config = ModelConfig(width=16, heads=4, fusion_heads=4, experts=1, experts_per_token=1, expert_width=24)
    module = build_feed_forward(config).double()
    x = torch.randn(3, 6, 16).double()
    update, logits = module(x)
    gate, up, down = (p.detach().numpy() for p in module.parameters())
    hidden = x.numpy() @ gate.T
    expected = (hidden / (1 + np.exp(-hidden)) * (x.numpy() @ up.T)) @ down.T
    np.testing.assert_allclose(update.detach().numpy(), expected, atol=1e-12)
    assert logits is None
