from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.model.backbone import FrozenBackbone
from tests.gpu_simulation.device import CUDA, STAGED_BYTES, CudaTensor, simulated_gpu

VALUES = torch.tensor([[1.0, -2.0], [3.0, 4.0]])


@pytest.fixture(scope="module")
def exact():
    """A backbone in fp32 that was loaded outside of the simulation."""
    return FrozenBackbone("scenes-tiny").model


def on_gpu():
    return VALUES.to(CUDA)


def test_tensors_say_cuda_and_hold_the_values_of_a_cpu(gpu):
    x, weight = on_gpu(), VALUES.clone().requires_grad_()
    assert (x.device, x.is_cuda, x.dtype) == (CUDA, True, torch.float32)
    (x @ weight.to(CUDA)).square().sum().backward()
    assert torch.equal((x * 2).cpu(), VALUES * 2)
    reference = VALUES.clone().requires_grad_()
    (VALUES @ reference).square().sum().backward()
    assert isinstance(weight.grad, torch.Tensor)
    assert weight.grad.device.type == "cpu"
    assert torch.equal(weight.grad, reference.grad)


@pytest.mark.parametrize("work", [
    lambda x: x + VALUES, lambda x: torch.cat([x, VALUES]), lambda x: torch.where(x > 0, x, VALUES),
    lambda x: VALUES[x.long() > 0], lambda x: x.index_put_((torch.tensor([0]),), VALUES[:1]),
    lambda x: nn.functional.linear(x, VALUES),
])  # fmt: skip
def test_mixed_devices_are_refused(gpu, work):
    x = on_gpu()
    with pytest.raises(RuntimeError, match="same device"):
        work(x)


@pytest.mark.parametrize("work", [
    lambda x: x + 1, lambda x: x + torch.tensor(2.0), lambda x: x.masked_fill(x > 0, 0.0),
    lambda x: torch.where(x > 0, x, torch.nan), lambda x: x.new_zeros(3) + torch.arange(3, device=x.device),
    lambda x: torch.rand_like(x) + torch.rand(2, 2, device=x.device) + torch.empty_like(x).exponential_(),
    lambda x: x.index_select(0, torch.zeros(1, dtype=torch.int64, device=x.device)),
    lambda x: nn.functional.one_hot(x.long().clamp(min=0), 5), lambda x: x.__setitem__(x > 0, 0.0),
    lambda x: torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True),
    lambda x: x.to("cpu", non_blocking=True), lambda x: x.to(torch.bfloat16).float(),
    lambda x: torch.ones(9).to(x.device, non_blocking=True),
    lambda x: torch.ones(STAGED_BYTES).pin_memory().to(x.device, non_blocking=True),
    lambda x: x.add(0).add_(1).sum(),
])  # fmt: skip
def test_what_cuda_only_queues_is_no_wait(gpu, work):
    x = on_gpu()
    with gpu.watch() as waits:
        work(x)
    assert waits == []


@pytest.mark.parametrize(("kind", "work"), [
    ("scalar", float), ("scalar", torch.Tensor.item), ("scalar", bool), ("scalar", lambda x: [1, 2, 3, 4, 5][x.int()]),
    ("download", torch.Tensor.tolist), ("download", torch.Tensor.cpu), ("download", lambda x: x.to("cpu")),
    ("download", lambda x: torch.zeros(()).copy_(x)),
    ("download to pageable memory", lambda x: torch.zeros(()).copy_(x, non_blocking=True)),
    ("upload", lambda x: VALUES.to(x.device)), ("upload", lambda x: torch.tensor([1.0], device=x.device)),
    ("upload", lambda x: torch.as_tensor(True, device=x.device)),
    ("upload", lambda x: torch.zeros_like(x).copy_(VALUES[0, 0])),
    ("upload from pageable memory", lambda x: torch.ones(STAGED_BYTES).to(x.device, non_blocking=True)),
    ("nonzero", lambda x: x.expand(2).nonzero()), ("nonzero", lambda x: torch.where(x.expand(2) > 0)),
    ("mask index", lambda x: x.expand(2)[x.expand(2) > 0]),
    ("mask index", lambda x: torch.zeros(2, device=x.device).index_put_((x.expand(2) > 0,), x.expand(2))),
    ("index on the host", lambda x: x.expand(2)[[0, 1]]),
    ("masked_select", lambda x: x.masked_select(x > 0)), ("equal", lambda x: torch.equal(x, x)),
    ("unique", torch.unique), ("repeat_interleave", lambda x: x.expand(2).repeat_interleave(x.expand(2).long())),
])  # fmt: skip
def test_each_kind_of_wait_is_written_down_once(gpu, kind, work):
    x = torch.full((), 3.0, device=CUDA)
    with gpu.watch() as waits:
        work(x)
    assert [wait.kind for wait in waits] == [kind]


