from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.optim.ema import WeightAverage, decay_at


def model_with_a_frozen_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    return model


def wander(model, seed):
    """Stands for an optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_decay_warms_up_to_its_limit():
    assert [decay_at(step) for step in (0, 1, 8, 90)] == pytest.approx([1 / 10, 2 / 11, 9 / 18, 91 / 100])
    assert decay_at(10_000_000) == 0.9999
    assert decay_at(1000, max_decay=0.5) == 0.5
    decays = [decay_at(step) for step in range(0, 200_000, 100)]
    assert all(a <= b for a, b in pairwise(decays))


def test_the_average_follows_its_recursion():
    model = model_with_a_frozen_part()
    average = WeightAverage(model, max_decay=0.8)
    expected = {name: p.detach().double().numpy() for name, p in model[0].named_parameters(prefix="0")}
    for step in range(50):
        wander(model, seed=step)
        average.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        for name, p in model[0].named_parameters(prefix="0"):
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double().numpy()
    assert set(average.tensors) == set(expected) == {"0.weight", "0.bias"}
    for name, tensor in average.tensors.items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-5, atol=1e-5)


def test_little_of_the_initial_weights_remains_after_a_run():
    """The share that a run's first weights keep is the product of the decays."""
    share = np.prod([decay_at(step) for step in range(500)])
    assert share < 1e-12


def test_the_average_is_fp32_whatever_the_model():
    model = nn.Linear(4, 3).to(torch.bfloat16)
    average = WeightAverage(model)
    for step in range(200, 210):
        average.update(step)
    assert all(tensor.dtype == torch.float32 for tensor in average.tensors.values())
    assert torch.equal(average.tensors["weight"], model.weight.float())


def test_the_average_does_not_share_memory_with_the_model():
    model = model_with_a_frozen_part()
    average = WeightAverage(model)
    before = average.tensors["0.weight"].clone()
    wander(model, seed=0)
    assert torch.equal(average.tensors["0.weight"], before)


def test_a_loaded_average_is_the_one_that_was_gathered():
    average, other = (WeightAverage(model_with_a_frozen_part()) for _ in range(2))
    wander(average.model, seed=0)
    average.update(0)
    assert not torch.equal(average.tensors["0.weight"], other.tensors["0.weight"])
    other.load(average.gathered())
    assert all(torch.equal(other.tensors[name], value) for name, value in average.tensors.items())
