"""Text descriptions as vectors of a frozen sentence encoder, computed here once and never in training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer

from data_prep.work.threads import one_thread
from pipeline.errors import UserError
from pipeline.progress import say, silence_libraries, track

MAX_TOKENS = 256  # as all-MiniLM-L6-v2 is used; longer texts are cut
DECIMALS = 6  # a float32 of a unit vector has hardly more, and records stay short


@dataclass(frozen=True)
class TextVectors:
    """One vector per text, as records hold them, made when asked for: as tuples, all of them fill the memory."""

    matrix: np.ndarray
    """Vectors of the distinct texts, float32 [M, dim], each of length 1."""
    rows: np.ndarray
    """Row of `matrix` for each text, -1 for NULL, int64 [N]."""

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.matrix.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[float, ...] | None:
        """The vector of a text, rounded to 6 decimals; None for NULL."""
        row = int(self.rows[number])
        return None if row < 0 else tuple(self.matrix[row].astype(np.float64).round(DECIMALS).tolist())


def embed(texts: Sequence[str | None], encoder: str) -> TextVectors:
    """Embed texts, each distinct one once.

    Args:
        texts: One per photo, None for NULL.
        encoder: Folder or hub id of a sentence encoder that transformers can load.

    Raises:
        UserError: The encoder is not available, or is not a sentence encoder.
    """
    sentence_encoder = SentenceEncoder(encoder)
    numbers: dict[str, int] = {}
    for text in texts:
        if text is not None:
            numbers.setdefault(text, len(numbers))
    matrix = np.empty((len(numbers), sentence_encoder.dim), dtype=np.float32)
    with one_thread():
        for text, number in track(numbers.items(), len(numbers), "embedding descriptions", unit="texts"):
            matrix[number] = sentence_encoder(text)
    cut, most = sentence_encoder.cut, sentence_encoder.max_tokens
    if cut:
        say(f"{cut} of {len(numbers)} descriptions were cut after {most} tokens")
    rows = np.array([-1 if text is None else numbers[text] for text in texts], dtype=np.int64)
    return TextVectors(matrix, rows)


class SentenceEncoder:
    """A transformers encoder, mean pooling over its tokens, and normalisation to length 1.

    This is how the sentence-transformers models of the all-MiniLM and all-mpnet families are trained and used
    (Sentence-BERT, arXiv 1908.10084, section 3, MEAN). An encoder that was trained for another pooling loads too,
    but its vectors are less useful.
    """

    def __init__(self, name: str):
        """Load the weights in float32.

        Raises:
            UserError: The weights are not available, or are not those of a text encoder.
        """
        self.tokenizer, self.model = _load(name)
        self.dim = int(self.model.config.hidden_size)
        self.max_tokens = min(MAX_TOKENS, self.tokenizer.model_max_length)
        self.cut = 0  # texts so far that were longer
        folder = Path(name)
        self.identity = f"{folder.resolve().name if folder.is_dir() else name}@{self._fingerprint()[:16]}"

    @torch.inference_mode()
    def __call__(self, text: str) -> np.ndarray:
        """Embed one text: float32 [dim].

        One at a time, so that the vector depends on the text alone. In a batch it would depend, in its last bits,
        on what else is there; a batch of 32 takes half the time.
        """
        text = text.encode("utf-8", "replace").decode()  # JSON can spell halves of surrogate pairs, tokenizers refuse
        tokens = self.tokenizer(text, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        if tokens["input_ids"].shape[1] == self.max_tokens:
            self.cut += len(self.tokenizer(text, verbose=False)["input_ids"]) > self.max_tokens
        # Without padding the attention mask is all ones, and the masked mean is the mean.
        pooled = self.model(**tokens).last_hidden_state[0].double().mean(dim=0)
        vector: np.ndarray = (pooled / pooled.norm()).float().numpy()
        return vector

    def _fingerprint(self) -> str:
        """SHA-256 of what decides the vectors: weights and vocabulary."""
        digest = hashlib.sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            if not _unused(name):
                digest.update(name.encode())
                digest.update(weight.numpy().tobytes())
        return digest.hexdigest()


def _load(name: str) -> tuple[Any, Any]:
    """Tokenizer and model. Code that comes with weights is never run."""
    way_out = "give --text_encoder a folder or a hub id such as sentence-transformers/all-MiniLM-L6-v2"
    silence_libraries()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        loaded: Any = AutoModel.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the text encoder {name!r}: it is neither a local folder with weights and tokenizer nor "
            f"reachable on the hub; {way_out}, which `hf download` fetches for a machine without network"
        ) from error
    except SafetensorError as error:
        raise UserError(f"the weights of the text encoder {name!r} are damaged ({error}); fetch them again") from error
    model, report = loaded
    config = model.config
    if config.is_encoder_decoder or model.main_input_name != "input_ids" or not hasattr(config, "hidden_size"):
        raise UserError(f"{name!r} is of type {config.model_type}, no sentence encoder; {way_out}")
    random = sorted(key for key in report["missing_keys"] if not _unused(key))
    if random:
        raise UserError(f"the text encoder {name!r} is incomplete, {random[0]} is missing; {way_out}")
    return tokenizer, model.eval()


def _unused(weight: str) -> bool:
    """Whether a weight belongs to the pooler of BERT-like models, which is not used here and often absent."""
    return weight.startswith("pooler.")
