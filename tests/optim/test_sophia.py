"""Sophia and its two estimates of the Hessian's diagonal, against formulas, torch.func and another implementation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_optimizer import SophiaH
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import UserError
from pipeline.model.config import LossConfig
from pipeline.model.evidence import join
from pipeline.model.losses import Targets, count_targets
from pipeline.model.output import RoadworkOutput
from pipeline.optim.build import build_optimizer
from pipeline.optim.config import OptimConfig
from pipeline.optim.hessian import hutchinson, rademacher
from pipeline.optim.sampled_loss import draws_needed, sampled_loss, uniform
from pipeline.optim.sophia import Sophia
from tests.model.synthetic import learner
from tests.model.synthetic import photos as synthetic_photos


def set_gradients(parameters, gradients):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()


@pytest.mark.parametrize("name", ["sophia_h", "sophia_g"])
def test_steps_equal_the_published_update(name):
    """Algorithm 3 in float64; the estimate of a step is the gradient, or its square, of `estimating`."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    lr, decay, beta1, beta2, gamma, eps = 0.02, 0.3, 0.8, 0.95, 0.4, 1e-3
    config = OptimConfig(name=name, lr=lr, weight_decay=decay, beta1=beta1, beta2=beta2, gamma=gamma, eps=eps)
    optimizer = build_optimizer(model, config)
    gradients, found = (torch.randn(5, 3, 4, dtype=torch.float64) for _ in range(2))
    theta = model.weight.detach().numpy().copy()
    bias = model.bias.detach().clone()
    m = h = np.zeros_like(theta)
    clipped = []
    for step in range(5):
        if step % 2 == 0:
            model.weight.grad = found[step].clone()
            with optimizer.estimating():
                optimizer.step()
            estimate = found[step].numpy()
            h = beta2 * h + (1 - beta2) * (estimate**2 if name == "sophia_g" else estimate)
        model.weight.grad = gradients[step].clone()
        optimizer.step()
        m = beta1 * m + (1 - beta1) * gradients[step].numpy()
        ratio = m / np.maximum(gamma * h, eps)
        clipped.append((np.abs(ratio) > 1).mean())
        theta = theta - lr * decay * theta
        theta = theta - lr * np.clip(ratio, -1, 1)
    np.testing.assert_allclose(model.weight.detach().numpy(), theta, rtol=1e-12)
    assert 0 < min(clipped) < 1  # both branches of the clipping were taken
    assert torch.equal(model.bias, bias)  # without a gradient


def test_an_estimate_changes_the_curvature_and_nothing_else():
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimConfig(name="sophia_h"))
    set_gradients(model.parameters(), [torch.randn_like(p) for p in model.parameters()])
    optimizer.step()
    before = [(p.clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in model.parameters()]
    with optimizer.estimating():
        optimizer.step()
    for parameter, (weight, state) in zip(model.parameters(), before, strict=True):
        after = optimizer.state[parameter]
        assert torch.equal(parameter, weight)
        assert all(torch.equal(after[key], state[key]) for key in ("step", "exp_avg"))
        assert torch.equal(after["hessian"], 0.01 * parameter.grad)
    assert not optimizer.is_estimating


def test_it_takes_the_steps_of_another_implementation():
    """`pytorch_optimizer` divides by max(h, eps) and clips at p; with h scaled by gamma and lr by p it is the same."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 4), nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    lr, gamma, decay = 0.03, 0.2, 0.1
    sophia = Sophia(ours.parameters(), lr=lr, gamma=gamma, weight_decay=decay)
    reference = SophiaH(theirs.parameters(), lr=lr, p=1.0, weight_decay=decay, betas=(0.96, 0.99), update_period=100)
    for step in range(6):
        gradients = [torch.randn_like(p) for p in ours.parameters()]
        set_gradients(ours.parameters(), gradients)
        set_gradients(theirs.parameters(), gradients)
        estimates = [5 * torch.randn_like(p) for p in ours.parameters()]
        scaled = [gamma * estimate for estimate in estimates]
        if step % 2 == 0:
            set_gradients(ours.parameters(), estimates)
            with sophia.estimating():
                sophia.step()
            set_gradients(ours.parameters(), gradients)
            reference.step(hessian=scaled)
        else:
            reference.step()
        sophia.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


class Small(nn.Module):
    """A network with curvature everywhere and a parameter that the loss does not depend on."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def small():
    """The network in float64, its weights, its loss as a function of them, and the exact Hessian of the whole."""
    torch.manual_seed(0)
    model = Small().double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(2, (7,))
    weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}

    def loss(values):
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    def flat_loss(vector):
        parts = vector.split([w.numel() for w in weights.values()])
        return loss({name: part.view_as(w) for part, (name, w) in zip(parts, weights.items(), strict=True)})

    exact = hessian(flat_loss)(torch.cat([w.detach().flatten() for w in weights.values()]))
    return weights, loss, exact


