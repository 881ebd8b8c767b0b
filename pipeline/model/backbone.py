"""Component 1: the frozen DINOv3 backbone and the pooling of its patch tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import torch.nn.functional as F
from transformers import AutoModel, DINOv3ViTConfig, PreTrainedModel

from pipeline.devices import has_bf16, upload
from pipeline.errors import UserError
from pipeline.model.config import MAX_VIEWS_PER_PASS
from pipeline.parsing.typed_json import Whole, parse_json

VITH16PLUS = "facebook/dinov3-vith16plus-pretrain-lvd1689m"
SCENES_TINY = Path(__file__).parents[1] / "assets" / "scenes-tiny"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def vith16plus_config() -> DINOv3ViTConfig:
    """The configuration of `VITH16PLUS` (arXiv 2508.10104): 840.6 M parameters."""
    return DINOv3ViTConfig(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        intermediate_size=5120,
        use_gated_mlp=True,
        hidden_act="silu",
        num_register_tokens=4,
        patch_size=16,
    )


def compute_dtype(device: torch.device) -> torch.dtype:
    """The precision in which the backbone computes: bf16 on a GPU that has it, and fp32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" and has_bf16() else torch.float32


# Keys of a transformers configuration that do not change the computation.
BOOKKEEPING = frozenset({"transformers_version", "architectures", "dtype"})
FINGERPRINT_DTYPE = torch.bfloat16
Size = Annotated[int, msgspec.Meta(gt=0, le=1 << 16)]


@dataclass(frozen=True)
class _Sizes:
    """What a backbone's config.json must not overdo: the model is built before its weights are compared."""

    model_type: str
    hidden_size: Size = 384
    intermediate_size: Size = 1536
    num_hidden_layers: Annotated[int, msgspec.Meta(gt=0, le=512)] = 12
    num_attention_heads: Size = 6
    patch_size: Size = 16
    num_register_tokens: Whole = 0


def _load_dinov3(name: str, dtype: torch.dtype, local_files_only: bool, option: str) -> PreTrainedModel:
    way_out = f"with {option} (a folder, a hub id or scenes-tiny)"
    source = str(SCENES_TINY) if name == "scenes-tiny" else name
    try:
        if (Path(source) / "config.json").is_file():
            parse_json((Path(source) / "config.json").read_bytes(), _Sizes)
        found: Any = AutoModel.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", local_files_only=local_files_only, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged folder ends transformers in many ways
        if Path(source).is_dir():
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"cannot load the backbone {name!r}: the folder is incomplete or damaged ({reason:.200}); copy it "
                f"anew, or choose another {way_out}"
            ) from error
        if not isinstance(error, (OSError, ValueError)):
            raise
        raise UserError(
            f"cannot load the backbone {name!r}: it is neither a local folder with weights nor reachable on "
            "the hub; for gated weights accept the licence on their page and run `hf auth login`, or choose "
            f"others {way_out}"
        ) from error
    model, report = found
    kind = model.config.model_type
    if kind != "dinov3_vit":
        raise UserError(f"the backbone {name!r} is of type {kind}, not dinov3_vit; choose another {way_out}")
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would draw them at random
        raise UserError(
            f"cannot load the backbone {name!r}: its weights lack {missing[0]}; copy it anew, or choose another "
            f"{way_out}"
        )
    loaded: PreTrainedModel = model
    return loaded


