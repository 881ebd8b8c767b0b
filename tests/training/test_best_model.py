"""The model that is validated and saved, built from the average of a run's weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.model.roadwork import RoadworkModel
from pipeline.training.best_model import BestModel
from tests.model.examples import random_photos
from tests.small_run import make_backbone, make_model


class Average:
    """Stands in for the engine's average: fp32 whatever the weights' precision."""

    def __init__(self, model):
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            name: value.detach().float() + 1e-3 * torch.randn(value.shape, generator=generator)
            for name, value in model.named_parameters()
        }

    def gathered(self):
        return self.tensors


class Folder:
    def __init__(self, path):
        self.model = path / "model"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_averaged_model_has_the_averages_fp32_weights_whatever_the_run_computes_in(tmp_path, precision):
    model = make_model(make_backbone(tmp_path / "backbone")).to(precision)
    average = Average(model)
    best = BestModel(model, average, Folder(tmp_path), rank=0)
    averaged = best.averaged()
    for name, value in averaged.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, average.tensors[name]), name
    assert model.dtype == precision
    best.save(averaged)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in average.tensors.items())
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"
    again, photos = RoadworkModel.from_pretrained(tmp_path / "model"), random_photos()
    assert torch.equal(again(photos).logits, averaged.eval()(photos).logits)