def flat(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def shapes(weights):
    return {name: tuple(w.shape) for name, w in weights.items()}


def test_each_estimate_is_the_exact_product_with_the_hessian(small):
    weights, loss, exact = small
    for step in range(3):
        probes = rademacher(shapes(weights), 0, step)
        u = flat(probes)
        torch.testing.assert_close(flat(hutchinson(loss(weights), weights, probes)), u * (exact @ u))
    assert all(w.grad is None for w in weights.values())


def test_the_mean_of_many_estimates_is_the_diagonal(small):
    weights, loss, exact = small
    count = 400
    found = torch.stack(
        [flat(hutchinson(loss(weights), weights, rademacher(shapes(weights), 1, step))) for step in range(count)]
    )
    error = found.std(dim=0) / count**0.5
    assert ((found.mean(dim=0) - exact.diag()).abs() <= 4.5 * error + 1e-12).all()
    assert (exact.diag().abs() > 3 * error).sum() >= 5  # so that it could have failed


def test_signs_are_even_independent_and_those_of_the_name_and_the_step():
    sizes = {"a": (1000, 13), "b": (13000,)}
    signs = rademacher(sizes, 0, 0)
    assert {name: tuple(sign.shape) for name, sign in signs.items()} == sizes
    assert all(sign.unique().tolist() == [-1, 1] for sign in signs.values())
    others = [rademacher(sizes, 0, 1)["a"], rademacher(sizes, 1, 0)["a"], signs["b"].view_as(signs["a"])]
    for other in (torch.ones(1), signs["a"].roll(1), *others):
        assert abs((signs["a"] * other).mean()) < 4 / 13000**0.5
    assert torch.equal(rademacher({"b": (13000,)}, 0, 0)["b"], signs["b"])


CONFIG = LossConfig(roadwork=0.4, weather=0.15, segmentation=0.2)


def heads(vector, x):
    """Three heads that are linear in one vector of parameters, so that they share all of it."""
    matrix = vector.view(-1, x.shape[1])
    answers = x @ matrix.T
    return RoadworkOutput(
        logits=answers[:, :2], weather_logits=answers[:, 2:10], mask_logits=answers[:, 10:16].view(-1, 6, 1, 1)
    )


def some_targets():
    """Five photos, each kind of target absent once."""
    weather = F.one_hot(torch.tensor([0, 3, 1, 7, 2]), 8).float()
    weather[1] = torch.nan
    masks = torch.rand(5, 6, 1, 1)
    masks[4] = torch.nan
    return Targets(torch.tensor([0, 1, -1, 1, 0]), weather, masks)


def test_the_mean_of_squared_gradients_of_drawn_labels_is_the_gauss_newton_diagonal():
    """Against J^T S J from torch.func, with S the second derivative of each head's loss in its logits."""
    torch.manual_seed(0)
    x = torch.randn(5, 2)
    vector = torch.randn(16 * 2, requires_grad=True)
    targets = some_targets()
    counts = count_targets(targets)

    def logits(v):
        output = heads(v, x)
        return torch.cat([output.logits, output.weather_logits, output.mask_logits.flatten(1)], dim=1)

    jacobian, answers = jacrev(logits)(vector).detach(), logits(vector).detach()  # [5, 16, 32], [5, 16]
    exact = torch.zeros(32)
    for i in range(5):
        curvature = torch.zeros(16, 16)
        for present, weight, place in (
            (targets.has_label[i], 0.4 / 4, slice(0, 2)), (targets.has_weather[i], 0.15 / 4, slice(2, 10)),
        ):  # fmt: skip
            p = answers[i, place].softmax(dim=0)
            curvature[place, place] = present * weight * (p.diag() - p.outer(p))
        p = answers[i, 10:].sigmoid()
        curvature[10:, 10:] = targets.has_mask[i] * 0.2 / 4 / 6 * (p * (1 - p)).diag()
        exact += (jacobian[i].T @ curvature @ jacobian[i]).diag()
    count = 500
    found = []
    for step in range(count):
        output = heads(vector, x)
        draws = uniform(range(5), draws_needed(output), 0, step)
        (gradient,) = torch.autograd.grad(sampled_loss(output, targets, counts, CONFIG, draws), vector)
        found.append(gradient.square())
    squares = torch.stack(found)
    error = squares.std(dim=0) / count**0.5
    assert ((squares.mean(dim=0) - exact).abs() <= 4.5 * error).all()
    assert (error < 0.15 * exact).all()  # so that it could have failed


EVIDENCE = LossConfig(roadwork=0.4, weather=0.15, segmentation=0.2, evidence=0.7, evidence_masks=0.3)
EXISTS = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0], [1, 1]]).bool()


