"""The operations for training on a CPU are PyTorch's, and so are their first and second derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from pipeline.model.cpu_kernels import HAS_ONEDNN, Linear, RMSNorm, biased_attention, linear


def heads(*shape, dtype=torch.float64):
    return tuple(torch.randn(*shape, dtype=dtype, requires_grad=True) for _ in range(3))


def gates(photos, tokens, dtype=torch.float64):
    """Biases of the keys, of which the last one is not attended to."""
    bias = torch.randn(photos, tokens, dtype=dtype)
    bias[:, -1] = -torch.inf
    return bias.requires_grad_()


def derivatives(value, leaves):
    """Gradients of a scalar function of the value, and then those of a scalar function of these."""
    probe = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    first = torch.autograd.grad((value.square() * probe).sum(), leaves, create_graph=True)
    known = [part.nan_to_num().sin().sum() for part in first]
    return first, torch.autograd.grad(torch.stack(known).sum(), leaves)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_that_of_pytorch(bias):
    layer = Linear(6, 4, bias=bias).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    leaves = (x, *layer.parameters())
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    for ours, theirs in zip(derivatives(layer(x), leaves), derivatives(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert gradcheck(linear, leaves)
    assert gradgradcheck(linear, leaves)


@pytest.mark.skipif(not HAS_ONEDNN, reason="a PyTorch without oneDNN")
def test_products_of_a_linear_layer_in_fp32_are_those_of_onednn_and_within_rounding():
    layer = Linear(96, 64)
    x = torch.randn(5, 40, 96, requires_grad=True)
    leaves = (x, *layer.parameters())
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with torch.profiler.profile() as profile:
        ours = derivatives(layer(x), leaves)
    names = {event.key for event in profile.key_averages()}
    assert "mkldnn::_linear_pointwise" in names
    assert not names & {"aten::mm", "aten::addmm"}
    for some, others in zip(ours, derivatives(F.linear(*exact), exact), strict=True):
        for one, other in zip(some, others, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_a_linear_layer_spares_the_gradient_that_nobody_asks_for():
    layer = Linear(6, 4)
    x = torch.randn(3, 6)
    layer(x).sum().backward()
    assert x.grad is None
    layer.weight.requires_grad_(False)
    layer.weight.grad = None
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 6.0))


@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 4, 2, 8)])
def test_the_norm_is_that_of_pytorch(shape):
    norm = RMSNorm(shape[-1]).double()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    leaves = (x, norm.weight)
    expected = F.rms_norm(x, shape[-1:], norm.weight)
    torch.testing.assert_close(norm(x), expected)
    for ours, theirs in zip(derivatives(norm(x), leaves), derivatives(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert gradcheck(norm, (x,))
    assert gradgradcheck(norm, (x,))


def test_a_norm_of_zeros_and_one_in_16_bits_are_those_of_pytorch():
    norm = RMSNorm(8)
    x = torch.zeros(3, 8, requires_grad=True)
    norm(x).sum().backward()
    expected = torch.zeros(3, 8, requires_grad=True)
    F.rms_norm(expected, (8,), norm.weight).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)
    half = torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(norm.bfloat16()(half), F.rms_norm(half, (8,), norm.weight))


def test_biased_attention_is_that_of_pytorch():
    query, key, value = heads(2, 3, 5, 4)
    bias = gates(2, 5)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[:, None, None, :])
    found = biased_attention(query, key, value, bias)
    torch.testing.assert_close(found, expected)
    leaves = (query, key, value, bias)
    for ours, theirs in zip(derivatives(found, leaves), derivatives(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
    finite = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(biased_attention, (query, key, value, finite))
    assert gradgradcheck(biased_attention, (query, key, value, finite))


def test_biased_attention_in_fp32_is_within_rounding():
    query, key, value = heads(2, 4, 136, 32, dtype=torch.float32)
    bias = gates(2, 136, torch.float32)
    found = biased_attention(query, key, value, bias)
    exact = [part.detach().double().requires_grad_() for part in (query, key, value, bias)]
    expected = F.scaled_dot_product_attention(*exact[:3], attn_mask=exact[3][:, None, None, :])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    probe = torch.randn_like(found)
    ours = torch.autograd.grad((found * probe).sum(), (query, key, value, bias))
    theirs = torch.autograd.grad((expected * probe).sum(), exact)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
