"""Mixup: the pairs, the mixed tokens and metadata, and the loss against formulas in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from pipeline.data.views import useful_views, view_boxes
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.config import TERMS, LossConfig
from pipeline.model.encoder import all_tokens
from pipeline.model.losses import (
    Targets,
    combine,
    count_targets,
    focal_loss,
    loss_terms,
    mixed_masks,
    segmentation_loss,
    weather_loss,
)
from pipeline.model.metadata import FIELD_WIDTHS
from pipeline.model.mixup import Mix, draw_mix
from pipeline.model.output import RoadworkOutput
from tests.model.examples import with_loss
from tests.small_run import SIDE, make_backbone, make_model

NAN = float("nan")
PAIRS = Mix(torch.tensor([1, 0, 3, 2, 4]), torch.tensor([0.7, 0.7, 0.5, 0.5, 1.0]))


def layouts(*sizes):
    boxes = torch.stack([view_boxes(*size, SIDE) for size in sizes])
    return boxes, torch.stack([useful_views(*size, SIDE) for size in sizes])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(make_backbone(tmp_path_factory.mktemp("mixup") / "backbone"))


def photos(batch=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    boxes, view_mask = layouts(*[(96, 64)] * batch)
    coarse = torch.rand(batch, 12, 3, 4, 4, generator=generator)
    views = F.interpolate(255 * coarse.flatten(0, 1), size=(SIDE, SIDE), mode="nearest")
    return {"views": views.to(torch.uint8).unflatten(0, (batch, 12)), "boxes": boxes, "view_mask": view_mask}


def tokens_of(model, batch):
    backbone = model.backbone
    tokens = all_tokens(backbone, batch["views"], batch["boxes"], batch["view_mask"], pool_grid=2)
    return {"boxes": batch["boxes"], "view_mask": batch["view_mask"], **tokens._asdict()}


def targets_of(batch=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    weather = (torch.rand(batch, 8, generator=generator) < 0.4).to(dtype)
    weather[:, 1], weather[2] = 1, NAN
    masks = torch.rand(batch, 6, 4, 4, generator=generator).to(dtype)
    masks[0] = NAN
    return Targets(torch.tensor([0, 1, 1, -1, 0])[:batch], weather, masks)


# Pairs


def test_pairs_are_mutual_and_share_one_share():
    torch.manual_seed(0)
    mix = draw_mix(*layouts(*[(96, 64)] * 9), alpha=0.3)
    assert torch.equal(mix.partner[mix.partner], torch.arange(9))
    assert torch.equal(mix.share[mix.partner], mix.share)
    alone = mix.partner == torch.arange(9)
    assert alone.sum() == 1  # of an odd number
    assert (mix.share[alone] == 1).all()
    assert ((mix.share[~alone] >= 0.5) & (mix.share[~alone] < 1)).all()


def test_shares_follow_the_beta_distribution_and_everyone_meets_everyone():
    torch.manual_seed(0)
    boxes, view_mask = layouts(*[(96, 64)] * 8)
    found, met = [], torch.zeros(8, 8)
    for _ in range(150):
        mix = draw_mix(boxes, view_mask, alpha=0.4)
        firsts = mix.partner > torch.arange(8)
        found += mix.share[firsts].tolist()
        met[torch.arange(8), mix.partner] += 1
    beta = stats.beta(0.4, 0.4)
    assert stats.kstest(found, lambda x: beta.cdf(x) - beta.cdf(1 - np.asarray(x))).pvalue > 0.01
    assert (met.diagonal() == 0).all()
    assert met[~torch.eye(8, dtype=bool)].min() > 5  # of 21 expected


def test_the_mix_follows_from_pytorchs_seed():
    draws = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        draws.append(draw_mix(*layouts(*[(96, 64)] * 8), alpha=1.0))
    assert torch.equal(draws[0].partner, draws[1].partner)
    assert torch.equal(draws[0].share, draws[1].share)
    assert not torch.equal(draws[0].share, draws[2].share)


def test_only_photos_whose_views_show_the_same_places_are_paired():
    torch.manual_seed(0)
    sizes = [(96, 64), (32, 32), (64, 96), (97, 64), (32, 32), (200, 64)]
    for _ in range(10):
        mix = draw_mix(*layouts(*sizes), alpha=1.0)
        assert mix.partner.tolist() == [3, 4, 2, 0, 1, 5]


# Tokens and metadata


def test_a_share_of_one_changes_no_answer_and_no_loss(model):
    batch, mix = photos(), Mix(PAIRS.partner, torch.ones(5))
    fields = {"gps": torch.rand(5, 2) * 60, "daytime": torch.ones(5, dtype=torch.int64)}
    plain = model.answer(model.encode(batch), fields)
    mixed = model.answer(model.encode(batch, mix=mix), fields)
    for name in ("logits", "weather_logits", "mask_logits", "view_logits", "view_scores"):
        torch.testing.assert_close(getattr(mixed, name), getattr(plain, name), rtol=0, atol=0)
    targets = targets_of(dtype=torch.float32)
    for one, other in zip(
        loss_terms(plain, targets, LossConfig(), 1).values(),
        loss_terms(mixed, targets, LossConfig(), 1, mix).values(),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_online_and_cached_tokens_mix_the_same_and_as_by_hand(model):
    batch = photos()
    cached = tokens_of(model, batch)
    by_hand = dict(cached)
    share = PAIRS.share.double()
    for name in ("cls", "cells", "regions"):
        tokens = cached[name].double()
        own = share.view(-1, *[1] * (tokens.dim() - 1))
        by_hand[name] = (own * tokens + (1 - own) * tokens[PAIRS.partner]).float()
    wanted = model.answer(model.encode(by_hand))
    for inputs in (batch, cached):
        found = model.answer(model.encode(inputs, mix=PAIRS))
        assert torch.equal(found.view_indices, wanted.view_indices)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.mask_logits, wanted.mask_logits, rtol=1e-4, atol=1e-4)
    plain = model.answer(model.encode(cached))
    assert (plain.logits - wanted.logits)[:4].abs().max(dim=1).values.min() > 1e-3
    torch.testing.assert_close(plain.logits[4], wanted.logits[4])


def test_online_a_pair_costs_the_views_of_both_and_a_photo_alone_its_own(model, monkeypatch):
    seen, call = [], FrozenBackbone.__call__
    monkeypatch.setattr(FrozenBackbone, "__call__", lambda self, views: (seen.append(len(views)), call(self, views))[1])
    uneven = Mix(PAIRS.partner, torch.tensor([0.95, 0.95, 0.9, 0.9, 1.0]))
    encoded = model.encode(photos(), mix=uneven)
    chosen = torch.zeros(5, 12, dtype=torch.bool).scatter_(1, encoded.indices, encoded.mask)
    chosen[:, 0] = False  # the global views come first
    assert (chosen != chosen[PAIRS.partner]).any()  # or this test would show nothing
    assert seen == [5, int((chosen | chosen[PAIRS.partner]).sum())]


def test_metadata_is_mixed_before_it_drops_out(model):
    encoder = model.head.metadata
    fields = {"gps": torch.tensor([[10.0, 20], [50, -70], [NAN, NAN], [5, 5], [1, 1]])}
    encoder.eval()
    with torch.no_grad():
        plain = encoder(fields, 5, False)
        mixed = encoder(fields, 5, False, PAIRS)
        torch.testing.assert_close(mixed, PAIRS.blend(plain))
        null = encoder({}, 5, True)[:, : FIELD_WIDTHS["gps"]]
        encoder.train()
        torch.manual_seed(3)
        many = Mix(torch.arange(2000).view(-1, 2).flip(1).flatten(), torch.full((2000,), 0.6))
        found = encoder({"gps": torch.rand(2000, 2) * 60}, 2000, False, many)[:, : FIELD_WIDTHS["gps"]]
        encoder.eval()
    # As often as without mixup: half of the samples, and a tenth of the others.
    assert (found == null[0]).all(dim=1).float().mean().item() == pytest.approx(0.55, abs=0.055)


# The loss


def test_the_roadwork_term_is_the_focal_loss_of_the_soft_label_in_float64():
    logits = 3 * torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).double()
    targets = targets_of()
    targets.labels[3] = 0
    found = loss_terms(RoadworkOutput(logits=logits), targets, LossConfig(), 1, PAIRS)["roadwork"]
    share, labels = PAIRS.share.double().numpy(), targets.labels.numpy()
    soft = share * labels + (1 - share) * labels[PAIRS.partner.numpy()]
    q = np.stack([1 - soft, soft], axis=1) * 0.9 + 0.05
    p = torch.softmax(logits, -1).numpy()
    expected = -(q * np.array([0.75, 0.25]) * (1 - p) ** 2 * np.log(p)).sum(axis=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_the_weather_term_is_cross_entropy_to_the_mixed_words():
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).double()
    targets = targets_of()
    targets.weather[2] = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    output = RoadworkOutput(logits=torch.zeros(5, 2), weather_logits=logits)
    found = loss_terms(output, targets, LossConfig(), 1, PAIRS)["weather"]
    words = targets.weather / targets.weather.sum(dim=1, keepdim=True)
    own = PAIRS.share.double()[:, None]
    expected = F.cross_entropy(logits, own * words + (1 - own) * words[PAIRS.partner], reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_segmentation_term_is_that_of_the_mixed_mask_and_the_best_answer_is_the_mask_itself():
    targets = targets_of()
    targets.masks[0] = 0.5
    logits = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    output = RoadworkOutput(logits=torch.zeros(5, 2), mask_logits=logits)
    found = loss_terms(output, targets, LossConfig(), 1, PAIRS)["segmentation"]
    own = PAIRS.share.double()[:, None, None, None]
    soft = own * targets.masks + (1 - own) * targets.masks[PAIRS.partner]
    p, axes = logits.sigmoid(), (2, 3)
    dice = 1 - (2 * (p * soft).sum(axes) + 1) / (p.square().sum(axes) + soft.square().sum(axes) + 1)
    entropy = -(soft * p.log() + (1 - soft) * (1 - p).log()).mean(axes)
    torch.testing.assert_close(found, (dice + entropy).mean(dim=1), rtol=1e-6, atol=0)
    best = soft.clamp(1e-6, 1 - 1e-6).logit().requires_grad_()
    segmentation_loss(best, mixed_masks(targets, PAIRS)[0]).sum().backward()
    assert best.grad.abs().max() < 1e-5


def test_what_one_of_a_pair_lacks_drops_out_with_its_share_and_counts_stay_right():
    targets = targets_of()  # the first lacks a mask, the third the weather, the fourth a label
    generator = torch.Generator().manual_seed(3)
    logits, weather, masks = (torch.randn(5, *shape, generator=generator).double() for shape in ((2,), (8,), (6, 4, 4)))
    output = RoadworkOutput(logits=logits, weather_logits=weather, mask_logits=masks)
    terms = loss_terms(output, targets, LossConfig(), 1, PAIRS)
    labels = targets.labels
    torch.testing.assert_close(terms["roadwork"][2], 0.5 * focal_loss(logits, labels, LossConfig())[2])
    torch.testing.assert_close(terms["roadwork"][3], 0.5 * focal_loss(logits, labels[PAIRS.partner], LossConfig())[3])
    torch.testing.assert_close(terms["weather"][3], 0.5 * weather_loss(weather, targets)[3])
    other = Targets(labels, targets.weather, targets.masks[PAIRS.partner])
    torch.testing.assert_close(terms["segmentation"][0], 0.3 * segmentation_loss(masks, other)[0], rtol=1e-6, atol=0)
    _, weight = mixed_masks(targets, PAIRS)
    counts = dict(zip(TERMS, count_targets(targets).tolist(), strict=True))
    assert weight.sum().item() == pytest.approx(counts["segmentation"])
    assert combine(terms, count_targets(targets), LossConfig()).isfinite()


def test_nothing_to_learn_from_gives_no_loss_and_no_gradient():
    targets = Targets(torch.full((5,), -1), torch.full((5, 8), NAN), torch.full((5, 6, 4, 4), NAN))
    parts = [torch.randn(5, *shape, requires_grad=True) for shape in ((2,), (8,), (6, 4, 4))]
    output = RoadworkOutput(logits=parts[0], weather_logits=parts[1], mask_logits=parts[2])
    terms = loss_terms(output, targets, LossConfig(), 1, PAIRS)
    combine(terms, count_targets(targets), LossConfig()).backward()
    assert all((values == 0).all() for values in terms.values())
    assert all((part.grad == 0).all() for part in parts)


def test_gradients_are_right_and_finite_at_extreme_logits():
    targets = targets_of()
    shapes = ((2,), (8,), (6, 4, 4))

    def values(*parts):
        output = RoadworkOutput(**dict(zip(("logits", "weather_logits", "mask_logits"), parts, strict=True)))
        return tuple(loss_terms(output, targets, LossConfig(), 1, PAIRS).values())

    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(5, *shape, generator=generator).double().requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(values, parts)
    extreme = [
        (1e4 * torch.randint(-1, 2, (5, *shape), generator=generator).float()).requires_grad_() for shape in shapes
    ]
    sum(term.sum() for term in values(*extreme)).backward()
    assert all(part.grad.isfinite().all() for part in extreme)


# In training


def test_training_mixes_where_it_is_asked_to_and_evaluation_never_does(model):
    batch = {**tokens_of(model, photos()), "labels": torch.tensor([0, 1, 0, 1, 0])}
    wanted = {}
    for training in (False, True):
        for alpha in (0.0, 8.0):
            learner = with_loss(model, mixup_alpha=alpha).train(training)
            torch.manual_seed(0)
            first = learner(batch, with_loss=True).view_scores.detach()
            torch.manual_seed(0)
            torch.testing.assert_close(learner(batch, with_loss=True).view_scores, first, rtol=0, atol=0)
            wanted[training, alpha] = first
    assert torch.equal(wanted[False, 0.0], wanted[False, 8.0])
    assert torch.equal(wanted[True, 0.0], wanted[False, 0.0])
    changed = (wanted[True, 8.0] - wanted[True, 0.0]).abs().amax(dim=1) > 1e-4
    assert changed.sum() == 4  # two pairs, and one alone


def test_an_answer_alone_is_never_mixed(model):
    learner = with_loss(model, mixup_alpha=8.0).train()
    batch = {**tokens_of(model, photos()), "labels": torch.tensor([0, 1, 0, 1, 0])}
    assert torch.equal(learner(batch).view_scores, model(batch).view_scores)


def test_a_mixed_batch_gives_every_weight_a_finite_gradient(model):
    learner, targets = with_loss(model, mixup_alpha=1.0).train(), targets_of(dtype=torch.float32)
    batch = {
        **tokens_of(model, photos()), "labels": torch.tensor([0, 1, -1, 1, 0]), "mask_targets": targets.masks,
        "weather": targets.weather,
    }  # fmt: skip
    torch.manual_seed(0)
    learner(batch, keep_all=True, with_loss=True).loss.backward()
    gradients = [p.grad for p in learner.parameters() if p.grad is not None]
    assert len(gradients) > 50
    assert all(gradient.isfinite().all() for gradient in gradients)