def head_with_evidence(vector, x):
    """The three heads, and the evidence of two views of two cells, linear in the same parameters."""
    matrix = vector.view(-1, x.shape[1])
    answers, cells = x @ matrix[:16].T, (x @ matrix[16:].T).view(-1, 2, 2)
    evidence = cells.masked_fill(~EXISTS[..., None], -torch.inf).flatten(1).logsumexp(dim=1)
    return RoadworkOutput(
        logits=join(answers[:, :2], evidence, 0.5), fused_logits=answers[:, :2], weather_logits=answers[:, 2:10],
        mask_logits=answers[:, 10:].view(-1, 6, 1, 1), evidence_logits=evidence, evidence_map=cells, view_mask=EXISTS,
    )  # fmt: skip


def curvature_of(vector, x, targets):
    """The Gauss-Newton diagonal of one head's own loss, by torch.func: J^T S J, summed over terms and photos."""

    def logits(v):
        output = head_with_evidence(v, x)
        parts = (output.fused_logits, output.weather_logits, output.mask_logits, output.evidence_map)
        return torch.cat([*(part.flatten(1) for part in parts), output.evidence_logits[:, None]], dim=1)

    jacobian, answers = jacrev(logits)(vector).detach(), logits(vector).detach()  # [5, 21, P], [5, 21]
    exact = torch.zeros(vector.numel())
    for i in range(len(x)):
        curvature = torch.zeros(21, 21)
        for present, weight, place in (
            (targets.has_label[i], 0.4 / 4, slice(0, 2)), (targets.has_weather[i], 0.15 / 4, slice(2, 10)),
        ):  # fmt: skip
            p = answers[i, place].softmax(dim=0)
            curvature[place, place] = present * weight * (p.diag() - p.outer(p))
        p = answers[i].sigmoid()
        own = (p * (1 - p)).clone()
        own[:10] = 0
        own[10:16] *= targets.has_mask[i] * 0.2 / 4 / 6
        cells = EXISTS[i].repeat_interleave(2)
        own[16:20] *= targets.has_mask[i] * 0.3 / 4 / cells.sum() * cells
        own[20] *= targets.has_label[i] * 0.7 / 4
        exact += (jacobian[i].T @ (curvature + own.diag()) @ jacobian[i]).diag()
    return exact


@pytest.mark.parametrize("members", [1, 2])
def test_the_mean_holds_for_the_evidence_for_views_that_do_not_exist_and_for_several_heads(members):
    """The loss of K heads is their mean, so each one's curvature counts a Kth."""
    torch.manual_seed(0)
    x, targets = torch.randn(5, 2), some_targets()
    counts = count_targets(targets)
    vectors = torch.randn(members, 20 * 2, requires_grad=True)
    exact = torch.stack([curvature_of(vector.detach(), x, targets) for vector in vectors]) / members
    count, found = 600, []
    for step in range(count):
        outputs = [head_with_evidence(vector, x) for vector in vectors]
        output = outputs[0] if members == 1 else RoadworkOutput(members=tuple(outputs))
        draws = uniform(range(5), draws_needed(output), 0, step)
        (gradient,) = torch.autograd.grad(sampled_loss(output, targets, counts, EVIDENCE, draws), vectors)
        found.append(gradient.square())
    squares = torch.stack(found)
    error = squares.std(dim=0) / count**0.5
    assert squares.isfinite().all()
    assert ((squares.mean(dim=0) - exact).abs() <= 4.5 * error).all()
    assert (error < 0.2 * exact).all()  # so that it could have failed


