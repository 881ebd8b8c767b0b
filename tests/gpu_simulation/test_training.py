import pytest
import torch

from pipeline.model.config import HEADS, PRUNING
from pipeline.model.losses import Targets, count_targets
from tests.gpu_simulation.device import CUDA
from tests.gpu_simulation.examples import (
    EXPERTS,
    LAYERS,
    by_file,
    cached,
    model_in_training,
    photos,
    small_config,
    tensors_in,
)

# The loop over experts: which of them have tokens, and for each that has: which it is, three times, its tokens, and
# whether it is the one that stands for none.
EXPERT_WAITS = {"pipeline/model/moe.py": LAYERS * (1 + 5 * EXPERTS)}
# Which of the kept views are still to be encoded depends on the scores.
TAKE_WAITS = {"pipeline/model/encoder.py": 1}


def config_of(pruning="scored", head="roadwork"):
    return small_config(pruning=pruning, head=head, fixed_views=[5, 4, 6, 10, 11, 8, 7])


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


@pytest.mark.parametrize("head", HEADS)
def test_a_step_of_each_head(gpu, head):
    config = config_of(head=head)
    model = model_in_training(config)
    batch = photos(config)
    for source in (batch, cached(batch, model)):
        model.zero_grad()
        check(model, take_step(model, source))


@pytest.mark.parametrize("changes", [
    {"evidence": False}, {"experts": 1, "experts_per_token": 1}, {"fusion": "mean"}, {"pyramid": False},
    {"attention_gate": False}, {"metadata": ()},
])  # fmt: skip
def test_a_step_with_each_part_of_the_head_changed(gpu, changes):
    config = small_config(**changes)
    model = model_in_training(config)
    check_some = [name for name, _ in model.named_parameters() if "metadata.encoders" not in name]
    output = take_step(model, cached(photos(config), model))
    assert output.loss.isfinite()
    assert all(model.get_parameter(name).grad is not None for name in check_some)


@pytest.mark.parametrize("heads", [2, 3])
def test_a_step_of_several_heads(gpu, heads):
    config = small_config()
    model = model_in_training(config, heads=heads)
    batch = photos(config)
    check(model, take_step(model, cached(batch, model)))


@pytest.mark.parametrize("pruning", ["scored", "dynamic", "oracle"])
def test_a_step_of_mixed_photos(gpu, pruning):
    config = config_of(pruning)
    model = model_in_training(config, mixup_alpha=0.4)
    batch = photos(config)
    batch["view_mask"][:] = True
    for source in (batch, cached(batch, model)):
        model.zero_grad()
        check(model, take_step(model, source))


@pytest.mark.parametrize("pruning", [mode for mode in PRUNING if mode != "oracle"])
@pytest.mark.parametrize("keep_all", [False, True])
def test_waits_of_a_step(gpu, pruning, keep_all):
    config = config_of(pruning)
    model = model_in_training(config)
    batch = photos(config)
    for source, expected in ((batch, EXPERT_WAITS | TAKE_WAITS), (cached(batch, model), EXPERT_WAITS)):
        with gpu.watch() as waits:
            take_step(model, source, keep_all)
        assert by_file(waits) == expected, waits


@pytest.mark.parametrize("head", [head for head in HEADS if head != "roadwork"])
def test_waits_of_a_step_of_a_baseline(gpu, head):
    config = config_of(head=head)
    model = model_in_training(config)
    batch = photos(config)
    for source, expected in ((batch, TAKE_WAITS), (cached(batch, model), {})):
        with gpu.watch() as waits:
            take_step(model, source)
        assert by_file(waits) == expected, waits
