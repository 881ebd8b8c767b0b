"""The baseline heads, and every head in the precision that a GPU trains in."""

import numpy as np
import pytest
import torch

from tests.model.examples import BATCH, METADATA, cached, random_photos, with_loss
from tests.small_run import make_backbone, make_model


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def photos():
    return random_photos()


@pytest.mark.parametrize("head", ["single_view", "mean_pool", "cell_mil"])
@torch.no_grad()
def test_baselines_answer_from_cached_tokens_too(backbone, photos, head):
    model = make_model(backbone, head=head)
    photos = {key: value[:, : model.config.input_spec.num_views] for key, value in photos.items()}
    torch.testing.assert_close(model(cached(model, photos)).logits, model(photos).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", ["single_view", "mean_pool", "attention_mil", "cell_mil"])
def test_a_baseline_learns_and_ignores_metadata(backbone, photos, head):
    model = with_loss(make_model(backbone, head=head))
    photos = {key: value[:, : model.config.input_spec.num_views] for key, value in photos.items()}
    output = model({**photos, **METADATA, "labels": torch.tensor([0, 1, 1])}, with_loss=True)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(model(photos).logits, output.logits)


@torch.no_grad()
def test_attention_mil_weights_sum_to_one_over_existing_views(backbone, photos):
    photos["view_mask"][0, 5:] = False
    importance = make_model(backbone, head="attention_mil")(photos).view_importance
    torch.testing.assert_close(importance.sum(dim=1), torch.ones(BATCH))
    assert not importance[0, 5:].any()


@torch.no_grad()
def test_cell_mil_takes_a_photo_for_roadwork_by_the_sum_of_its_cells_odds_wherever_they_are(backbone, photos):
    photos["view_mask"][0, 5:] = False
    model = make_model(backbone, head="cell_mil")
    output = model(photos)
    for photo in range(BATCH):
        cells = output.evidence_map[photo][photos["view_mask"][photo]].double().numpy()
        assert model.log_odds(output)[photo].item() == pytest.approx(np.log(np.exp(cells).sum()), rel=1e-4)
    moved = {**photos, "boxes": photos["boxes"].flip(1)}
    torch.testing.assert_close(model(moved).logits, output.logits)


def test_cell_mil_learns_from_masks_where_there_are_any(backbone, photos):
    model = with_loss(make_model(backbone, head="cell_mil"))
    masks = torch.zeros(BATCH, 6, 4, 4)
    masks[0, 0], masks[1] = 1.0, torch.nan
    batch = {**photos, "labels": torch.full((BATCH,), -1), "mask_targets": masks}
    output = model(batch, with_loss=True)
    terms = {term: values.detach().tolist() for term, values in output.loss_terms.items()}
    assert set(terms) == {"roadwork", "evidence_masks"}
    assert terms["roadwork"] == [0.0] * BATCH
    assert terms["evidence_masks"][1] == 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        model(batch, with_loss=True).loss.backward()
        optimizer.step()
    found = model(batch).evidence_map.detach().sigmoid()
    assert found[0].min() > 0.5 > found[2].max()


def step_in_bf16(model, batch):
    """Loss and gradients of one training step, as DeepSpeed's engine takes it: the head in bf16, the backbone as is."""
    model.to(torch.bfloat16).train()
    torch.manual_seed(0)
    output = model(batch, with_loss=True)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tokens", ["online", "cached", "cached in bf16"])
@pytest.mark.parametrize("head", ["roadwork", "single_view", "mean_pool", "attention_mil", "cell_mil"])
def test_every_head_takes_a_step_in_bf16(backbone, photos, head, tokens):
    model = with_loss(make_model(backbone, head=head))
    photos = {key: value[:, : model.config.input_spec.num_views] for key, value in photos.items()}
    given = photos if tokens == "online" else cached(model, photos)
    if tokens == "cached in bf16":  # as the feature cache holds them
        given = {**given, **{name: given[name].to(torch.bfloat16) for name in ("cls", "cells", "regions")}}
    targets = {"labels": torch.tensor([0, 1, 1]), "mask_targets": torch.rand(BATCH, 6, 4, 4)}
    output, gradients = step_in_bf16(model, {**given, **METADATA, **targets})
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()
    used = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    assert all(gradient.isfinite().all() for gradient in used.values())
    assert used.keys() == gradients.keys() or head == "roadwork"  # whose fields and experts may have no photo
    assert any(gradient.any() for gradient in used.values())


@pytest.mark.parametrize("head", ["single_view", "mean_pool", "attention_mil", "cell_mil"])
@torch.no_grad()
def test_a_baseline_in_bf16_answers_as_in_fp32_but_for_rounding(backbone, photos, head):
    model = make_model(backbone, head=head)
    photos = {key: value[:, : model.config.input_spec.num_views] for key, value in photos.items()}
    expected = model(photos).logits
    assert expected.dtype == torch.float32
    found = model.to(torch.bfloat16)(photos).logits
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