def test_products_with_the_hessian_are_finite_where_views_do_not_exist():
    """Their cells have log-odds of -inf in the sum; a second derivative of that could be NaN."""
    model, batch = learner(0, heads=2, experts=2).double().eval(), synthetic_photos(4, seed=1)
    batch["view_mask"][:, 3:] = False
    batch |= {name: batch[name].double() for name in ("cls", "cells", "regions")}
    batch["mask_targets"] = torch.rand(4, 6, 4, 4).double()
    weights = dict(model.named_parameters())
    probes = rademacher(shapes(weights), 0, 0)
    probes = {name: probe.double() for name, probe in probes.items()}

    def loss():
        return model(batch, with_loss=True).loss

    with sdpa_kernel(SDPBackend.MATH):
        products = hutchinson(loss(), weights, probes)
        assert all(product.isfinite().all() for product in products.values())
        own = {name: weight for name, weight in weights.items() if ".evidence." in name}
        assert all(products[name].any() for name in own)
        # Central differences of the gradient along the probe.
        slopes, size = [], 1e-5
        for side in (size, -size):
            with torch.no_grad():
                torch._foreach_add_(list(weights.values()), list(probes.values()), alpha=side)
            slopes.append(torch.autograd.grad(loss(), list(own.values())))
            with torch.no_grad():
                torch._foreach_add_(list(weights.values()), list(probes.values()), alpha=-side)
    for name, ahead, behind in zip(own, *slopes, strict=True):
        torch.testing.assert_close(products[name], probes[name] * (ahead - behind) / (2 * size), rtol=1e-3, atol=1e-7)


def test_with_one_head_it_is_the_papers_batch_times_the_square_of_the_mean_gradient():
    torch.manual_seed(0)
    output = RoadworkOutput(logits=torch.randn(6, 2, requires_grad=True))
    targets = Targets(
        torch.ones(6, dtype=torch.long), torch.full((6, 8), torch.nan), torch.full((6, 6, 1, 1), torch.nan)
    )
    draws = uniform(range(6), draws_needed(output), 0, 0)
    loss = sampled_loss(output, targets, count_targets(targets), LossConfig(roadwork=1.0), draws)
    (ours,) = torch.autograd.grad(loss, output.logits)
    labels = (draws[:, 0] >= output.logits.softmax(dim=1)[:, 0]).long()
    (mean,) = torch.autograd.grad(F.cross_entropy(output.logits, labels), output.logits)
    torch.testing.assert_close(ours.square(), 6 * mean.square())


def test_a_samples_draws_are_its_own():
    drawn = uniform([4, 9], 50, seed=0, step=3)
    assert torch.equal(uniform([9], 50, seed=0, step=3)[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(uniform([4], 50, seed=0, step=4)[0], drawn[0])
    assert not torch.equal(uniform([4], 50, seed=1, step=3)[0], drawn[0])


def test_rates_that_are_left_open_are_those_of_the_optimizer():
    assert OptimConfig().betas == (0.9, 0.99)
    assert OptimConfig().epsilon == 1e-8
    for name in ("sophia_h", "sophia_g"):
        config = OptimConfig(name=name, beta2=0.95)
        assert (config.betas, config.epsilon) == ((0.96, 0.95), 1e-12)
        assert (config.gamma, config.hessian_every) == (0.01, 10)
        # A configuration that is written and read again under another name still leaves open what was left open.
        assert replace(config, name="adamw").betas == (0.9, 0.95)


@pytest.mark.parametrize(("key", "value"), [("name", "sgd"), ("gamma", 0.0), ("hessian_every", 0)])
def test_a_value_out_of_range_is_refused_by_its_key(key, value):
    with pytest.raises(UserError, match=rf"optim\.{key} is {value!r}"):
        OptimConfig(**{key: value})
