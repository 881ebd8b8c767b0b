"""SAM 3 as a painter of class masks: a text prompt for each class goes in, one map of classes per photo comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoTokenizer, ImageProcessingMixin, Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pipeline.errors import UserError, require
from pipeline.model.backbone import compute_dtype
from pipeline.progress import silence_libraries

# The hub's checkpoint is the video model, whose detector is the image model.
MODEL_TYPES = ("sam3", "sam3_video")
PROMPT_TOKENS = 32  # what SAM 3 pads every prompt to


@dataclass(frozen=True)
class Instance:
    """One object that was found."""

    score: float
    class_id: int
    logits: torch.Tensor
    """[h, w], coarse; its sigmoid is the probability that a pixel belongs to the object."""


class Segmenter:
    """SAM 3 (arXiv 2511.16719) with one fixed text prompt per class.

    `Sam3Processor` is not used, because its image half needs torchvision, whose usual builds do not load beside a
    torch without CUDA. What it does to a photo is a resize, here in the workers that decode, and a normalisation.
    """

    def __init__(
        self, name: str, prompts: Sequence[str], device: torch.device, *, score_threshold: float, mask_threshold: float
    ):
        """Load the model and encode the prompts.

        Args:
            name: A local folder or a hub id.
            prompts: Short noun phrases, the one of class c at position c.
            device: Device that computes, in bf16 on CUDA and in fp32 elsewhere.
            score_threshold: Objects at or below it are dropped.
            mask_threshold: Pixels of an object at or below this probability are dropped.

        Raises:
            UserError: The weights are not available, or are not SAM 3, or a prompt is too long.
        """
        self.score_threshold, self.mask_threshold = score_threshold, mask_threshold
        self.device, self.dtype = device, compute_dtype(device)
        model, tokenizer, image = _load(name)
        self.side_px = int(image["size"]["height"])
        self.fingerprint = _fingerprint(model, [self.side_px, image["image_mean"], image["image_std"]])
        self.model = model.to(device)
        self._mean = torch.tensor(image["image_mean"], device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(image["image_std"], device=device).view(1, 3, 1, 1)
        encoded = tokenizer(list(prompts), padding="max_length", max_length=PROMPT_TOKENS)
        for prompt, tokens in zip(prompts, encoded["input_ids"], strict=True):
            fits = len(tokens) <= PROMPT_TOKENS
            require(fits, "--prompts", prompt, f"a short noun phrase, at most {PROMPT_TOKENS} tokens")
        self._prompt_mask = torch.tensor(encoded["attention_mask"], device=device)
        input_ids = torch.tensor(encoded["input_ids"], device=device)
        with torch.inference_mode(), self._autocast():
            self._prompts = model.get_text_features(input_ids, self._prompt_mask).pooler_output

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Segment a batch of photos.

        Args:
            pixels: uint8 [B, S, S, 3], RGB, the photos squeezed to squares of `side_px`.
            sizes: Height and width of each photo as it was.

        Returns:
            For each photo uint8 [H, W]: c + 1 where class c was found, 0 elsewhere. Of objects that overlap, the
            one with the higher score wins.
        """
        found = zip(self.find(pixels), sizes, strict=True)
        return [paint(instances, size, self.mask_threshold).cpu().numpy() for instances, size in found]

    @torch.inference_mode()
    def find(self, pixels: np.ndarray) -> list[list[Instance]]:
        """The objects in each photo of a batch, with `pixels` as in `__call__`."""
        squares = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
        found: list[list[Instance]] = [[] for _ in squares]
        with self._autocast():
            # The vision encoder is most of the work, and the same for every prompt.
            vision = self.model.get_vision_features((squares.float() / 255 - self._mean) / self._std)
            for class_id, (prompt, mask) in enumerate(zip(self._prompts, self._prompt_mask, strict=True)):
                output = self.model(
                    vision_embeds=vision,
                    text_embeds=BaseModelOutputWithPooling(pooler_output=prompt.expand(len(squares), -1, -1)),
                    attention_mask=mask.expand(len(squares), -1),
                )
                # Presence says whether the photo shows the class at all, a query's own score where.
                scores = output.pred_logits.float().sigmoid() * output.presence_logits.float().sigmoid()
                for photo, query in (scores > self.score_threshold).nonzero().tolist():
                    logits = output.pred_masks[photo, query].float()
                    found[photo].append(Instance(scores[photo, query].item(), class_id, logits))
        return found

    def _autocast(self) -> torch.autocast:
        # Rather than weights in bf16: norms and box coordinates keep fp32.
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def paint(instances: Sequence[Instance], size: tuple[int, int], threshold: float) -> torch.Tensor:
    """Draw objects into one map of classes, one at a time: all of them at a photo's size would not fit in memory.

    Args:
        instances: In any order. The higher score wins a pixel; at equal scores, the class that comes first.
        size: Height and width in pixels.
        threshold: Probability above which a pixel belongs to an object.

    Returns:
        uint8 [H, W]: c + 1 for class c, 0 for none.
    """
    canvas = torch.zeros(size, dtype=torch.uint8, device=instances[0].logits.device if instances else None)
    for instance in sorted(instances, key=lambda found: (found.score, -found.class_id)):
        coarse = instance.logits.sigmoid()[None, None]
        probability = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)[0, 0]
        canvas.masked_fill_(probability > threshold, instance.class_id + 1)
    return canvas


def _load(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model on the CPU in fp32, its tokenizer, and what it expects of an image."""
    way_out = "choose another --model (a folder or a hub id)"
    silence_libraries()
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind not in MODEL_TYPES:
            raise UserError(f"the segmenter {name!r} is of type {kind}, not {MODEL_TYPES[0]}; {way_out}")
        loaded: Any = Sam3Model.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
        image, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the segmenter {name!r}: it is neither a local folder with weights and processor nor "
            "reachable on the hub; for gated weights accept the licence on their page and run `hf auth login`, or "
            f"{way_out}"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        # Missing weights would be random, and so would the masks.
        missing = sorted(report["missing_keys"])
        raise UserError(f"the segmenter {name!r} lacks {len(missing)} weights, such as {missing[0]}; {way_out}")
    return model, tokenizer, image


def _fingerprint(model: Sam3Model, image: list) -> str:
    """SHA-256 of the weights and of the preprocessing of a photo: the same for a hub id and its local copy."""
    digest = hashlib.sha256(repr(image).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