def test_inference_mode_changes_nothing(gpu):
    x = on_gpu()
    with torch.inference_mode(), gpu.watch() as waits:
        found = (x > 0).nonzero(as_tuple=True)
        assert nn.functional.one_hot(found[0], 3).device == CUDA
        assert x.view(4).device == x.to(torch.bfloat16).device == CUDA
        with pytest.raises(RuntimeError, match="same device"):
            nn.functional.linear(x, VALUES)
    assert [wait.kind for wait in waits] == ["nonzero"]


def test_a_wait_names_the_line_of_the_project(gpu):
    from pipeline.model.encoder import first_places

    kept = (on_gpu() > 0).clone()
    with gpu.watch() as waits:
        first_places(kept)
    assert len(waits) == 1
    path, _, line = waits[0].place.partition(":")
    text = (Path(__file__).parents[2] / path).read_text().splitlines()[int(line) - 1]
    assert "int(kept.sum" in text


def test_modules_move_and_change_their_precision_in_place(gpu):
    module = nn.Linear(2, 3)
    weight = module.weight
    module.to("cuda")
    weight.data = weight.data.to(torch.bfloat16)
    assert module.weight is weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.device, weight.dtype) == (CUDA, torch.bfloat16)
    assert module.to("cpu").weight.device.type == "cpu"


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_loaded_weights_and_buffers_are_those_of_a_cpu(exact, gpu, device):
    """A model to load is built on the device `meta`, and then gets what no file holds, such as buffers."""
    found = FrozenBackbone("scenes-tiny", device).model
    assert all(torch.equal(there.cpu(), exact.get_parameter(name).to(there.dtype))
               for name, there in found.named_parameters())  # fmt: skip
    assert all(torch.equal(there.cpu(), exact.get_buffer(name)) for name, there in found.named_buffers())


def test_arrays_are_only_made_of_tensors_on_the_cpu(gpu):
    with pytest.raises(TypeError, match="cpu"):
        np.asarray(on_gpu())


def test_a_generator_of_another_device_is_refused(gpu):
    for device, other in (("cpu", CUDA), ("cuda", "cpu")):
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, generator=torch.Generator(device), device=other)
        torch.rand(2, generator=torch.Generator(other), device=other)


def test_pytorch_is_as_before_afterwards():
    names = ("is_available", "device_count", "Stream", "Event", "synchronize", "get_rng_state")
    before = [getattr(torch.cuda, name) for name in names] + [torch.Generator, torch.accelerator.is_available]
    with simulated_gpu():
        left = on_gpu()
        assert torch.cuda.is_available()
    assert [getattr(torch.cuda, name) for name in names] + [torch.Generator, torch.accelerator.is_available] == before
    assert not torch.cuda.is_available()
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
    module = nn.Linear(2, 2)
    weight = module.weight
    assert module.to(torch.float64).weight is weight
    assert not isinstance(VALUES.to(torch.float64) + 1, CudaTensor)
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        VALUES.to("cuda")
    with pytest.raises(RuntimeError, match="gone"):
        left + 1
