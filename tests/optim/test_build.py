from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.model.config import ModelConfig
from pipeline.model.moe import SparseExperts
from pipeline.model.roadwork import RoadworkConfig, RoadworkModel
from pipeline.optim.build import build_optimizer, set_lr
from pipeline.optim.config import OptimConfig


class Parts(nn.Module):
    """One of each kind of parameter that the head has."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.RMSNorm(4)
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        sizes = ModelConfig(width=16, heads=2, fusion_heads=2, expert_width=8)
        self.experts = SparseExperts(sizes)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def groups_of(model, config=None):
    """Names of the parameters in each of the optimizer's groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config or OptimConfig())
    return {g["name"]: ({names[id(p)] for p in g["params"]}, g["weight_decay"]) for g in optimizer.param_groups}


def test_matrices_decay_and_biases_norms_and_embeddings_do_not():
    groups = groups_of(Parts(), OptimConfig(weight_decay=0.07))
    assert groups["decay"] == (
        {
            "linear.weight",
            "attention.in_proj_weight",
            "attention.out_proj.weight",
            "experts.block.gate.weight",
            "experts.block.experts.gate_up_proj",
            "experts.block.experts.down_proj",
        },
        0.07,
    )
    assert groups["no_decay"] == (
        {
            "linear.bias",
            "norm.weight",
            "embedding.weight",
            "attention.in_proj_bias",
            "attention.out_proj.bias",
        },
        0.0,
    )


def test_a_group_without_parameters_is_left_out():
    assert set(groups_of(nn.Linear(3, 2, bias=False))) == {"decay"}
    assert set(groups_of(nn.RMSNorm(3))) == {"no_decay"}


def test_three_steps_equal_the_published_update():
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    lr, decay, beta1, beta2, eps = 0.02, 0.3, 0.8, 0.95, 1e-3
    config = OptimConfig(lr=lr, weight_decay=decay, beta1=beta1, beta2=beta2, eps=eps)
    optimizer = build_optimizer(model, config)
    states = [
        (parameter, parameter.detach().numpy().copy(), d) for parameter, d in ((model.weight, decay), (model.bias, 0.0))
    ]
    gradients = np.random.default_rng(0).standard_normal((2, 3, 3, 4))
    for step in range(3):
        for i, (parameter, _, _) in enumerate(states):
            gradient = gradients[i, step] if parameter.ndim == 2 else gradients[i, step][:, 0]
            parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    for i, (parameter, theta, weight_decay) in enumerate(states):
        m = v = 0.0
        for step in range(1, 4):
            g = gradients[i, step - 1] if parameter.ndim == 2 else gradients[i, step - 1][:, 0]
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
            theta = theta - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * theta)  # noqa: PLW2901
        np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-12)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0),
        ("final_lr_ratio", 1.1),
        ("warmup_share", 1.0),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("grad_clip", -1.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(key, value):
    with pytest.raises(UserError, match=rf"optim\.{key} is {value}"):
        OptimConfig(**{key: value})


def test_the_evidence_beside_a_trunk_has_a_rate_of_its_own_and_that_of_the_baseline_has_not():
    sizes = ModelConfig(width=16, heads=2, fusion_heads=2, expert_width=8, layers=1, mask_side=4)
    whole, alone = (
        RoadworkModel(RoadworkConfig(**asdict(replace(sizes, head=head)), backbone_dim=8))
        for head in ("roadwork", "cell_mil")
    )
    groups = groups_of(whole)
    evidence = {name for name, _ in whole.named_parameters() if ".evidence." in name}
    assert evidence == groups["evidence_decay"][0] | groups["evidence_no_decay"][0]
    assert set(groups_of(alone)) == {"decay", "no_decay"}
    optimizer = build_optimizer(whole, OptimConfig(evidence_lr_scale=2.5))
    set_lr(optimizer, 0.1)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"decay": 0.1, "no_decay": 0.1, "evidence_decay": 0.25, "evidence_no_decay": 0.25}
