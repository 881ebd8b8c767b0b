import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel


@pytest.fixture(scope="session")
def dinov3_folder(tmp_path_factory):
    """A folder with a small random DINOv3 ViT: the real architecture, no real weights."""
    config = DINOv3ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        num_register_tokens=3,
        patch_size=16,
        use_gated_mlp=True,
        hidden_act="silu",
    )
    torch.manual_seed(0)
    model = DINOv3ViTModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)  # large enough for attention and positions to matter
    folder = tmp_path_factory.mktemp("dinov3")
    model.save_pretrained(folder)
    return str(folder)
