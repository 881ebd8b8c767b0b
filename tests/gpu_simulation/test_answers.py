"""Answers on a GPU: evaluation, prediction, validation, early exit; as on a CPU, with few waits of the host."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.data.batch import collate
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import read_index
from pipeline.evaluation import early_exit, prediction, scoring
from pipeline.evaluation.inference import evidence_map, fingerprint, kept_views, load_model
from pipeline.model.config import HEADS, InputSpec
from pipeline.model.pruning import StoppingRule, rounds_up_to
from pipeline.model.roadwork import RoadworkModel
from pipeline.names import VIEW_NAMES
from pipeline.training.validation import Validation
from tests.checkpoints.examples import process_group
from tests.gpu_simulation.device import CUDA, simulated_gpu
from tests.gpu_simulation.examples import BATCH, LAYERS, assert_waits, photos, small_config
from tests.small_run import SIDE, make_backbone, make_shards, noisy_photo
from tests.small_run import small_config as narrow_config

TAKEN = {"pipeline/model/encoder.py": 1}  # which views are still to be encoded
PHOTOS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards with a validation split, and a model on a backbone of random weights."""
    folder = tmp_path_factory.mktemp("world")
    make_shards(folder / "shards", {"train": [0, 1], "val": [0, 1, 1, 0] * (PHOTOS // 4)})
    config = narrow_config(make_backbone(folder / "backbone"))
    torch.manual_seed(0)
    RoadworkModel.build(config, None).save_pretrained(folder / "model")
    return folder


def answering_model(heads=1, **changes):
    """A model with fp32 weights in evaluation mode, as the commands load it."""
    torch.manual_seed(0)
    return RoadworkModel.build(small_config(**changes), None, device=CUDA, heads=heads).eval()


def layers_of(model):
    return LAYERS if model.config.head == "roadwork" else 0


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("head", HEADS)
def test_evaluation(gpu, head, heads):
    model = answering_model(heads, head=head)
    batch = photos(model.config.sizes)
    sources = [f"{row}.jpg" for row in range(BATCH)]
    with gpu.watch() as waits:
        found = list(scoring.answers(model, [(batch, sources)]))
    # Its two lists: of the log-odds, and of the kept views.
    expected = TAKEN | {"pipeline/evaluation/scoring.py": 1, "pipeline/evaluation/inference.py": 1}
    assert_waits(waits, expected, 2 * heads * layers_of(model))
    assert [answer[0] for answer in found] == sources
    for _, blind, informed, views in found:
        assert math.isfinite(blind)
        assert math.isfinite(informed)
        assert views[0] == VIEW_NAMES[0]
    if head == "roadwork":
        assert all(blind != informed for _, blind, informed, _ in found[:2])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pruning", ["scored", "oracle"])
def test_prediction(gpu, head, pruning):
    model = answering_model(head=head, pruning=pruning)
    batch = photos(model.config.sizes)
    samples = [({name: batch[name][row] for name in ("views", "boxes", "view_mask")}, "") for row in range(BATCH)]
    with gpu.watch() as waits:
        (rows,) = prediction.answers(model, [*samples, (None, "no photo")], BATCH + 1, workers=0)
    passes = 2 if pruning == "oracle" and head == "roadwork" else 1
    expected = {"pipeline/evaluation/prediction.py": 1, "pipeline/evaluation/inference.py": 1}
    assert_waits(waits, expected | {"pipeline/model/encoder.py": passes}, passes * layers_of(model))
    assert [set(row) for row in rows] == [{"probability", "label", "kept_views"}] * BATCH + [{"error"}]
    assert all(0 <= row["probability"] <= 1 for row in rows[:BATCH])


def test_a_prediction_uploads_its_views_once(gpu):
    model = answering_model()
    batch = photos(model.config.sizes)
    gpu.uploads.clear()
    prediction.score(model, batch)
    assert [nbytes for nbytes in gpu.uploads if nbytes >= batch["views"].nbytes / 12] == [batch["views"].nbytes]


def test_answers_are_those_of_a_cpu_but_for_the_backbones_precision(gpu, monkeypatch, world):
    monkeypatch.setattr("pipeline.model.backbone.compute_dtype", lambda device: torch.float32)
    here, there = (load_model(world / "model", device) for device in (torch.device("cpu"), CUDA))
    batch = collate([{**prediction.prepare(noisy_photo(row), here.config.input_spec)} for row in range(3)])
    ours, theirs = (model(batch, null_metadata=True) for model in (there, here))
    torch.testing.assert_close(ours.logits.cpu(), theirs.logits)  # the CPU has kernels of its own
    assert kept_views(ours) == kept_views(theirs)
    assert fingerprint(there) == fingerprint(here)


def test_a_loaded_model_is_on_the_gpu_with_its_backbone_in_bf16(gpu, world):
    gpu.uploads.clear()
    model = load_model(world / "model", CUDA)
    weights = 2 * model.backbone.num_parameters + 4 * sum(weight.numel() for weight in model.parameters())
    assert weights <= sum(gpu.uploads) < weights + 2**10  # no weight in fp32 first; and a few buffers
    assert not model.training
    assert {(weight.device, weight.dtype) for weight in model.parameters()} == {(CUDA, torch.float32)}
    frozen = {(weight.device, weight.dtype) for weight in model.backbone.model.parameters()}
    assert frozen == {(CUDA, torch.bfloat16)}
    assert {(buffer.device, buffer.dtype) for buffer in model.backbone.model.buffers()} == {(CUDA, torch.float32)}


def test_the_map_of_the_evidence(gpu):
    model = answering_model()
    batch = photos(model.config.sizes)
    found = evidence_map(model, {name: value[0] for name, value in batch.items()})
    assert found.shape == (96, 96)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("keep", [2, 4, 8])
def test_waits_of_an_early_exit(gpu, keep):
    """Photos that stop in different rounds: a pass of the backbone for each, over those that are undecided."""
    model = answering_model(pruning="dynamic", keep_views=keep)
    rounds = len(rounds_up_to(keep))
    batch = photos(model.config.sizes)
    model.config.stopping = vars(StoppingRule(0.0, [9.0] * (rounds - 1), [9.0] * (rounds - 1)))
    with gpu.watch() as waits:
        late = model(batch, null_metadata=True)
    # In each round: which views are to be encoded, how many there are at most, and which photos go on, before and
    # after the answer. And at the end what is kept of all.
    assert sum(wait.place.startswith("pipeline/model/encoder.py") for wait in waits) <= 5 * rounds + 2
    assert_waits([wait for wait in waits if "encoder.py" not in wait.place], {}, rounds * LAYERS)
    model.config.stopping = vars(StoppingRule(0.0, [0.0] * (rounds - 1), [0.0] * (rounds - 1)))
    early = model(batch, null_metadata=True)
    assert late.view_mask.sum(dim=1).tolist() == [min(keep, 5), keep, keep, keep]
    assert early.view_mask.sum().item() == BATCH
    for output in (late, early):
        assert output.logits.device == CUDA
        assert output.logits.isfinite().all()


def test_fitting_an_early_exit_and_an_order_of_views(gpu):
    model = answering_model(pruning="dynamic", keep_views=3)
    batch = photos(model.config.sizes)
    batch["labels"][:] = torch.tensor([0, 1, 0, 1])
    with gpu.watch() as waits:
        found = early_exit.fit_dynamic(model, [batch, batch], 0.01)
    assert (found["n"], model.config.stopping) == (2 * BATCH, found["stopping"])
    # An answer after each of three rounds, and the number of views.
    assert_waits(waits, {"pipeline/evaluation/early_exit.py": 8, "pipeline/model/encoder.py": 6}, 2 * 3 * LAYERS)
    found = early_exit.fit_fixed(model, [batch])
    assert sorted(found["fixed_views"]) == list(range(1, 12))


def test_validation(gpu, world, tmp_path):
    with process_group(tmp_path / "store"):
        data = ShardDataset(world / "shards", read_index(world / "shards"), "val", InputSpec(SIDE, mask_side=4))
        model = load_model(world / "model", CUDA)
        validation = Validation(data, 5, workers=0, rank=0, world_size=1)
        with gpu.watch() as waits:
            scores = validation(model)
    batches = math.ceil(PHOTOS / 5)
    assert_waits(waits, {"pipeline/model/encoder.py": batches, "pipeline/training/validation.py": batches}, batches)
    assert scores["n"] == PHOTOS
    assert all(math.isfinite(scores[name]) for name in ("loss", "mcc", "cut", "slope"))
    assert model.training


def test_loaders_pin_their_batches(world):
    data = ShardDataset(world / "shards", read_index(world / "shards"), "val", InputSpec(SIDE, mask_side=4))
    with simulated_gpu() as gpu:
        (batch, *_) = Validation(data, 5, workers=0, rank=0, world_size=1).loader
        assert all(gpu.is_pinned(tensor) for tensor in batch.values())
