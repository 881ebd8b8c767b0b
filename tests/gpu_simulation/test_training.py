"""A training step of the model on a GPU: devices, precisions, finite values, gradients, and waits of the host."""

import pytest
import torch

from pipeline.model.config import HEADS, PRUNING
from pipeline.model.losses import Targets, count_targets
from tests.gpu_simulation.device import CUDA
from tests.gpu_simulation.examples import (
    LAYERS,
    assert_waits,
    cached,
    model_in_training,
    photos,
    small_config,
    tensors_in,
)

# Which of the kept views are still to be encoded depends on the scores.
TAKE_WAITS = {"pipeline/model/encoder.py": 1}
BASELINES = [head for head in HEADS if head != "roadwork"]


def config_of(pruning="scored", head="roadwork", **changes):
    return small_config(pruning=pruning, head=head, fixed_views=[5, 4, 6, 10, 11, 8, 7], **changes)


def take_step(model, batch, keep_all=False):
    """Forward and backward, as the trainer asks for them."""
    counts = count_targets(Targets.from_batch(batch)).to(CUDA, non_blocking=True)
    output = model(batch, with_loss=True, target_counts=counts, keep_all=keep_all)
    output.loss.backward()
    return output


def check(model, output):
    """One device, the precisions that are meant, finite values, a gradient for every weight."""
    for name, tensor in tensors_in(output).items():
        assert tensor.device == CUDA, name
        if tensor.is_floating_point():
            expected = torch.float32 if "loss" in name or name == "view_boxes" else torch.bfloat16
            assert tensor.dtype == expected, name
            assert tensor.isfinite().all(), name
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert (weight.grad.device, weight.grad.dtype) == (CUDA, torch.bfloat16), name
        assert weight.grad.isfinite().all(), name
    assert all(weight.grad is None for weight in model.backbone.model.parameters())


@pytest.mark.parametrize("pruning", PRUNING)
def test_a_step_in_each_pruning_mode_from_photos_and_from_the_cache(gpu, pruning):
    config = config_of(pruning)
    model = model_in_training(config)
    batch = photos(config)
    for source in (batch, cached(batch, model)):
        for keep_all in (False, True):
            model.zero_grad()
            check(model, take_step(model, source, keep_all))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("head", "evidence"), [("roadwork", True), *((head, False) for head in HEADS)])
def test_a_step_of_each_head_and_of_several(gpu, head, evidence, heads):
    config = config_of(head=head, evidence=evidence)
    model = model_in_training(config, heads=heads)
    batch = photos(config)
    for source in (batch, cached(batch, model)):
        model.zero_grad()
        check(model, take_step(model, source))


@pytest.mark.parametrize("changes", [
    {"experts": 1, "experts_per_token": 1}, {"fusion": "mean"}, {"pyramid": False}, {"attention_gate": False},
    {"metadata": ()},
])  # fmt: skip
def test_a_step_with_each_part_of_the_head_changed(gpu, changes):
    config = small_config(**changes)
    model = model_in_training(config)
    check_some = [name for name, _ in model.named_parameters() if "metadata.encoders" not in name]
    output = take_step(model, cached(photos(config), model))
    assert output.loss.isfinite()
    assert all(model.get_parameter(name).grad is not None for name in check_some)


@pytest.mark.parametrize("pruning", ["scored", "dynamic", "oracle"])
def test_a_step_of_mixed_photos(gpu, pruning):
    config = config_of(pruning)
    model = model_in_training(config, mixup_alpha=0.4)
    batch = photos(config)
    batch["view_mask"][:] = True
    for source in (batch, cached(batch, model)):
        model.zero_grad()
        check(model, take_step(model, source))


@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("keep_all", [False, True])
@pytest.mark.parametrize("mixup_alpha", [0.0, 0.4])
def test_waits_of_a_step(gpu, pruning, keep_all, mixup_alpha):
    config = config_of(pruning)
    model = model_in_training(config, mixup_alpha=mixup_alpha)
    batch = photos(config)
    passes = 2 if pruning == "oracle" and not keep_all else 1
    for source, expected in ((batch, TAKE_WAITS), (cached(batch, model), {})):
        with gpu.watch() as waits:
            take_step(model, source, keep_all)
        assert_waits(waits, {file: passes * count for file, count in expected.items()}, passes * LAYERS)


@pytest.mark.parametrize("head", BASELINES)
def test_waits_of_a_step_of_a_baseline(gpu, head):
    config = config_of(head=head)
    model = model_in_training(config)
    batch = photos(config)
    for source, expected in ((batch, TAKE_WAITS), (cached(batch, model), {})):
        with gpu.watch() as waits:
            take_step(model, source)
        assert_waits(waits, expected, layers=0)


@pytest.mark.parametrize("pruning", ["scored", "oracle"])
def test_a_step_uploads_its_views_once_and_as_bytes(gpu, pruning):
    config = config_of(pruning)
    model = model_in_training(config)
    batch = photos(config)
    size = batch["views"].nbytes
    assert batch["views"].dtype == torch.uint8
    gpu.uploads.clear()
    take_step(model, batch)
    assert [nbytes for nbytes in gpu.uploads if nbytes >= size / 12] == [size]


def test_what_a_batch_lacks_is_made_on_the_gpu(gpu):
    config = config_of()
    model = model_in_training(config)
    batch = cached(photos(config), model)
    unknown = {name: value for name, value in batch.items() if name not in ("weather", "mask_targets")}
    with gpu.watch() as waits:
        output = model(unknown, with_loss=True, null_metadata=True)
    assert_waits(waits, {})
    assert output.loss_terms["segmentation"].sum() == 0
