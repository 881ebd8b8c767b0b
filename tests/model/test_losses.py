from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.spatial.distance import jensenshannon

from pipeline.errors import UserError
from pipeline.model.config import TERMS, LossConfig
from pipeline.model.evidence import join
from pipeline.model.losses import (
    Targets,
    combine,
    count_targets,
    focal_loss,
    importance_divergence,
    loss_terms,
    segmentation_loss,
    view_disagreement,
    weather_loss,
)
from pipeline.model.moe import balance_loss, z_loss
from pipeline.model.output import RoadworkOutput

NAN = float("nan")
VIEWS, TOP_K, SIDE, GRID = 5, 2, 4, 2
LEAVES = (
    "fused_logits", "view_logits", "weather_logits", "mask_logits", "evidence_logits", "evidence_map", "view_scores",
    "router_logits",
)  # fmt: skip


def random_batch(batch=6, kept=VIEWS, dtype=torch.float64, scale=2.0, seed=0):
    """An answer whose parts are leaves of the graph, and targets of which every fourth or so is absent."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return (scale * torch.randn(batch, *shape, generator=generator)).to(dtype).requires_grad_()

    view_mask = torch.rand(batch, kept, generator=generator) < 0.7
    view_mask[:, 0] = True
    token_mask = view_mask[..., None].expand(-1, -1, 3).flatten(1)
    corner = torch.rand(batch, kept, 2, generator=generator) * 0.5
    fused, evidence = leaf(2), leaf()
    output = RoadworkOutput(
        logits=join(fused, evidence, 0.5),
        fused_logits=fused,
        evidence_logits=evidence,
        evidence_map=leaf(kept, GRID * GRID),
        view_boxes=torch.cat([corner, corner + 0.4], dim=-1),
        view_logits=leaf(kept, 2),
        view_mask=view_mask,
        weather_logits=leaf(8),
        mask_logits=leaf(6, SIDE, SIDE),
        router_logits=(leaf(3 * kept, 4), leaf(3 * kept, 4)),
        token_mask=token_mask,
        view_scores=leaf(VIEWS),
        view_importance=(torch.rand(batch, kept, generator=generator) * view_mask).to(dtype),
        view_indices=torch.arange(kept).expand(batch, -1),
    )
    weather = (torch.rand(batch, 8, generator=generator) < 0.3).float()
    weather[:, 2] = 1
    weather[1] = NAN
    masks = torch.rand(batch, 6, SIDE, SIDE, generator=generator).mul(2).sub(0.5).clamp(0, 1)
    masks[2] = NAN
    labels = torch.randint(0, 2, (batch,), generator=generator)
    labels[3] = -1
    return output, Targets(labels, weather, masks)


def leaves_of(output):
    """The differentiable parts of an answer, flat."""
    parts = [getattr(output, name) for name in LEAVES]
    return [*parts[:-1], *parts[-1]]


def rows_of(output, targets, rows):
    """The same answer for some of the samples, on the same graph."""
    parts = {
        name: tuple(part[rows] for part in value) if isinstance(value, tuple) else value[rows]
        for name, value in output.items()
    }
    return RoadworkOutput(**parts), Targets(targets.labels[rows], targets.weather[rows], targets.masks[rows])


def total_loss(output, targets, config=None, counts=None):
    config = config or LossConfig()
    counts = count_targets(targets) if counts is None else counts
    return combine(loss_terms(output, targets, config, TOP_K), counts, config)


# Roadwork


def retinanet(z, label, alpha, gamma):
    """Sigmoid focal loss of one logit (Lin et al. 2017, eq. 5)."""
    p = 1 / (1 + np.exp(-z))
    p_t, alpha_t = (p, alpha) if label == 1 else (1 - p, 1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * np.log(p_t)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 0.5), (0.25, 0.0)])
def test_focal_loss_mixes_retinanets_by_the_smoothed_label(alpha, gamma, smoothing):
    config = LossConfig(focal_alpha=alpha, focal_gamma=gamma, label_smoothing=smoothing)
    logits = 3 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(20) % 2
    expected = [
        (1 - smoothing / 2) * retinanet(z, label, alpha, gamma) + smoothing / 2 * retinanet(z, 1 - label, alpha, gamma)
        for z, label in zip((logits[:, 1] - logits[:, 0]).tolist(), labels.tolist(), strict=True)
    ]
    np.testing.assert_allclose(focal_loss(logits, labels, config).numpy(), expected, rtol=1e-9)


def test_without_focus_it_is_half_the_cross_entropy():
    config = LossConfig(focal_alpha=0.5, focal_gamma=0.0, label_smoothing=0.1)
    logits, labels = torch.randn(8, 2).double(), torch.arange(8) % 2
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none") / 2
    torch.testing.assert_close(focal_loss(logits, labels, config), expected)


def test_roadwork_weighs_a_quarter_and_none_three_quarters():
    config = LossConfig(label_smoothing=0.0)
    none, roadwork = focal_loss(torch.zeros(2, 2), torch.tensor([0, 1]), config)
    assert (none / roadwork).item() == pytest.approx(3.0)
    assert roadwork.item() == pytest.approx(0.25 * 0.5**2 * np.log(2))


# Consistency


def test_consistency_of_two_views_is_scipys_jensen_shannon_divergence():
    logits = 3 * torch.randn(10, 2, 2).double()
    p = logits.softmax(-1).numpy()
    expected = [jensenshannon(first, second) ** 2 for first, second in p]
    ours = view_disagreement(logits, torch.ones(10, 2, dtype=torch.bool))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-14)


def test_consistency_of_many_views_is_entropy_of_the_mean_minus_mean_entropy():
    output, _ = random_batch()
    ours = view_disagreement(output.view_logits, output.view_mask).detach()
    for image in range(6):
        p = output.view_logits[image][output.view_mask[image]].detach().softmax(-1).numpy()
        expected = stats.entropy(p.mean(axis=0)) - stats.entropy(p, axis=1).mean()
        assert ours[image].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_views_that_agree_and_single_views_cost_nothing_and_full_contradiction_log_2():
    everyone = torch.ones(1, 4, dtype=torch.bool)
    agreeing = torch.tensor([[0.3, -1.2]]).expand(1, 4, 2)
    assert view_disagreement(agreeing, everyone).item() == pytest.approx(0, abs=1e-7)
    alone = torch.tensor([[True, False, False, False]])
    assert view_disagreement(torch.randn(1, 4, 2), alone).item() == 0
    contradicting = torch.tensor([[[50.0, -50], [-50, 50], [50, -50], [-50, 50]]])
    assert view_disagreement(contradicting, everyone).item() == pytest.approx(np.log(2))


# Weather


def test_weather_is_cross_entropy_to_words_of_equal_share():
    output, targets = random_batch()
    present = [0, 2, 3, 4, 5]
    shares = targets.weather[present].double()
    shares = shares / shares.sum(dim=1, keepdim=True)
    expected = F.cross_entropy(output.weather_logits[present], shares, reduction="none")
    torch.testing.assert_close(weather_loss(output.weather_logits, targets)[present], expected)


# Segmentation


def dice_and_cross_entropy(logits, cover):
    """One class of one image, cell by cell."""
    both = predicted = covered = entropy = 0.0
    for z, t in zip(logits.ravel(), cover.ravel(), strict=True):
        p = 1 / (1 + np.exp(-z))
        both, predicted, covered = both + p * t, predicted + p * p, covered + t * t
        entropy -= (t * np.log(p) + (1 - t) * np.log(1 - p)) / logits.size
    return 1 - (2 * both + 1) / (predicted + covered + 1) + entropy


def test_segmentation_is_the_mean_over_classes_of_dice_and_cross_entropy():
    output, targets = random_batch()
    ours = segmentation_loss(output.mask_logits, targets).detach()
    logits, masks = output.mask_logits.detach().numpy(), targets.masks.numpy()
    for image in (0, 1, 3, 4, 5):
        per_class = [dice_and_cross_entropy(logits[image, c], masks[image, c]) for c in range(6)]
        assert ours[image].item() == pytest.approx(np.mean(per_class), rel=1e-7)


def test_the_best_answer_to_a_cell_half_covered_is_one_half():
    probability = torch.linspace(0.01, 0.99, 99).double()
    logits = probability.logit()[:, None, None, None].expand(-1, 6, SIDE, SIDE)
    half = torch.full((99, 6, SIDE, SIDE), 0.5)
    loss = segmentation_loss(logits, Targets(torch.zeros(99), torch.zeros(99, 8), half))
    assert probability[loss.argmin()].item() == pytest.approx(0.5)


def test_a_perfect_segmentation_costs_nothing():
    masks = (torch.rand(2, 6, SIDE, SIDE) < 0.3).float()
    masks[:, 0] = 0
    loss = segmentation_loss(60 * masks - 30, Targets(torch.zeros(2), torch.zeros(2, 8), masks))
    assert loss.abs().max() < 1e-6


# Router and pruner


def test_router_terms_are_means_over_the_layers():
    output, targets = random_batch()
    terms = loss_terms(output, targets, LossConfig(), TOP_K)
    first, second = output.router_logits
    mask = output.token_mask
    balance = (balance_loss(first, mask, TOP_K) + balance_loss(second, mask, TOP_K)) / 2
    torch.testing.assert_close(terms["balance"], balance)
    torch.testing.assert_close(terms["router_z"], (z_loss(first, mask) + z_loss(second, mask)) / 2)


def test_the_balance_term_counts_the_experts_per_token():
    output, targets = random_batch()
    one, two = (loss_terms(output, targets, LossConfig(), k)["balance"] for k in (1, 2))
    assert not torch.allclose(one, two)


def test_distillation_is_scipys_divergence_over_the_existing_views():
    output, _ = random_batch()
    ours = importance_divergence(output.view_scores, output.view_importance, output.view_mask).detach()
    for image in range(6):
        exists = output.view_mask[image]
        scores = output.view_scores[image][exists].detach().softmax(0).numpy()
        expected = stats.entropy(output.view_importance[image][exists].numpy(), scores)
        assert ours[image].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_distillation_teaches_the_pruner_and_not_the_fusion():
    output, _ = random_batch()
    importance = output.view_importance.requires_grad_()
    importance_divergence(output.view_scores, importance, output.view_mask).sum().backward()
    assert importance.grad is None
    scores = output.view_scores.detach().masked_fill(~output.view_mask, -torch.inf).softmax(-1)
    target = importance.detach() / importance.detach().sum(-1, keepdim=True)
    torch.testing.assert_close(output.view_scores.grad, scores - target)


def test_distillation_is_zero_where_views_were_pruned():
    output, targets = random_batch(kept=3)
    terms = loss_terms(output, targets, LossConfig(), TOP_K)
    assert terms["distillation"].tolist() == [0.0] * 6
    kept_all, targets = random_batch()
    assert (loss_terms(kept_all, targets, LossConfig(), TOP_K)["distillation"] > 0).all()


# All terms


@pytest.mark.parametrize(
    ("term", "part"),
    [
        ("roadwork", "fused_logits"),
        ("evidence", "evidence_logits"),
        ("evidence_masks", "evidence_map"),
        ("consistency", "view_logits"),
        ("weather", "weather_logits"),
        ("segmentation", "mask_logits"),
        ("balance", "router_logits"),
        ("router_z", "router_logits"),
        ("distillation", "view_scores"),
    ],
)
def test_gradients_are_right(term, part):
    output, targets = random_batch(batch=4)
    value = getattr(output, part)
    leaves = value if part == "router_logits" else (value,)

    def values(*leaves):
        rebuilt = RoadworkOutput(**{**output, part: leaves if part == "router_logits" else leaves[0]})
        return loss_terms(rebuilt, targets, LossConfig(), TOP_K)[term]

    assert torch.autograd.gradcheck(values, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_losses_and_gradients_are_finite_at_extreme_logits(dtype, gamma):
    output, targets = random_batch(batch=16, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for leaf in leaves_of(output):
        leaf.data = 1e4 * torch.randint(-1, 2, leaf.shape, generator=generator).to(dtype)
    output.view_importance[0] = 0  # every gate of the fusion shut
    config = LossConfig(focal_gamma=gamma)
    for term, values in loss_terms(output, targets, config, TOP_K).items():
        assert values.dtype == torch.float32
        assert values.isfinite().all(), term
    total_loss(output, targets, config).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves_of(output))


@pytest.mark.parametrize(
    ("term", "leaf", "row"),
    [
        ("roadwork", "fused_logits", 3),
        ("weather", "weather_logits", 1),
        ("segmentation", "mask_logits", 2),
        ("evidence", "evidence_logits", 3),
        ("evidence_masks", "evidence_map", 2),
    ],
)
def test_an_absent_target_gives_no_loss_and_no_gradient(term, leaf, row):
    output, targets = random_batch()
    values = loss_terms(output, targets, LossConfig(), TOP_K)[term]
    values.sum().backward()
    gradient = getattr(output, leaf).grad.reshape(6, -1)
    present = torch.arange(6) != row
    assert values[row] == 0
    assert (gradient[row] == 0).all()
    assert (values[present] > 0).all()
    assert gradient[present].any(dim=1).all()


def test_weather_without_any_word_is_absent():
    targets = Targets(torch.zeros(1), torch.zeros(1, 8), torch.zeros(1, 6, SIDE, SIDE))
    assert weather_loss(torch.randn(1, 8), targets).item() == 0
    assert not targets.has_weather.any()


def test_masked_views_and_tokens_get_no_gradient():
    output, targets = random_batch()
    total_loss(output, targets).backward()
    assert (output.view_logits.grad[~output.view_mask] == 0).all()
    assert (output.view_scores.grad[~output.view_mask] == 0).all()
    assert (output.evidence_map.grad[~output.view_mask] == 0).all()
    assert all((layer.grad[~output.token_mask] == 0).all() for layer in output.router_logits)


def test_counts_are_the_samples_that_have_each_target():
    _, targets = random_batch()
    targets.weather[4] = 0
    counts = dict(zip(TERMS, count_targets(targets).tolist(), strict=True))
    assert counts == dict.fromkeys(TERMS, 6) | {
        "roadwork": 5, "weather": 4, "segmentation": 5, "evidence": 5, "evidence_masks": 5,
    }  # fmt: skip


def test_the_loss_is_the_weighted_sum_of_means_over_samples_with_a_target():
    output, targets = random_batch()
    config = LossConfig()
    terms = loss_terms(output, targets, config, TOP_K)
    assert set(terms) == set(TERMS)
    expected = 0.40 * terms["roadwork"].sum() / 5 + 0.25 * terms["consistency"].mean()
    expected += 0.15 * terms["weather"].sum() / 5 + 0.20 * terms["segmentation"].sum() / 5
    expected += 0.01 * terms["balance"].mean() + 0.001 * terms["router_z"].mean()
    expected += 0.05 * terms["distillation"].mean()
    expected += terms["evidence"].sum() / 5 + terms["evidence_masks"].sum() / 5
    torch.testing.assert_close(total_loss(output, targets), expected)


@pytest.mark.parametrize("split", [[6], [2, 4], [1, 1, 1, 1, 1, 1]])
def test_splitting_a_batch_changes_neither_loss_nor_gradient(split):
    """Micro-batches and ranks alike, as long as all divide by the same counts."""
    whole, targets = random_batch()
    expected = total_loss(whole, targets)
    expected.backward()
    parts, _ = random_batch()
    chunks = [rows_of(parts, targets, rows) for rows in torch.arange(6).split(split)]
    counts = sum(count_targets(chunk_targets) for _, chunk_targets in chunks)
    loss = sum(total_loss(*chunk, counts=counts) for chunk in chunks)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(leaves_of(parts), leaves_of(whole), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_batch_without_any_target_still_has_a_finite_loss():
    output, targets = random_batch()
    nothing = Targets(torch.full_like(targets.labels, -1), torch.full((6, 8), NAN), torch.full((6, 6, SIDE, SIDE), NAN))
    loss = total_loss(output, nothing)
    loss.backward()
    assert loss.isfinite()
    parts = (output.fused_logits, output.evidence_logits, output.evidence_map)
    assert all((part.grad == 0).all() for part in parts)


def test_a_baseline_has_the_roadwork_term_alone():
    output, targets = random_batch()
    output = RoadworkOutput(logits=output.fused_logits, view_mask=output.view_mask)
    terms = loss_terms(output, targets, LossConfig(), TOP_K)
    assert set(terms) == {"roadwork"}
    loss = combine(terms, count_targets(targets), LossConfig())
    torch.testing.assert_close(loss, 0.4 * terms["roadwork"].sum() / 5)


@pytest.mark.parametrize("key", [field.name for field in fields(LossConfig) if field.name != "mixup_alpha"])
def test_every_key_changes_the_loss(key):
    output, targets = random_batch()
    changed = replace(LossConfig(), **{key: 0.5})
    assert not torch.allclose(total_loss(output, targets), total_loss(output, targets, changed), rtol=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((term, -0.1) for term in TERMS),
        ("roadwork", NAN),
        ("focal_alpha", 0.0),
        ("focal_alpha", 1.0),
        ("focal_gamma", -1.0),
        ("label_smoothing", 1.0),
        ("mixup_alpha", -0.1),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(key, value):
    with pytest.raises(UserError, match=rf"loss\.{key} is"):
        LossConfig(**{key: value})
