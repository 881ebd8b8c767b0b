import pytest
import torch

from pipeline.model.attention import GatedAttention, GatedLayer
from pipeline.model.config import ModelConfig
from tests.model.reference import gated_attention, rms_norm, sparse_experts

SMALL = ModelConfig(width=32, heads=4, fusion_heads=4, experts=4, experts_per_token=2, expert_width=24)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    module = GatedAttention(width=32, heads=4).double()
    torch.nn.init.normal_(module.q_norm.weight)
    torch.nn.init.normal_(module.k_norm.weight)
    return module


@pytest.fixture
def layer():
    torch.manual_seed(0)
    module = GatedLayer(SMALL).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.fixture
def tokens():
    return torch.randn(3, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


MASKS = {
    "whole": torch.ones(3, 7, dtype=torch.bool),
    "padded": torch.arange(7) < torch.tensor([[7], [5], [2]]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_equals_its_transcription(attention, tokens, mask):
    ours = attention(tokens, mask)
    for image in range(3):
        torch.testing.assert_close(ours[image], gated_attention(attention, tokens[image], mask[image]))


def test_the_gate_closes_channels_before_the_output_projection(attention, tokens):
    """A gate shut for one head's channels takes away exactly what these channels give to the output."""
    mask = MASKS["whole"]
    column = torch.full((32,), -1e3).double()
    column[8:] = 0.0  # sigmoid 0 for the first head, 1/2 for the others
    positive = tokens.abs()
    positive[..., 0] = 1.0
    attention.gate_proj.weight.data.zero_()
    attention.gate_proj.weight.data[:, 0] = column
    shut = attention(positive, mask)
    attention.gate_proj.weight.data.zero_()
    attention.o_proj.weight.data[:, :8] = 0
    torch.testing.assert_close(shut, attention(positive, mask))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_layer_adds_attention_and_experts_to_its_normed_input(layer, tokens, mask):
    ours, logits = layer(tokens, mask)
    for image in range(3):
        x = tokens[image]
        x = x + gated_attention(layer.attention, rms_norm(x, layer.attention_norm.weight), mask[image])
        update, expected_logits = sparse_experts(layer.mlp, rms_norm(x, layer.mlp_norm.weight), top_k=2)
        # The router's softmax is fp32 whatever the input.
        torch.testing.assert_close(ours[image], x + update, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits[image], expected_logits)


def test_what_stands_under_the_mask_is_irrelevant(layer, tokens):
    mask = MASKS["padded"]
    before, _ = layer(tokens, mask)
    after, _ = layer(torch.where(mask[..., None], tokens, 100 * tokens + 1), mask)
    torch.testing.assert_close(before[mask], after[mask])


def test_padding_changes_nothing(layer, tokens):
    alone, _ = layer(tokens, MASKS["whole"])
    padded = torch.cat([tokens, torch.randn(3, 4, 32).double()], dim=1)
    mask = torch.arange(11).expand(3, -1) < 7
    torch.testing.assert_close(layer(padded, mask)[0][:, :7], alone)


def test_permuting_tokens_permutes_outputs(layer, tokens):
    mask = MASKS["padded"]
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    straight, straight_logits = layer(tokens, mask)
    permuted, permuted_logits = layer(tokens[:, order], mask[:, order])
    torch.testing.assert_close(permuted, straight[:, order])
    torch.testing.assert_close(permuted_logits, straight_logits[:, order])


def test_without_its_gate_attention_is_plain(attention, tokens):
    plain = GatedAttention(width=32, heads=4, gated=False).double()
    plain.load_state_dict({name: value for name, value in attention.state_dict().items() if "gate" not in name})
    attention.gate_proj.weight.data.zero_()  # sigmoid 1/2 everywhere
    torch.testing.assert_close(plain(tokens, MASKS["whole"]), 2 * attention(tokens, MASKS["whole"]))
