"""Cell evidence: against float64 arithmetic, pixels counted one by one, and the trunk it must leave alone."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import expit, logsumexp
from torch import nn

from pipeline.model.config import TERMS, LossConfig, ModelConfig
from pipeline.model.evidence import (
    CellEvidence,
    as_logits,
    cell_boxes,
    cell_targets,
    evidence_mask_loss,
    join,
    stitch_map,
)
from pipeline.model.losses import Targets, combine, count_targets, loss_terms
from pipeline.model.mixup import Mix
from pipeline.model.output import RoadworkOutput
from pipeline.model.trunk import Trunk
from tests.model.synthetic import DIM, all_views, learner, photos

NAN = float("nan")
MASK = torch.arange(5) < torch.tensor([[5], [3], [1]])
OWN = ("evidence", "evidence_masks")


def reference(judge, cells):
    """The perceptron of float64 [..., 2D] in NumPy: the log-odds of each cell."""
    norm, first, _, _, last = judge
    centred = cells - cells.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm.eps)
    normed = normed * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    hidden = normed @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    return (hidden * expit(hidden)) @ last.weight.detach().numpy()[0] + last.bias.item()


def random_judge():
    torch.manual_seed(0)
    branch = CellEvidence(8, 0.3).double().eval()
    for parameter in branch.parameters():
        nn.init.normal_(parameter, std=0.5)
    return branch, 2 * torch.randn(3, 5, 4, 16).double()


def test_a_photos_log_odds_are_the_log_of_the_sum_of_its_cells_odds():
    branch, cells = random_judge()
    log_odds, found = branch(cells, MASK)
    expected = reference(branch.judge, cells.numpy())
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-9)
    for photo in range(3):
        own = logsumexp(expected[photo][MASK[photo].numpy()])
        assert log_odds[photo].item() == pytest.approx(own, rel=1e-9)


def test_cells_of_views_that_do_not_exist_change_no_answer_and_get_no_gradient():
    branch, cells = random_judge()
    before, _ = branch(cells, MASK)
    moved = torch.where(MASK[..., None, None], cells, 99 * cells - 5).requires_grad_()
    after, _ = branch(moved, MASK)
    assert torch.equal(after, before)
    after.sum().backward()
    assert not moved.grad[~MASK].any()
    assert moved.grad.isfinite().all()
    assert moved.grad[MASK].flatten(1).any(dim=1).all()


def test_a_new_branch_takes_few_cells_for_roadwork():
    """Of 16 views' cells each has the odds of the prior, so that the first steps do not unlearn a certain answer."""
    torch.manual_seed(0)
    cells = torch.randn(64, 8, 16, 2 * DIM)
    log_odds, found = CellEvidence(DIM, 0.1)(cells, torch.ones(64, 8, dtype=torch.bool))
    assert found.sigmoid().mean() < 0.01
    assert log_odds.sigmoid().mean() < 0.6


def test_joined_log_odds_are_the_weighted_mean_of_both():
    fused, evidence = torch.randn(6, 2).double(), torch.randn(6).double()
    for share in (0.0, 0.3, 1.0):
        joined = join(fused, evidence, share).numpy()
        z = fused.numpy()[:, 1] - fused.numpy()[:, 0]
        np.testing.assert_allclose(
            joined[:, 1] - joined[:, 0], np.average([z, evidence], axis=0, weights=[1 - share, share])
        )


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@torch.no_grad()
def test_the_share_says_how_much_the_evidence_counts_in_the_answer(share):
    model, batch = learner(0, evidence_share=share).eval(), photos(5, seed=1)
    output = model(batch)
    fused = (output.trunk_logits[:, 1] - output.trunk_logits[:, 0]).numpy()
    expected = np.average([fused, output.evidence_logits], axis=0, weights=[1 - share, share])
    np.testing.assert_allclose(model.log_odds(output), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(fused - output.evidence_logits.numpy()).min() > 1e-3


def random_places(seed, photos=3, views=4, pixels=96, grid=2):
    """Boxes whose cells end between pixels, and masks on a 4 x 4 grid of which classes overlap."""
    generator = np.random.default_rng(seed)
    step = 2 * grid  # so that a cell has whole pixels
    low = generator.integers(0, pixels // step // 2, (photos, views, 2)) * step
    size = generator.integers(1, pixels // step // 2, (photos, views, 2)) * step
    masks = 0.05 * generator.random((photos, 6, 4, 4)) * (generator.random((photos, 6, 4, 4)) < 0.15)
    return np.concatenate([low, low + size], axis=-1), masks


@pytest.mark.parametrize("seed", range(5))
def test_what_a_cell_shows_is_what_its_pixels_show(seed):
    boxes, masks = random_places(seed)
    found = cell_targets(torch.from_numpy(masks), torch.from_numpy(boxes / 96), 2).numpy()
    places = cell_boxes(torch.from_numpy(boxes / 96), 2).numpy() * 96
    seen = set()
    for photo, view in np.ndindex(boxes.shape[:2]):
        pixels = np.kron(masks[photo].sum(axis=0).clip(max=1), np.ones((24, 24)))
        left, top, right, bottom = boxes[photo, view]
        part = pixels[top:bottom, left:right]
        height, width = part.shape[0] // 2, part.shape[1] // 2
        for cell, (row, column) in enumerate(np.ndindex(2, 2)):
            own = part[row * height : (row + 1) * height, column * width : (column + 1) * width]
            assert found[photo, view, cell] == pytest.approx(min(1.0, own.mean() / 0.05), abs=1e-9)
            np.testing.assert_allclose(
                places[photo, view, cell],
                [left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height],
            )
            seen.add(round(float(found[photo, view, cell]), 2))
    assert {0.0, 1.0} < seen  # and something between them


def test_the_mask_loss_is_the_mean_over_the_cells_of_existing_views():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator).double()
    corner = torch.rand(3, 5, 2, generator=generator).double() / 2
    boxes = torch.cat([corner, corner + 0.4], dim=-1)
    masks = (torch.rand(3, 6, 4, 4, generator=generator) < 0.05).double()
    found = evidence_mask_loss(RoadworkOutput(evidence_map=logits, view_boxes=boxes, view_mask=MASK), masks)
    targets = cell_targets(masks, boxes, 2)
    for photo in range(3):
        p, t = expit(logits[photo][MASK[photo]].numpy()), targets[photo][MASK[photo]].numpy()
        expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
        assert found[photo].item() == pytest.approx(expected, rel=1e-9)


# The branch and the trunk


def gradients(model, batch, terms):
    """The gradient of some loss terms in every parameter, None where they do not reach it."""
    torch.manual_seed(0)
    found = model(batch, with_loss=True, keep_all=True).loss_terms
    loss = torch.stack([found[term].sum() for term in terms]).sum()
    weights = dict(model.named_parameters())
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))


