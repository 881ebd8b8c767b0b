"""The model that is validated and saved, built from the average of a run's weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.model.roadwork import RoadworkModel
from pipeline.training.best_model import BestModel
from pipeline.training.state import TrainState
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


class Saved:
    """Stands in for a run's checkpoints, of which one holds the best weights."""

    fetched = False

    def __init__(self, weights):
        self.weights = weights

    def best_average(self):
        return self.weights


@pytest.mark.parametrize("damage", ["later weights", "no file", "half a file", "nothing"])
@torch.no_grad()
def test_a_resumed_run_has_the_best_model_that_its_checkpoint_knows_and_no_later_one(tmp_path, damage):
    """A run may be killed after a validation saved a better model, and before its checkpoint was on the disk."""
    model = make_model(make_backbone(tmp_path / "backbone"))
    average, folder = Average(model), Folder(tmp_path)
    best = BestModel(model, average, folder, rank=0)
    known = {name: value.clone() for name, value in average.tensors.items()}
    best.save(best.averaged())
    path = folder.model / "model.safetensors"
    if damage == "later weights":
        average.tensors = {name: value + 1 for name, value in known.items()}
        best.save(best.averaged())
    elif damage == "no file":
        path.unlink()
    elif damage == "half a file":
        path.write_bytes(path.read_bytes()[:99])
    before = path.stat().st_ino if path.exists() else None
    best._restore(TrainState(8, best={"step": 3}), Saved(known))
    assert all(torch.equal(value, known[name]) for name, value in load_file(path).items())
    assert (path.stat().st_ino == before) == (damage == "nothing")


def test_a_model_whose_checkpoint_is_lost_stays_and_one_that_is_lost_too_is_the_users_to_mend(tmp_path):
    model = make_model(make_backbone(tmp_path / "backbone"))
    best = BestModel(model, Average(model), Folder(tmp_path), rank=0)
    with pytest.raises(UserError, match="those of step 3, are neither in"):
        best._restore(TrainState(8, best={"step": 3}), Saved(None))
    best.save(best.averaged())
    best._restore(TrainState(8, best={"step": 3}), Saved(None))
    elsewhere = Saved(None)
    elsewhere.fetched = True
    with pytest.raises(UserError, match="those of step 3, are neither in"):
        best._restore(TrainState(8, best={"step": 3}), elsewhere)
