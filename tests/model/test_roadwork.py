import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import UserError
from pipeline.model.backbone import FrozenBackbone, pool_cells, pool_regions
from pipeline.model.encoder import Encoded, all_tokens
from pipeline.model.losses import Targets, count_targets
from pipeline.model.pruning import StoppingRule, rank_views
from pipeline.model.roadwork import RoadworkModel
from tests.model.examples import BATCH, METADATA, VIEWS, cached, random_photos, with_loss
from tests.small_run import make_backbone, make_model


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def model(backbone):
    return make_model(backbone)


@pytest.fixture
def learner(model):
    return with_loss(model)


@pytest.fixture
def photos():
    return random_photos()


WEIGHTS = {
    "roadwork": 0.40, "consistency": 0.25, "weather": 0.15, "segmentation": 0.20, "balance": 0.01, "router_z": 0.001,
    "distillation": 0.05, "evidence": 1.0, "evidence_masks": 1.0,
}  # fmt: skip


@torch.no_grad()
def test_two_stages_equal_full_computation_then_masking(model, photos):
    """Pruning before the backbone must give what pruning after it would."""
    full = model.encode(photos, keep_all=True)
    pruned = model.encode(photos)
    assert pruned.cls.shape[1] == 4
    take = pruned.indices
    by_hand = Encoded(
        cls=full.cls.gather(1, take[..., None].expand(-1, -1, full.cls.shape[-1])),
        cells=full.cells.gather(1, take[..., None, None].expand(-1, -1, *full.cells.shape[2:])),
        boxes=full.boxes.gather(1, take[..., None].expand(-1, -1, 4)),
        mask=full.mask.gather(1, take), indices=take, scores=full.scores, gates=full.gates.gather(1, take),
    )  # fmt: skip
    torch.testing.assert_close(model.answer(pruned).logits, model.answer(by_hand).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_masked_views_change_nothing(model, photos):
    """Views that do not exist may hold any pixels, kept or not."""
    photos["view_mask"][:, 2:] = False
    before = model(photos).logits
    photos["views"][:, 2:] = 255 - photos["views"][:, 2:]
    torch.testing.assert_close(model(photos).logits, before)


@torch.no_grad()
def test_encoded_views_are_the_backbones(model, photos, backbone):
    encoded = model.encode(photos)
    reference = FrozenBackbone(backbone)
    for photo in range(BATCH):
        cls, patches = reference(photos["views"][photo, encoded.indices[photo]])
        torch.testing.assert_close(encoded.cls[photo], cls, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(encoded.cells[photo], pool_cells(patches, 2), atol=1e-5, rtol=1e-4)


def backbone_flops(work):
    """Counted by PyTorch in the backbone alone."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return sum(counter.get_flop_counts()["DINOv3ViTModel"].values())


@torch.no_grad()
def test_all_tokens_are_the_backbones(model, photos):
    photos["view_mask"][1, 4:] = False
    tokens = all_tokens(model.backbone, **photos, pool_grid=2)
    for photo, exist in enumerate(photos["view_mask"]):
        cls, patches = model.backbone(photos["views"][photo, exist])
        torch.testing.assert_close(tokens.cls[photo, exist], cls, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tokens.cells[photo, exist], pool_cells(patches, 2), atol=1e-5, rtol=1e-4)
        regions = pool_regions(patches[:1], photos["boxes"][photo, None])[0]
        torch.testing.assert_close(tokens.regions[photo], regions, atol=1e-5, rtol=1e-4)
    assert not tokens.cls[1, 4:].any()
    assert not tokens.cells[1, 4:].any()


@pytest.mark.parametrize("pruning", ["scored", "dynamic", "off", "fixed", "oracle"])
@torch.no_grad()
def test_cached_tokens_give_the_same_answer_as_views(backbone, photos, pruning):
    photos["view_mask"][1, 4:] = False
    model = make_model(backbone, pruning=pruning, fixed_views=(7, 3, 5, 1))
    model.config.stopping = halfway_rule(model, photos)
    online, offline = model(photos), model(cached(model, photos))
    assert torch.equal(online.view_indices, offline.view_indices)
    for name in ("logits", "view_scores", "view_importance", "mask_logits"):
        torch.testing.assert_close(offline[name], online[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pruning", ["scored", "off"])
def test_views_that_do_not_exist_cost_the_backbone_nothing(backbone, photos, pruning):
    model = make_model(backbone, pruning=pruning, keep_views=8)
    photos["view_mask"][:] = torch.tensor([1, 1] + 10 * [0])
    assert backbone_flops(lambda: model.encode(photos)) == backbone_flops(
        lambda: model.backbone(photos["views"][:, :2].flatten(0, 1))
    )
    photos["view_mask"][:, 1] = False
    assert backbone_flops(lambda: all_tokens(model.backbone, **photos, pool_grid=2)) == backbone_flops(
        lambda: model.backbone(photos["views"][:, 0])
    )


def halfway_rule(model, photos):
    """A rule under which the global view is enough for some photos only."""
    first = model.log_odds(model.answer(keep_by_hand(model, photos, 1))).sort().values
    above = float(first[:2].mean() - first[0]) + 1
    return {"cut": float(first[0]) - 1, "margins_none": [99.0] * 3, "margins_roadwork": [above, 99.0, 99.0]}


def keep_by_hand(model, photos, keep):
    """The global view and the best of the others, as the scored mode would keep them."""
    source = model.source(photos)
    order = rank_views(model.encoder.score(source), photos["view_mask"], "scored", explore=False)
    indices = order[:, :keep].sort(dim=1).values
    mask = photos["view_mask"].gather(1, indices)
    return model.encoder.gather(source, photos["boxes"], model.encoder.score(source), indices, mask)


@torch.no_grad()
def test_dynamic_stops_at_the_first_round_that_is_certain_and_answers_as_from_those_views(backbone, photos):
    model = make_model(backbone, pruning="dynamic")
    assert model.encode(photos).mask.sum(dim=1).tolist() == [4, 4, 4], "without a rule it keeps all that it may"
    model.config.stopping = halfway_rule(model, photos)
    rule = StoppingRule(**model.config.stopping)
    by_rounds = [model.log_odds(model.answer(keep_by_hand(model, photos, keep))) for keep in (1, 2, 3, 4)]
    expected = [
        next(k for k in (1, 2, 3, 4) if k == 4 or rule.certain(by_rounds[k - 1], k - 1)[row]) for row in range(BATCH)
    ]
    assert len(set(expected)) > 1
    output = model(photos)
    assert output.view_mask.sum(dim=1).tolist() == expected
    answers = torch.stack([by_rounds[keep - 1][row] for row, keep in enumerate(expected)])
    torch.testing.assert_close(model.log_odds(output), answers, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_dynamic_spends_the_backbone_on_the_views_it_takes_only_and_stops_where_none_are_left(backbone, photos):
    model = make_model(backbone, pruning="dynamic")
    model.config.stopping = halfway_rule(model, photos)
    photos["view_mask"][2, 2:] = False
    taken = int(model.encode(photos).mask.sum())
    assert 3 < taken < 12
    one = backbone_flops(lambda: model.backbone(photos["views"][:1, 0]))
    assert backbone_flops(lambda: model.encode(photos)) == taken * one


@torch.no_grad()
def test_a_round_that_reaches_past_the_last_view_of_a_photo_takes_what_there_is(backbone, photos):
    model = make_model(backbone, pruning="dynamic", keep_views=12)
    model.config.stopping = {"cut": 0.0, "margins_none": [99.0] * 9, "margins_roadwork": [99.0] * 9}
    photos["view_mask"][1, 9:] = False
    assert model.encode(photos).mask.sum(dim=1).tolist() == [12, 9, 12]


@torch.no_grad()
def test_each_round_takes_the_views_of_all_undecided_photos_in_one_pass(backbone, photos, monkeypatch):
    model = make_model(backbone, pruning="dynamic")
    model.config.stopping = {"cut": 0.0, "margins_none": [99.0] * 3, "margins_roadwork": [99.0] * 3}
    passes, call = [], FrozenBackbone.__call__
    monkeypatch.setattr(FrozenBackbone, "__call__", lambda self, v: (passes.append(len(v)), call(self, v))[1])
    model.encode(photos)
    assert passes == [BATCH] * 4


def test_training_in_dynamic_mode_asks_the_head_after_different_numbers_of_views(backbone, photos):
    model = make_model(backbone, pruning="dynamic").train()
    torch.manual_seed(0)
    counts = {model.encode(photos).indices.shape[1] for _ in range(30)}
    assert counts == {1, 2, 3, 4}
    assert model.encode(photos, keep_all=True).indices.shape[1] == VIEWS


@torch.no_grad()
def test_the_oracle_keeps_the_views_that_matter_most_among_all_twelve(backbone, photos):
    model = make_model(backbone, pruning="oracle")
    importance = model(photos, keep_all=True).view_importance
    best = importance[:, 1:].topk(3).indices + 1
    assert model.encode(photos).indices[:, 1:].tolist() == best.sort().values.tolist()


@torch.no_grad()
def test_a_stopping_rule_is_saved_with_the_model(backbone, photos, tmp_path):
    model = make_model(backbone, pruning="dynamic")
    model.config.stopping = halfway_rule(model, photos)
    model.save_pretrained(tmp_path)
    again = RoadworkModel.from_pretrained(tmp_path)
    assert again.config.stopping == model.config.stopping
    assert torch.equal(again(photos).view_mask, model(photos).view_mask)


def test_eight_of_twelve_views_cost_a_third_less_of_the_backbone(backbone, photos):
    models = {keep: make_model(backbone, keep_views=keep) for keep in (8, 12)}
    flops = {keep: backbone_flops(partial(model.encode, photos)) for keep, model in models.items()}
    assert flops[8] / flops[12] == pytest.approx(8 / 12, rel=1e-9)


def test_the_loss_reaches_every_trained_parameter_and_no_frozen_one(learner, photos):
    model = learner.train()
    targets = {"labels": torch.tensor([0, 1, 1]), "mask_targets": torch.rand(BATCH, 6, 4, 4)}
    for module in model.modules():
        for rate in ("field_dropout", "all_dropout"):
            if hasattr(module, rate):
                setattr(module, rate, 0.0)
    model({**photos, **METADATA, **targets}, keep_all=True, with_loss=True).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad is None for p in model.backbone.model.parameters())
    assert not model.backbone.model.training


def test_the_backbone_is_in_no_list_and_no_file(model, tmp_path):
    frozen = {id(p) for p in model.backbone.model.parameters()}
    assert not frozen & {id(p) for p in model.parameters()}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(dict(model.named_parameters()))


@torch.no_grad()
def test_saving_and_loading_gives_the_same_logits(model, photos, tmp_path):
    model.save_pretrained(tmp_path)
    again = RoadworkModel.from_pretrained(tmp_path)
    assert not again.training
    assert torch.equal(again({**photos, **METADATA}).logits, model({**photos, **METADATA}).logits)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "None", "1": "Roadwork"}


def test_weights_that_do_not_fit_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights.pop("head.norm.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"head\.norm\.weight"):
        RoadworkModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no model"):
        RoadworkModel.from_pretrained(tmp_path / "absent")


def test_a_backbone_of_another_width_is_refused(model, dinov3_folder):
    with pytest.raises(UserError, match="width 64"):
        model.attach(FrozenBackbone(dinov3_folder))


@torch.no_grad()
def test_null_metadata_is_the_same_as_none_given(model, photos):
    nothing = model(photos).logits
    known = {**photos, **METADATA}
    assert torch.equal(model(known, null_metadata=True).logits, nothing)
    assert not torch.allclose(model(known).logits, nothing)


@torch.no_grad()
def test_the_batch_says_whose_metadata_is_null_unless_the_caller_does(model, photos):
    known, blind = {**photos, **METADATA}, torch.tensor([True, False, True])
    seen, nothing = model(known).logits, model(photos).logits
    assert not torch.allclose(seen[0], nothing[0])
    torch.testing.assert_close(
        model({**known, "null_metadata": blind}).logits, torch.where(blind[:, None], nothing, seen), rtol=0, atol=0
    )
    assert torch.equal(model({**known, "null_metadata": blind}, null_metadata=False).logits, seen)
    assert torch.equal(model({**known, "null_metadata": blind}, null_metadata=True).logits, nothing)


@torch.no_grad()
def test_names_that_the_model_does_not_know_are_passed_over(model, photos):
    whole = {**photos, **METADATA, "row": torch.arange(BATCH), "labels": torch.tensor([0, 1, -1])}
    assert torch.equal(model(whole).logits, model({**photos, **METADATA}).logits)


def test_the_loss_is_shared_out_by_the_counts_it_is_given(learner, photos):
    """Two micro-batches with the counts of both together give the loss of one batch."""
    labels, masks = torch.tensor([0, 1, -1]), torch.rand(BATCH, 6, 4, 4)
    masks[1] = torch.nan
    batch = {**photos, **METADATA, "labels": labels, "mask_targets": masks}
    whole = learner(batch, with_loss=True)
    counts = count_targets(Targets(labels, METADATA["weather"], masks))
    parts = [
        learner({key: value[rows] for key, value in batch.items()}, with_loss=True, target_counts=counts).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole.loss)


def test_a_model_without_weights_of_a_loss_refuses_to_give_one(model, photos):
    with pytest.raises(AssertionError, match="built with a LossConfig"):
        model({**photos, "labels": torch.tensor([0, 1, 1])}, with_loss=True)


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_the_weights_given_to_the_constructor_are_those_used(model, photos, training):
    """The loss against a sum that is written out here; and in training as well, where only the views differ."""
    batch = {**photos, **METADATA, "labels": torch.tensor([0, 1, 1]), "mask_targets": torch.rand(BATCH, 6, 4, 4)}
    counts = {"weather": 2}  # of three photos; all other targets are there for each
    found = []
    for weights in ({}, {"roadwork": 0.8}, {"segmentation": 3.0, "router_z": 0.5}):
        learner = with_loss(model, **weights).train(training)
        torch.manual_seed(0)
        output = learner(batch, with_loss=True)
        wanted = {**WEIGHTS, **weights}
        assert output.loss_terms.keys() == wanted.keys()
        expected = sum(
            wanted[term] * float(values.double().sum()) / counts.get(term, BATCH)
            for term, values in output.loss_terms.items()
        )
        assert float(output.loss) == pytest.approx(expected, rel=1e-5)
        found.append(float(output.loss))
    assert min(abs(found[0] - other) for other in found[1:]) > 1e-2


@torch.no_grad()
def test_the_focal_shape_given_to_the_constructor_is_used(model, photos):
    labels, alpha, gamma = torch.tensor([0, 1, 1]), 0.9, 1.0
    learner = with_loss(model, focal_alpha=alpha, focal_gamma=gamma, label_smoothing=0.0)
    output = learner({**photos, "labels": labels}, with_loss=True)
    p = output.trunk_logits.double().softmax(-1)[torch.arange(BATCH), labels]
    weight = torch.where(labels == 1, alpha, 1 - alpha).double()
    torch.testing.assert_close(
        output.loss_terms["roadwork"].double(), -weight * (1 - p) ** gamma * p.log(), rtol=1e-5, atol=1e-7
    )


@torch.no_grad()
def test_a_saved_model_answers_without_weights_of_a_loss(learner, photos, tmp_path):
    learner.save_pretrained(tmp_path)
    again = RoadworkModel.from_pretrained(tmp_path)
    assert again.loss_config is None
    assert torch.equal(again(photos).logits, learner(photos).logits)
    assert "loss" not in (tmp_path / "config.json").read_text()


@torch.no_grad()
def test_random_pruning_is_the_control(backbone, photos):
    torch.manual_seed(0)
    model = make_model(backbone, pruning="random")
    chosen = torch.cat([model.encode(photos).indices for _ in range(40)])
    assert (chosen[:, 0] == 0).all()
    counts = chosen[:, 1:].flatten().bincount(minlength=12)[1:]
    assert counts.min() > 0.6 * counts.float().mean()


def test_probability_moves_with_the_decision_bias(model):
    logits = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    torch.testing.assert_close(model.probability(logits), torch.sigmoid(torch.tensor([1.0, -1.0])))
    model.config.decision_bias = 1.0
    torch.testing.assert_close(model.probability(logits), torch.sigmoid(torch.tensor([0.0, -2.0])))


PARTS = {
    "pyramid": ({"pyramid": False}, ("head.pyramid.",)),
    "gate": ({"attention_gate": False}, ("attention.gate_proj.",)),
    "experts": ({"experts": 1}, ("mlp.block.",)),
    "fusion": ({"fusion": "mean"}, ("head.fusion.",)),
}


@pytest.mark.parametrize(("switch", "gone"), PARTS.values(), ids=PARTS)
def test_a_part_that_is_switched_off_leaves_no_weights_and_a_model_that_learns_and_is_saved(
    backbone, photos, tmp_path, switch, gone
):
    whole, model = make_model(backbone), with_loss(make_model(backbone, **switch))
    assert any(part in name for name, _ in whole.named_parameters() for part in gone)
    assert not any(part in name for name, _ in model.named_parameters() for part in gone)
    model.train()({**photos, "labels": torch.tensor([0, 1, 1])}, with_loss=True).loss.backward()
    assert all(p.grad is not None for p in model.head.layers.parameters())
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        again, before = RoadworkModel.from_pretrained(tmp_path)(photos), model(photos)
    assert torch.equal(again.logits, before.logits)


def test_fusion_without_importance_has_no_oracle(backbone):
    with pytest.raises(UserError, match=r"model\.fusion is 'mean', but must be gated with the pruning mode oracle"):
        make_model(backbone, fusion="mean", pruning="oracle")