def with_masks(batch):
    generator = torch.Generator().manual_seed(0)
    return {**batch, "mask_targets": torch.rand(len(batch["labels"]), 6, 4, 4, generator=generator)}


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pruning", ["scored", "off"])
def test_no_loss_of_the_branch_reaches_the_trunk_and_none_of_the_trunk_the_branch(heads, pruning):
    model, batch = learner(0, heads=heads, pruning=pruning), with_masks(photos(6, seed=1))
    by_branch, by_trunk = gradients(model, batch, OWN), gradients(model, batch, [t for t in TERMS if t in OUTSIDE])
    for name in by_branch:
        inside = ".evidence." in name
        assert (by_branch[name] is None) != inside, name
        assert by_trunk[name] is None or not inside, name
    assert sum(gradient is not None for gradient in by_trunk.values()) > 20


OUTSIDE = ("roadwork", "consistency", "segmentation", "distillation")


@pytest.mark.parametrize("version", [1, 2])
def test_the_trunk_learns_bit_for_bit_as_without_the_branch(version):
    with_it, without = (learner(3, evidence=on, dropout=0.0, version=version) for on in (True, False))
    batch = with_masks(photos(6, seed=1))
    found, expected = (gradients(model, batch, list(model_terms(model, batch))) for model in (with_it, without))
    weights = dict(with_it.named_parameters())
    for name, weight in without.named_parameters():
        assert torch.equal(weights[name], weight), name
        if expected[name] is None:
            assert found[name] is None
        else:
            assert torch.equal(found[name], expected[name]), name


def model_terms(model, batch):
    return model(batch, with_loss=True, keep_all=True).loss_terms


def three_views(batch):
    """The global view, the one with the sign and the next, so that training is quick."""
    encoded = all_views(batch)
    own = encoded.cells[:, 1:-1, :, :6].mean(dim=-1).amax(dim=-1).argmax(dim=1) + 1
    take = torch.stack([torch.zeros_like(own), own, own + 1], dim=1)
    rows = torch.arange(len(take))[:, None]
    return replace(
        encoded, cls=encoded.cls[rows, take], cells=encoded.cells[rows, take], boxes=encoded.boxes[rows, take],
        mask=encoded.mask[rows, take], indices=take, gates=encoded.gates[rows, take],
    )  # fmt: skip


def trunk_loss(seed, evidence, steps=60):
    """Cross entropy of the fused head alone on new photos, after training with or without the branch."""
    config = ModelConfig(
        backbone="none", view_side=32, pool_grid=2, width=16, layers=1, heads=2, fusion_heads=2, experts=1,
        experts_per_token=1, expert_width=16, mask_side=4, metadata=(), evidence=evidence, evidence_share=0.5,
    )  # fmt: skip
    torch.manual_seed(seed)
    trunk, loss = Trunk(config, DIM), LossConfig(roadwork=1.0, focal_gamma=0.0, focal_alpha=0.5, label_smoothing=0.0)
    optimizer = torch.optim.AdamW(trunk.parameters(), lr=3e-3)
    for step in range(steps):
        torch.manual_seed(step)
        batch = photos(32, seed=1000 * seed + step)
        nothing = Targets(batch["labels"], torch.full((32, 8), NAN), torch.full((32, 6, 4, 4), NAN))
        output = trunk(three_views(batch), dict.fromkeys(("gps", "weather", "daytime", "scene", "text")), True)
        optimizer.zero_grad()
        combine(loss_terms(output, nothing, loss, 1), count_targets(nothing), loss).backward()
        optimizer.step()
    test = photos(200, seed=77)
    with torch.no_grad():
        output = trunk.eval()(three_views(test), dict.fromkeys(("gps", "weather", "daytime", "scene", "text")), True)
        return F.cross_entropy(output.trunk_logits, test["labels"]).item()


