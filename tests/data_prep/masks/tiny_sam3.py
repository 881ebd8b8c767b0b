"""A SAM 3 that is small enough for tests: every part of the real one, and weights from a seed."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from transformers import CLIPTokenizer, Sam3Config, Sam3Model

SIDE = 112
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.6, 0.5]
SCORE, MASK = 0.3, 0.6  # thresholds; its scores lie between 0.15 and 0.45


def tiny_config(words: int) -> Sam3Config:
    """SAM 3 with all its parts and a quarter of a million weights."""
    tiny = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "image_size": SIDE,
        "window_size": 4,
        "global_attn_indexes": [1],
        "pretrain_image_size": 56,
    }
    return Sam3Config(
        vision_config={
            "backbone_config": backbone,
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config={
            "model_type": "clip_text_model",
            "vocab_size": words,
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        geometry_encoder_config={**tiny, "num_layers": 1},
        detr_encoder_config={**tiny, "num_layers": 1},
        detr_decoder_config={**tiny, "num_layers": 2, "num_queries": 7},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4},
    )


def write_tiny_sam3(folder: Path) -> Path:
    """A checkpoint with random weights, large enough that photos and prompts make a difference."""
    letters = string.ascii_lowercase
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    model = Sam3Model(tiny_config(len(words)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    image = {"size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN, "image_std": STD}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": image}))
    return folder