def weights_fingerprint(backbone: FrozenBackbone) -> str:
    """SHA-256 of the configuration and of all weights, rounded to bf16 so that it is the same on every device.

    Weights that differ by less give tokens that differ by less than the stored precision. The mission's backbone has
    1.7 GB of them: about two seconds on a core without instructions for SHA-256.
    """
    settings = {key: value for key, value in backbone.config.to_diff_dict().items() if key not in BOOKKEEPING}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in sorted(backbone.model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        rounded = parameter.to(FINGERPRINT_DTYPE).cpu().contiguous()
        digest.update(memoryview(rounded.view(torch.int16).numpy()).cast("B"))
    return digest.hexdigest()


class FrozenBackbone:
    """A DINOv3 ViT that is never trained, never saved and never in train mode.

    It is deliberately no `nn.Module`: a parent's `.train()` must not reach it (its RoPE rescales coordinates at random
    in train mode), and optimizers, DeepSpeed and `state_dict` must not find its parameters.
    """

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
        option: str = "--model.backbone",
    ):
        """Load the backbone.

        Args:
            name: `scenes-tiny`, a local folder, or a hub id.
            device: Device on which it runs, in bf16 on CUDA and in fp32 elsewhere.
            local_files_only: Do not ask the hub, since the weights are in its cache.
            option: What chooses another backbone, for messages.

        Raises:
            UserError: The weights are not available or not whole, or are no DINOv3 ViT; the message says what to do.
        """
        self.name = name
        # In the precision in which it computes: fp32 would take twice the host's memory, in each of its processes.
        model = _load_dinov3(name, compute_dtype(torch.device(device)), local_files_only, option)
        self.config = model.config
        self.model = model.eval().requires_grad_(False)
        self.to(device)

    @cached_property
    def fingerprint(self) -> str:
        """`weights_fingerprint`, computed once: the weights never change."""
        return weights_fingerprint(self)

    @property
    def hidden_size(self) -> int:
        """Width D of a token."""
        return int(self.config.hidden_size)

    @property
    def num_parameters(self) -> int:
        """The number of parameters, all of them frozen."""
        return sum(p.numel() for p in self.model.parameters())

    def to(self, device: torch.device | str) -> FrozenBackbone:
        """Move the weights to a device, where they compute in bf16 if it is CUDA."""
        self.device = torch.device(device)
        dtype = compute_dtype(self.device)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(self.device, dtype)
        # Buffers keep their precision: RoPE frequencies in bf16 would misplace patches by up to 0.4 %.
        self.model.to(self.device)
        self._mean = torch.tensor(IMAGENET_MEAN, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=self.device).view(1, 3, 1, 1)
        return self

    @torch.no_grad()
    def __call__(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the backbone.

        Args:
            views: uint8 [N, 3, S, S], RGB.

        Returns:
            CLS tokens [N, D] and the grid of patch tokens [N, S/16, S/16, D], both after the final norm.
        """
        outputs = [self._forward(chunk) for chunk in views.split(MAX_VIEWS_PER_PASS)]
        cls, patches = zip(*outputs, strict=True)
        return torch.cat(cls), torch.cat(patches)

    def _forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = (upload(views, self.device).float() / 255 - self._mean) / self._std
        # Without the caller's autocast, so that training sees the same tokens as the feature cache holds.
        with torch.autocast(self.device.type, enabled=False):
            tokens = self.model(pixel_values=pixels).last_hidden_state
        grid = views.shape[-1] // self.config.patch_size
        prefix = 1 + self.config.num_register_tokens  # order: CLS, registers, patches
        return tokens[:, 0], tokens[:, prefix:].unflatten(1, (grid, grid))


def pool_cells(patches: torch.Tensor, grid: int) -> torch.Tensor:
    """Mean and max of the patch tokens of each cell: a mean alone would lose small objects.

    Args:
        patches: [N, h, w, D].
        grid: Cells per side g.

    Returns:
        [N, g*g, 2D], row-major.
    """
    channels_first = patches.permute(0, 3, 1, 2)
    mean = F.adaptive_avg_pool2d(channels_first, grid)
    peak = F.adaptive_max_pool2d(channels_first, grid)
    return torch.cat([mean, peak], dim=1).flatten(2).transpose(1, 2)


def pool_regions(patches: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Mean of a view's patch tokens under each box, patches weighted by the area that the box covers.

    Args:
        patches: [B, h, w, D], the patch grid of the global view.
        boxes: [B, V, 4] as x0, y0, x1, y1 in [0, 1].

    Returns:
        [B, V, D].
    """
    _, height, width, _ = patches.shape
    boxes = upload(boxes, patches.device)
    across = interval_overlap(boxes[..., 0], boxes[..., 2], width)
    down = interval_overlap(boxes[..., 1], boxes[..., 3], height)
    weights = down[..., :, None] * across[..., None, :]
    weights = weights / weights.sum((-2, -1), keepdim=True)
    # In the boxes' precision: weights rounded to bf16 would not sum to 1.
    means = torch.einsum("bvhw,bhwd->bvd", weights, patches.to(weights.dtype))
    return means.to(patches.dtype)


def interval_overlap(low: torch.Tensor, high: torch.Tensor, cells: int) -> torch.Tensor:
    """Length of [low, high] inside each of `cells` equal parts of [0, 1], in units of a part: [..., cells]."""
    edges = torch.arange(cells, device=low.device)
    inside = torch.minimum(high[..., None] * cells, edges + 1) - torch.maximum(low[..., None] * cells, edges)
    return inside.clamp(min=0)
