"""The segmenter: the masks of the whole model prompt by prompt, at a fraction of the work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, Sam3Config, Sam3Model, Sam3VideoConfig

from data_prep.masks import sam3
from data_prep.masks.sam3 import Instance, Segmenter, paint
from pipeline.errors import UserError
from pipeline.model.backbone import SCENES_TINY
from pipeline.names import MASK_CLASSES
from tests.data_prep.examples import pixels
from tests.data_prep.masks.tiny_sam3 import MASK, MEAN, SCORE, SIDE, STD, write_tiny_sam3

SIZES = [(480, 640), (300, 200), (64, 96), (121, 333)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_sam3(tmp_path_factory.mktemp("sam3"))


def load(
    name: Path | str, prompts: tuple[str, ...] = MASK_CLASSES, score: float = SCORE, mask: float = MASK
) -> Segmenter:
    return Segmenter(str(name), prompts, torch.device("cpu"), score_threshold=score, mask_threshold=mask)


@pytest.fixture(scope="module")
def segmenter(checkpoint) -> Segmenter:
    return load(checkpoint)


@pytest.fixture(scope="module")
def squares() -> np.ndarray:
    return np.stack([pixels(seed, SIDE, SIDE) for seed in range(len(SIZES))])


def plain_mask(checkpoint: Path, square: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask by the book: the whole model on one photo for each prompt; objects are enlarged by Pillow."""
    model = Sam3Model.from_pretrained(checkpoint)
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint)
    values = torch.from_numpy((square / 255 - MEAN) / STD).float().permute(2, 0, 1)[None]
    objects = []
    for number, name in enumerate(MASK_CLASSES, start=1):
        text = tokenizer(name, return_tensors="pt", padding="max_length", max_length=32)
        with torch.no_grad():
            output = model(pixel_values=values, **text)
        scores = (output.pred_logits.sigmoid() * output.presence_logits.sigmoid())[0].tolist()
        objects += [(score, number, output.pred_masks[0, q].sigmoid().numpy()) for q, score in enumerate(scores)]
    mask = np.zeros(size, np.uint8)
    for score, number, probability in sorted(objects, key=lambda found: found[0]):
        if score > SCORE:
            whole = Image.fromarray(probability).resize(size[::-1], Image.Resampling.BILINEAR)
            mask[np.asarray(whole) > MASK] = number
    return mask


def test_a_batch_of_photos_gives_what_separate_calls_for_each_photo_and_prompt_give(checkpoint, segmenter, squares):
    expected = [plain_mask(checkpoint, square, size) for square, size in zip(squares, SIZES, strict=True)]
    for got, mask, size in zip(segmenter(squares, SIZES), expected, SIZES, strict=True):
        assert got.dtype == np.uint8
        assert got.shape == size
        assert np.mean(got != mask) < 1e-3  # sums in another order move an edge by a pixel
    assert len(np.unique(np.concatenate([mask.ravel() for mask in expected]))) > 4, "it must find something"


def test_photos_in_a_batch_get_the_masks_that_they_get_alone(segmenter, squares):
    together = segmenter(squares, SIZES)
    for number, mask in enumerate(together):
        alone = segmenter(squares[number : number + 1], SIZES[number : number + 1])[0]
        assert np.mean(alone != mask) < 1e-3


def test_the_vision_encoder_runs_once_per_photo(segmenter, squares):
    seen: list[int] = []
    hook = segmenter.model.vision_encoder.register_forward_hook(
        lambda module, given, output: seen.append(len(given[0]))
    )
    segmenter(squares, SIZES)
    hook.remove()
    assert seen == [len(squares)]


def half(left: bool) -> torch.Tensor:
    """Logits of an object that fills one half and a little more."""
    logits = torch.full((10, 10), -9.0)
    logits[:, slice(0, 6) if left else slice(4, 10)] = 9.0
    return logits


@pytest.mark.parametrize("order", [1, -1])
def test_of_overlapping_objects_the_higher_score_wins(order):
    objects = [Instance(0.9, 0, half(left=True)), Instance(0.6, 3, half(left=False))][::order]
    np.testing.assert_array_equal(paint(objects, (10, 10), 0.5), np.tile([1] * 6 + [4] * 4, (10, 1)))


@pytest.mark.parametrize("order", [1, -1])
def test_at_equal_scores_the_first_class_wins(order):
    objects = [Instance(0.9, 2, half(left=True)), Instance(0.9, 1, half(left=False))][::order]
    np.testing.assert_array_equal(paint(objects, (10, 10), 0.5), np.tile([3] * 4 + [2] * 6, (10, 1)))


def test_a_photo_without_objects_gets_zeros(checkpoint, squares):
    assert not any(mask.any() for mask in load(checkpoint, score=0.99)(squares, SIZES))


def test_the_mask_threshold_decides_how_far_objects_reach(checkpoint, squares):
    reach = [sum(int((mask > 0).sum()) for mask in load(checkpoint, mask=at)(squares, SIZES)) for at in (0.5, 0.7, 0.9)]
    assert reach[0] > reach[1] > reach[2] > 0


def test_the_precision_of_a_gpu_gives_nearly_the_same_masks(checkpoint, segmenter, squares, monkeypatch):
    monkeypatch.setattr(sam3, "compute_dtype", lambda device: torch.bfloat16)
    masks = zip(load(checkpoint)(squares, SIZES), segmenter(squares, SIZES), strict=True)
    assert 0 < np.mean([np.mean(bf16 != fp32) for bf16, fp32 in masks]) < 0.05


def test_a_prompt_that_is_too_long_is_refused(checkpoint):
    with pytest.raises(UserError, match=r"--prompts is 'a person .* 32 tokens"):
        load(checkpoint, ("cone", "a person who works by the side of a road"))


def edited(checkpoint: Path, folder: Path, edit) -> Path:
    """A copy whose weights `edit` has changed."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(checkpoint / "model.safetensors")
    save_file(edit(weights), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_fingerprint_is_that_of_weights_and_image_settings(checkpoint, segmenter, tmp_path):
    same = edited(checkpoint, tmp_path / "same", dict)
    assert load(same).fingerprint == segmenter.fingerprint
    other = edited(checkpoint, tmp_path / "other", lambda weights: {name: w + 1e-3 for name, w in weights.items()})
    assert load(other).fingerprint != segmenter.fingerprint
    settings = json.loads((same / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.4] * 3
    (same / "processor_config.json").write_text(json.dumps(settings))
    assert load(same).fingerprint != segmenter.fingerprint


def test_the_hubs_video_checkpoint_holds_the_same_model(checkpoint, segmenter, tmp_path):
    def as_video(weights):
        return {f"detector_model.{n}": w for n, w in weights.items()} | {"tracker_model.unused": torch.zeros(1)}

    video = edited(checkpoint, tmp_path / "video", as_video)
    Sam3VideoConfig(detector_config=Sam3Config.from_pretrained(checkpoint)).save_pretrained(video)
    assert load(video).fingerprint == segmenter.fingerprint


def test_a_checkpoint_that_lacks_weights_is_refused(checkpoint, tmp_path):
    cut = edited(checkpoint, tmp_path / "cut", lambda weights: {n: w for n, w in weights.items() if n[:3] != "det"})
    with pytest.raises(UserError, match=r"lacks \d+ weights, such as detr_decoder"):
        load(cut)


def test_another_kind_of_model_is_refused():
    with pytest.raises(UserError, match="of type dinov3_vit, not sam3; choose another --model"):
        load(SCENES_TINY)


def test_weights_that_are_not_to_be_had_give_the_way_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hf auth login.*--model"):
        load("facebook/sam3")
