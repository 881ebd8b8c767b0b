import json
import math
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from torch import nn
from transformers import DINOv3ViTModel, ViTConfig, ViTModel

from pipeline.errors import UserError
from pipeline.model import backbone as room
from pipeline.model.backbone import FrozenBackbone, compute_dtype, pool_cells, pool_regions, vith16plus_config

REGISTERS = 3


def random_views(count, side=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def backbone(dinov3_folder):
    return FrozenBackbone(dinov3_folder)


class Parent(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def test_tokens_equal_those_of_the_plain_model_on_normalised_pixels(backbone, dinov3_folder):
    views = random_views(2)
    pixels = views.numpy().astype(np.float64) / 255
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        pixels[:, channel] = (pixels[:, channel] - mean) / std
    plain = DINOv3ViTModel.from_pretrained(dinov3_folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = plain(pixel_values=torch.from_numpy(pixels).float()).last_hidden_state
    cls, patches = backbone(views)
    assert cls.shape == (2, 64)
    assert patches.shape == (2, 4, 4, 64)
    torch.testing.assert_close(cls, expected[:, 0], rtol=1e-4, atol=1e-5)
    for row in range(4):
        for column in range(4):
            token = expected[:, 1 + REGISTERS + 4 * row + column]
            torch.testing.assert_close(patches[:, row, column], token, rtol=1e-4, atol=1e-5)


def test_each_patch_token_stands_where_its_pixels_are(dinov3_folder):
    backbone = FrozenBackbone(dinov3_folder)
    for name, parameter in backbone.model.named_parameters():
        if "o_proj" in name:  # without attention a token knows its own pixels only
            parameter.data.zero_()
    views = random_views(1)
    changed = views.clone()
    changed[:, :, 16:32, 48:64] = 255 - changed[:, :, 16:32, 48:64]
    (cls, patches), (changed_cls, changed_patches) = backbone(views), backbone(changed)
    moved = (patches != changed_patches).any(dim=-1)[0]
    assert moved.nonzero().tolist() == [[1, 3]]
    assert torch.equal(cls, changed_cls)


def test_nothing_asks_for_a_gradient(backbone):
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    with torch.enable_grad():
        cls, patches = backbone(random_views(1))
    assert not cls.requires_grad
    assert not patches.requires_grad


def test_a_parents_train_mode_does_not_reach_it(backbone, dinov3_folder):
    views = random_views(2)
    before = backbone(views)
    Parent(backbone).train()
    after = backbone(views)
    assert not backbone.model.training
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # Were it reached, the tokens would differ: positions are rescaled at random in train mode.
    reached = FrozenBackbone(dinov3_folder)
    reached.model.train()
    assert not torch.allclose(reached(views)[1], before[1], atol=1e-3)


def test_a_parent_neither_owns_nor_saves_it(backbone):
    parent = Parent(backbone)
    assert list(parent.parameters()) == []
    assert parent.state_dict() == {}


def test_loading_again_gives_the_same_tokens(backbone, dinov3_folder):
    views = random_views(2)
    again = FrozenBackbone(dinov3_folder)(views)
    assert all(torch.equal(a, b) for a, b in zip(backbone(views), again, strict=True))


def test_chunks_give_the_tokens_of_one_pass(backbone, monkeypatch):
    views = random_views(5)
    whole = backbone(views)
    monkeypatch.setattr(room, "MAX_VIEWS_PER_PASS", 2)
    passes = []
    forward = backbone._forward
    monkeypatch.setattr(backbone, "_forward", lambda chunk: passes.append(len(chunk)) or forward(chunk))
    for a, b in zip(whole, backbone(views), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert passes == [2, 2, 1]


def test_the_callers_autocast_does_not_change_the_tokens(backbone):
    views = random_views(2)
    plain = backbone(views)
    with torch.autocast("cpu", torch.bfloat16):
        inside = backbone(views)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_half_precision_keeps_the_frequencies_of_the_positions(backbone, dinov3_folder, monkeypatch):
    monkeypatch.setattr(room, "compute_dtype", lambda device: torch.bfloat16)
    half = FrozenBackbone(dinov3_folder)
    exact = dict(backbone.model.named_buffers())
    assert all(torch.equal(buffer, exact[name]) for name, buffer in half.model.named_buffers())
    views = random_views(2)
    (cls, _), (expected, _) = half(views), backbone(views)
    assert cls.dtype == torch.bfloat16
    assert torch.cosine_similarity(cls.float(), expected).min() > 0.999


def test_half_precision_is_loaded_as_such_and_is_the_rounded_weights(backbone, dinov3_folder, monkeypatch):
    """The fp32 weights of the mission's backbone take 3.4 GB, and every process of a machine loads them."""
    monkeypatch.setattr(room, "compute_dtype", lambda device: torch.bfloat16)
    usual, loaded = room.AutoModel.from_pretrained, []

    def load(*words, **options):
        model, report = usual(*words, **options)
        loaded.extend(parameter.clone() for parameter in model.parameters())
        return model, report

    monkeypatch.setattr(room.AutoModel, "from_pretrained", load)
    FrozenBackbone(dinov3_folder)
    assert {parameter.dtype for parameter in loaded} == {torch.bfloat16}
    exact = [parameter.to(torch.bfloat16) for parameter in backbone.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(loaded, exact, strict=True))


def test_size_and_parameters_are_those_of_the_model(backbone, dinov3_folder):
    plain = DINOv3ViTModel.from_pretrained(dinov3_folder)
    assert backbone.hidden_size == 64
    assert backbone.num_parameters == sum(p.numel() for p in plain.parameters())


def test_the_missions_backbone_has_its_published_size():
    with torch.device("meta"):
        model = DINOv3ViTModel(vith16plus_config())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 840.6


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["facebook/dinov3-vith16plus-pretrain-lvd1689m", "no/such/id", "/no/such"])
def test_weights_out_of_reach_are_the_users_mistake_with_a_way_out(name):
    with pytest.raises(UserError, match=r"cannot load the backbone .*--model\.backbone") as refusal:
        FrozenBackbone(name)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("offline")
def test_a_folder_without_weights_is_refused(tmp_path, dinov3_folder):
    config = json.loads((Path(dinov3_folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--model\.backbone"):
        FrozenBackbone(str(tmp_path))


def test_another_architecture_is_refused_by_name(tmp_path):
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"of type vit, not dinov3_vit.*--model\.backbone"):
        FrozenBackbone(str(tmp_path))


@pytest.mark.parametrize(("side", "grid"), [(8, 4), (6, 4), (4, 4), (2, 2)])
def test_cells_hold_the_mean_and_the_max_of_their_patches(side, grid):
    rng = np.random.default_rng(side)
    patches = rng.standard_normal((2, side, side, 5))
    expected = np.zeros((2, grid * grid, 10))
    for row in range(grid):
        for column in range(grid):
            rows = slice(row * side // grid, math.ceil((row + 1) * side / grid))
            columns = slice(column * side // grid, math.ceil((column + 1) * side / grid))
            cell = patches[:, rows, columns].reshape(2, -1, 5)
            expected[:, row * grid + column] = np.concatenate([cell.mean(axis=1), cell.max(axis=1)], axis=-1)
    np.testing.assert_allclose(pool_cells(torch.from_numpy(patches), grid).numpy(), expected, rtol=1e-12)


def test_regions_are_means_weighted_by_the_area_under_the_box():
    rng = np.random.default_rng(1)
    height, width = 5, 8
    patches = rng.standard_normal((2, height, width, 3))
    corners = np.sort(rng.random((2, 12, 2, 2)), axis=2)  # [B, V, low or high, x or y]
    boxes = corners.reshape(2, 12, 4)
    expected = np.zeros((2, 12, 3))
    for image, view in np.ndindex(2, 12):
        x0, y0, x1, y1 = boxes[image, view]
        total = 0.0
        for row, column in np.ndindex(height, width):
            across = max(0.0, min(x1, (column + 1) / width) - max(x0, column / width))
            down = max(0.0, min(y1, (row + 1) / height) - max(y0, row / height))
            expected[image, view] += across * down * patches[image, row, column]
            total += across * down
        assert total == pytest.approx((x1 - x0) * (y1 - y0))
        expected[image, view] /= total
    regions = pool_regions(torch.from_numpy(patches), torch.from_numpy(boxes))
    np.testing.assert_allclose(regions.numpy(), expected, rtol=1e-9)


def test_region_of_a_whole_patch_is_that_patch():
    patches = torch.arange(16.0).reshape(1, 4, 4, 1)
    boxes = torch.tensor([[[0.25, 0.5, 0.5, 0.75], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.375, 0.25]]])
    assert pool_regions(patches, boxes)[0, :, 0].tolist() == pytest.approx([9.0, 7.5, 1 / 3])


def test_regions_of_half_precision_tokens_are_not_biased():
    # 1/255 in bf16 is 0.4 % too large, and the mean of equal numbers would come out too large as well.
    patches = torch.full((1, 15, 17, 1), 1.9921875, dtype=torch.bfloat16)
    region = pool_regions(patches, torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]))
    assert region.dtype == torch.bfloat16
    assert region.item() == 1.9921875


@pytest.mark.parametrize(("device", "has", "dtype"), [
    ("cpu", True, torch.float32), ("cuda", True, torch.bfloat16), ("cuda:1", False, torch.float32),
])  # fmt: skip
def test_the_backbone_computes_in_bf16_only_where_the_gpu_does(monkeypatch, device, has, dtype):
    monkeypatch.setattr("pipeline.model.backbone.has_bf16", lambda: has)
    assert compute_dtype(torch.device(device)) == dtype
