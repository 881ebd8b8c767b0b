import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from pipeline.model.config import ModelConfig
from pipeline.model.moe import ROWS_PER_BLOCK, SparseExperts, balance_loss, build_feed_forward, z_loss
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


def block_of_transformers(module, top_k):
    """transformers' own block with the same weights, whose experts take turns."""
    (experts, double_width, width), dtype = module.block.experts.gate_up_proj.shape, module.block.gate.weight.dtype
    settings = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=double_width // 2, num_experts=experts, num_experts_per_tok=top_k,
        norm_topk_prob=True,
    )  # fmt: skip
    settings._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(settings).to(dtype)
    block.load_state_dict(module.block.state_dict())
    return block


def gradients(block, x, update):
    probe = torch.linspace(-1, 1, update.numel(), dtype=update.dtype).view_as(update)
    found = torch.autograd.grad((update * probe).sum(), [x, *block.parameters()])
    return dict(zip(["x", *dict(block.named_parameters())], found, strict=True))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("tokens", [6, ROWS_PER_BLOCK, 150])
def test_sorted_experts_are_the_block_of_transformers(top_k, tokens):
    module = experts_of(top_k).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    reference = block_of_transformers(module, top_k)
    x = torch.randn(1, tokens, 16, dtype=torch.float64, requires_grad=True)
    update, expected = module(x)[0], reference(x)
    torch.testing.assert_close(update, expected)
    ours, theirs = gradients(module.block, x, update), gradients(reference, x, expected)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)


@pytest.mark.parametrize("grouped_mm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_each_precision_are_near_those_in_float64(dtype, grouped_mm):
    module = experts_of().to(dtype)
    exact = block_of_transformers(module, 2).double()
    x = torch.randn(2, 70, 16).to(dtype).requires_grad_()
    module.block.experts.grouped_mm = grouped_mm
    same = x.detach().double().requires_grad_()
    update, expected = module(x)[0], exact(same)
    ours, theirs = gradients(module.block, x, update), gradients(exact, same, expected)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for name, value in {"update": update.detach(), **ours}.items():
        right = {"update": expected.detach(), **theirs}[name]
        assert (value.double() - right).norm() < tolerance * right.norm(), name


def test_grouped_products_wait_for_nothing_and_give_idle_experts_zeros():
    """Only the loop asks for numbers of tokens."""
    module = experts_of(top_k=1)
    x, asked = torch.randn(1, 1, 16), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append(tensor) or [64, 0, 0, 0])
        module.block.experts.grouped_mm = True
        update, logits = module(x)
        assert not asked
        module.block.experts.grouped_mm = False
        module(x)
        assert len(asked) == 1
    update.sum().backward()
    for parameter in module.block.experts.parameters():
        assert parameter.grad.flatten(1).any(dim=1).nonzero().tolist() == [[int(logits.argmax())]]


def test_experts_can_be_differentiated_twice():
    module = experts_of(top_k=2).double()
    experts = module.block.experts
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0, 2], [2, 1], [0, 1], [1, 0], [2, 0]])  # none for the last one

    def update(x, weights):
        return experts(x, chosen, weights)

    assert gradcheck(update, (x, weights))
    assert gradgradcheck(update, (x, weights))
    products = []
    for form in (experts, block_of_transformers(module, 2).experts):
        loss = form(x, chosen, weights).sin().sum()
        leaves = [x, weights, *form.parameters()]
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        products.append(torch.autograd.grad(sum(part.square().sum() for part in first), leaves))
    for ours, theirs in zip(*products, strict=True):
        torch.testing.assert_close(ours, theirs)


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
