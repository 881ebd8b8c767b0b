"""The embedded backbone: what is committed is what its command gives, and its targets say what lies under a patch."""

import inspect
import json
import shlex

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, DINOv3ViTModel

from data_prep.scenes import CITIES
from data_prep.scenes import pretraining as module
from data_prep.scenes.pretraining import BACKGROUND, IGNORE, Canvases, pretrain, sample_crops, targets
from pipeline.errors import UserError
from pipeline.files import sha256_of
from pipeline.model.backbone import SCENES_TINY


@pytest.fixture(scope="module")
def provenance():
    return json.loads((SCENES_TINY / "provenance.json").read_text())


def test_the_committed_weights_are_those_of_the_provenance(provenance):
    weights = SCENES_TINY / "model.safetensors"
    assert sha256_of(weights) == provenance["sha256"]
    assert sum(path.stat().st_size for path in SCENES_TINY.iterdir()) <= 10_000_000
    assert sum(tensor.numel() for tensor in load_file(weights).values()) == provenance["parameters"]


def test_the_provenance_names_a_command_that_asks_for_nothing_but_the_defaults(provenance):
    assert shlex.split(provenance["command"]) == ["python", "-m", "data_prep.scenes.pretraining"]
    parameters = inspect.signature(pretrain).parameters
    assert provenance["arguments"] == {name: p.default for name, p in parameters.items() if name != "out"}


def test_pretraining_saw_no_city_of_the_data_sets(provenance):
    assert not set(provenance["cities"]) & set(CITIES)


def test_the_committed_backbone_is_a_dinov3_that_tells_roadwork_from_lookalikes(provenance):
    model = AutoModel.from_pretrained(SCENES_TINY)
    assert isinstance(model, DINOv3ViTModel)
    assert model.config.to_dict()["hidden_size"] == 96
    # of 31 kinds; an all-background answer scores 0 here, and 0.8 on roadwork or not
    assert provenance["held_out_accuracy"]["object_patch"] > 0.7


def test_a_patch_is_named_after_the_object_that_covers_most_of_it():
    kinds = torch.full((1, 32, 32), BACKGROUND, dtype=torch.uint8)
    kinds[0, :16, :12] = 3  # 192 px of the first patch
    kinds[0, :16, 12:16] = 5  # 64 px of it
    kinds[0, :1, 16:32] = 5  # 16 px of the second: too little to tell
    kinds[0, 20:30, 20:30] = 7  # 100 px of the last
    assert targets(kinds, 16).tolist() == [[3, IGNORE, BACKGROUND, 7]]


def test_crops_show_what_their_targets_say():
    """Each object is a square of a grey level of its own, so that the pixels name the kind."""
    pixels = torch.full((4, 3, module.CANVAS, module.CANVAS), 255, dtype=torch.uint8)
    kinds = torch.full((4, module.CANVAS, module.CANVAS), BACKGROUND, dtype=torch.uint8)
    centres = []
    for photo in range(4):
        for kind, (y, x) in enumerate(((40, 60), (200, 90), (280, 290))):
            pixels[photo, :, y - 10 : y + 10, x - 10 : x + 10] = 10 * (4 * kind + photo)
            kinds[photo, y - 10 : y + 10, x - 10 : x + 10] = 4 * kind + photo
            centres.append((photo, y, x))
    canvases = Canvases(pixels, kinds, torch.tensor(centres))
    crops, centre, patches = sample_crops(canvases, 1, 3, 64, np.random.default_rng(0))
    shown = crops[:, 0].float().unfold(1, 16, 16).unfold(2, 16, 16).flatten(3).flatten(1, 2)
    for patch, target in zip(shown.flatten(0, 1), patches.flatten().tolist(), strict=True):
        if target == BACKGROUND:
            assert patch.min() == 255
        elif target != IGNORE:
            assert patch.min() == 10 * target
            assert target % 4 in (1, 2)  # photos 0 and 3 were not asked for
    assert len(set(centre.tolist()) - {BACKGROUND, IGNORE}) == 6


@pytest.mark.parametrize(("values", "named"), [({"images": 3}, "images"), ({"steps": 0}, "steps")])
def test_impossible_arguments_are_refused(values, named, tmp_path):
    with pytest.raises(UserError, match=f"^{named} is"):
        pretrain(tmp_path, **values)


@pytest.mark.slow
def test_the_same_command_gives_the_same_weights(tmp_path):
    threads = torch.get_num_threads()
    try:
        for name in ("first", "second"):
            pretrain(tmp_path / name, images=40, steps=6)
        pretrain(tmp_path / "other", images=40, steps=6, seed=3)
    finally:  # the settings are the process's, not the test's
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    first, second, other = (load_file(tmp_path / n / "model.safetensors") for n in ("first", "second", "other"))
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing, f"these tensors differ: {differing}"
    assert any(not torch.equal(first[name], other[name]) for name in first)