def test_the_fused_head_alone_learns_as_well_with_the_branch_as_without():
    """Under one loss on the joined answer it does not: the branch learns first, and leaves it little to learn."""
    found, expected = (np.array([trunk_loss(seed, on) for seed in range(2)]) for on in (True, False))
    assert expected.mean() < 0.5 * np.log(2)  # so that there is something to lose
    assert found.mean() < expected.mean() + 0.05


# The heat map


@pytest.mark.parametrize("seed", range(3))
def test_the_heat_map_is_a_probability_and_shows_a_hot_cell_where_it_is(seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.75, 1.0]]])
    logits = torch.full((1, 2, 16), -12.0)
    hot = int(torch.randint(16, (1,), generator=generator))
    logits[0, 1, hot] = 12.0
    output = RoadworkOutput(evidence_map=logits, view_boxes=boxes, view_mask=torch.ones(1, 2, dtype=torch.bool))
    found = stitch_map(output, 32)[0]
    assert found.shape == (32, 32)
    assert 0 <= found.min() <= found.max() <= 1
    row, column = 16 + 4 * (hot // 4), 8 + 4 * (hot % 4)  # of the view's 16 x 16 points
    assert found[row : row + 4, column : column + 4].min() > 0.7
    found[row : row + 4, column : column + 4] = 0
    assert found.max() < 1e-4


def test_views_that_do_not_exist_are_not_in_the_heat_map():
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.75, 1.0]]])
    logits = torch.stack([torch.full((16,), -3.0), torch.full((16,), 9.0)])[None]
    output = RoadworkOutput(evidence_map=logits, view_boxes=boxes, view_mask=torch.tensor([[True, False]]))
    torch.testing.assert_close(stitch_map(output, 8), torch.full((1, 8, 8), float(expit(-3))))


# Mixup


def test_mixed_photos_get_mixed_losses_and_mixed_masks():
    """A pair of which one photo has a mask takes that mask whole, at its share; a photo without any adds nothing."""
    torch.manual_seed(0)
    batch = photos(4, seed=2)
    model = learner(0).eval()
    output = model(batch, keep_all=True)
    masks = (torch.rand(4, 6, 4, 4) < 0.2).float()
    masks[1] = masks[3] = NAN
    targets = Targets(torch.tensor([0, 1, -1, 1]), torch.full((4, 8), NAN), masks)
    mix = Mix(torch.tensor([1, 0, 2, 3]), torch.tensor([0.7, 0.7, 1.0, 1.0]))
    mixed, plain = (loss_terms(output, targets, LossConfig(), 1, given) for given in (mix, None))
    swapped = loss_terms(output, targets.of(mix.partner), LossConfig(), 1)
    for row, share in enumerate(mix.share.tolist()):
        for term, other in (("evidence", swapped["evidence"]), ("evidence_masks", swapped["evidence_masks"])):
            torch.testing.assert_close(mixed[term][row], share * plain[term][row] + (1 - share) * other[row])
    assert mixed["evidence"][2] == 0
    assert mixed["evidence_masks"][3] == 0
    both = Targets(targets.labels, targets.weather, masks.nan_to_num(0.0))
    soft = loss_terms(output, both, LossConfig(), 1, mix)["evidence_masks"]
    blend = 0.7 * both.masks[:2] + 0.3 * both.masks[:2].flip(0)
    by_hand = evidence_mask_loss(output, torch.cat([blend, both.masks[2:]]))
    torch.testing.assert_close(soft, by_hand)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_batch_without_masks_and_labels_teaches_the_branch_nothing(alpha):
    model = learner(0, LossConfig(mixup_alpha=alpha)).train()
    batch = {**photos(4, seed=2), "labels": torch.full((4,), -1)}
    output = model(batch, with_loss=True)
    output.loss.backward()
    assert output.loss.isfinite()
    assert not output.loss_terms["evidence"].any()
    assert not output.loss_terms["evidence_masks"].any()
    assert not any(p.grad.any() for p in model.head.evidence.parameters())


def test_as_logits_keeps_the_log_odds():
    logits = as_logits(torch.tensor([-1.5, 0.2]))
    torch.testing.assert_close(logits.softmax(dim=-1)[:, 1], torch.tensor([-1.5, 0.2]).sigmoid())


def test_a_model_without_the_branch_has_no_evidence():
    model = learner(0, evidence=False).eval()
    output = model(photos(2, seed=0))
    assert (output.evidence_logits, output.evidence_map, output.fused_logits) == (None, None, None)
    assert not any("evidence" in name for name, _ in model.named_parameters())
    assert asdict(model.config.sizes)["evidence"] is False
