import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import UserError
from pipeline.losses import LossConfig, Targets, count_targets
from pipeline.model.backbone import FrozenBackbone, pool_cells
from pipeline.model.encoder import Encoded
from pipeline.model.roadwork import RoadworkModel
from tests.small_run import SIDE, make_backbone, make_model

BATCH, VIEWS = 3, 12


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def model(backbone):
    return make_model(backbone)


@pytest.fixture
def photos():
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(BATCH, VIEWS, 2, generator=generator) * 0.5
    boxes = torch.cat([corner, corner + 0.4], dim=-1)
    boxes[:, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    return {
        "views": torch.randint(0, 256, (BATCH, VIEWS, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        "boxes": boxes,
        "view_mask": torch.ones(BATCH, VIEWS, dtype=torch.bool),
    }


METADATA = {
    "gps": torch.tensor([[55.7, 13.2], [52.5, 13.4], [torch.nan, torch.nan]]),
    "weather": torch.tensor([[1.0] + [0.0] * 7, [0.0] * 7 + [1.0], [torch.nan] * 8]),
    "daytime": torch.tensor([1, 2, 0]),
    "scene": torch.tensor([1, 0, 3]),
}


@torch.no_grad()
def test_two_stages_equal_full_computation_then_masking(model, photos):
    """Pruning before the backbone must give what pruning after it would."""
    full = model.encode(**photos, keep_all=True)
    pruned = model.encode(**photos)
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
    before = model(**photos).logits
    photos["views"][:, 2:] = 255 - photos["views"][:, 2:]
    torch.testing.assert_close(model(**photos).logits, before)


@torch.no_grad()
def test_encoded_views_are_the_backbones(model, photos, backbone):
    encoded = model.encode(**photos)
    reference = FrozenBackbone(backbone)
    for photo in range(BATCH):
        cls, patches = reference(photos["views"][photo, encoded.indices[photo]])
        torch.testing.assert_close(encoded.cls[photo], cls, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(encoded.cells[photo], pool_cells(patches, 2), atol=1e-5, rtol=1e-4)


def test_eight_of_twelve_views_cost_a_third_less_of_the_backbone(backbone, photos):
    flops = {}
    for keep in (8, 12):
        model = make_model(backbone, keep_views=keep)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.encode(**photos)
        by_module = counter.get_flop_counts()
        flops[keep] = sum(by_module["DINOv3ViTModel"].values())
    assert flops[8] / flops[12] == pytest.approx(8 / 12, rel=1e-3)


def test_the_loss_reaches_every_trained_parameter_and_no_frozen_one(model, photos):
    model.train()
    targets = {"labels": torch.tensor([0, 1, 1]), "mask_targets": torch.rand(BATCH, 6, 4, 4)}
    for module in model.modules():
        for rate in ("field_dropout", "all_dropout"):
            if hasattr(module, rate):
                setattr(module, rate, 0.0)
    model(**photos, **METADATA, **targets, keep_all=True).loss.backward()
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
    assert torch.equal(again(**photos, **METADATA).logits, model(**photos, **METADATA).logits)
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
    nothing = model(**photos).logits
    assert torch.equal(model(**photos, **METADATA, null_metadata=True).logits, nothing)
    assert not torch.allclose(model(**photos, **METADATA).logits, nothing)


def test_the_loss_is_shared_out_by_the_counts_it_is_given(model, photos):
    """Two micro-batches with the counts of both together give the loss of one batch."""
    labels, masks = torch.tensor([0, 1, -1]), torch.rand(BATCH, 6, 4, 4)
    masks[1] = torch.nan
    whole = model(**photos, **METADATA, labels=labels, mask_targets=masks)
    counts = count_targets(Targets(labels, METADATA["weather"], masks))
    parts = [
        model(
            **{key: value[rows] for key, value in {**photos, **METADATA}.items()},
            labels=labels[rows], mask_targets=masks[rows], target_counts=counts,
        ).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]  # fmt: skip
    torch.testing.assert_close(parts[0] + parts[1], whole.loss)


def test_the_loss_configuration_is_used(model, photos):
    labels = torch.tensor([0, 1, 1])
    before = model(**photos, labels=labels).loss
    model.loss_config = LossConfig(roadwork=0.8)
    assert not torch.allclose(model(**photos, labels=labels).loss, before)


@pytest.mark.parametrize("head", ["single_view", "mean_pool", "attention_mil"])
def test_a_baseline_learns_and_ignores_metadata(backbone, photos, head):
    model = make_model(backbone, head=head)
    photos = {key: value[:, : model.config.num_views] for key, value in photos.items()}
    output = model(**photos, labels=torch.tensor([0, 1, 1]), **METADATA)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(model(**photos).logits, output.logits)


@torch.no_grad()
def test_attention_mil_weights_sum_to_one_over_existing_views(backbone, photos):
    photos["view_mask"][0, 5:] = False
    importance = make_model(backbone, head="attention_mil")(**photos).view_importance
    torch.testing.assert_close(importance.sum(dim=1), torch.ones(BATCH))
    assert not importance[0, 5:].any()


@torch.no_grad()
def test_random_pruning_is_the_control(backbone, photos):
    torch.manual_seed(0)
    model = make_model(backbone, pruning="random")
    chosen = torch.cat([model.encode(**photos).indices for _ in range(40)])
    assert (chosen[:, 0] == 0).all()
    counts = chosen[:, 1:].flatten().bincount(minlength=12)[1:]
    assert counts.min() > 0.6 * counts.float().mean()


def test_probability_moves_with_the_decision_bias(model):
    logits = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    torch.testing.assert_close(model.probability(logits), torch.sigmoid(torch.tensor([1.0, -1.0])))
    model.config.decision_bias = 1.0
    torch.testing.assert_close(model.probability(logits), torch.sigmoid(torch.tensor([0.0, -2.0])))
