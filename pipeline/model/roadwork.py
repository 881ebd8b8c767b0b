"""Component 11: the complete model, which joins the frozen backbone with the trained head."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.devices import upload
from pipeline.errors import UserError
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.baselines import BASELINES
from pipeline.model.config import METADATA_FIELDS, InputSpec, LossConfig, ModelConfig
from pipeline.model.encoder import CachedTokens, Encoded, MixedTokens, Tokens, TokenSource, TwoStageEncoder
from pipeline.model.ensemble import Ensemble
from pipeline.model.losses import Targets, combine, count_targets, loss_terms
from pipeline.model.mixup import Mix, draw_mix
from pipeline.model.model_folder import (
    FORMAT_VERSION,
    MODEL_TYPE,
    check_fit,
    check_seal,
    checked_values,
    damaged,
    read_values,
    read_weights,
    write_sealed,
)
from pipeline.model.output import RoadworkOutput
from pipeline.model.pruning import StoppingRule
from pipeline.model.trunk import Trunk
from pipeline.model.version_1 import TrunkV1
from pipeline.names import LABEL_NAMES, MASK_CLASSES, WEATHER
from pipeline.parsing.typed_json import Malformed
from pipeline.progress import say


class RoadworkConfig(PreTrainedConfig):
    """`ModelConfig` in the form that transformers saves with the weights."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        backbone_dim: int = 0,
        decode_scale: str = "full",
        decision_bias: float = 0.0,
        decision_slope: float = 1.0,
        stopping: dict[str, Any] | None = None,
        ensemble: int = 1,
        pruners: int = 1,
        format_version: int = FORMAT_VERSION,
        backbone_sha256: str | None = None,
        **kwargs: Any,
    ):
        """Take the fields of `ModelConfig` as keywords.

        Args:
            backbone_dim: Width D of the backbone's tokens; the head's sizes follow from it.
            decode_scale: Scale at which the model's training photos were decoded; the rest of `InputSpec` follows from
                the fields.
            decision_bias: Subtracted from the log-odds, so that a probability of 0.5 is the best cut; `export` sets it.
            decision_slope: Factor of the difference, above 0, so that a probability is the share of photos with
                roadwork among those that get it; `export` sets it.
            stopping: The fields of a `StoppingRule`, which `early-exit` sets. Without one the pruning mode `dynamic`
                never stops before it has `keep_views`.
            ensemble: Number K of heads; see `Ensemble`.
            pruners: Number of pruners whose mean score chooses the views; several in a merged model.
            format_version: 1 for models of before November 2026, which compute as they always did; see
                `pipeline.model.version_1`.
            backbone_sha256: Fingerprint of the backbone that the head was saved with, see `FrozenBackbone.fingerprint`;
                None where it is not known.
            **kwargs: Fields of `ModelConfig`, and those of transformers' own configuration.
        """
        names = ModelConfig.__dataclass_fields__
        sizes = ModelConfig(**{name: kwargs.pop(name) for name in names if name in kwargs})
        for name, value in asdict(sizes).items():
            setattr(self, name, value)
        self.backbone_dim = backbone_dim
        self.decode_scale = decode_scale
        self.decision_bias, self.decision_slope = decision_bias, decision_slope
        self.ensemble, self.pruners, self.format_version = ensemble, pruners, format_version
        self.stopping, self.backbone_sha256 = stopping, backbone_sha256
        kwargs["id2label"] = dict(LABEL_NAMES)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a saved configuration; see `pipeline.model.model_folder.checked_values` for what is refused."""
        return super().from_dict(checked_values(config_dict), **kwargs)

    @property
    def sizes(self) -> ModelConfig:
        """The model's sizes and switches as a `ModelConfig`."""
        return ModelConfig(**{name: getattr(self, name) for name in ModelConfig.__dataclass_fields__})

    @property
    def input_spec(self) -> InputSpec:
        """How a photo becomes this model's input; see `pipeline.data.dataset.prepare`."""
        return self.sizes.input_spec(self.decode_scale)


def build_head(config: RoadworkConfig) -> nn.Module:
    """The trained head that a configuration describes: a trunk or a baseline, or several of them."""
    sizes = config.sizes
    trunk = TrunkV1 if config.format_version == 1 else Trunk
    kind = trunk if sizes.head == "roadwork" else BASELINES[sizes.head]
    members = [kind(sizes, config.backbone_dim) for _ in range(config.ensemble)]
    return Ensemble(members) if config.ensemble > 1 else members[0]


class RoadworkModel(PreTrainedModel):
    """Classifies a photo's twelve views as *roadwork* or *none*, with weather, segmentation and views' importance.

    The backbone is not in the module tree: it is neither trained, nor saved, nor seen by an optimizer.
    """

    config_class = RoadworkConfig
    main_input_name = "views"

    def __init__(self, config: RoadworkConfig, loss: LossConfig | None = None):
        """Build the head alone; `build` and `from_pretrained` attach the backbone.

        Args:
            config: Sizes and switches.
            loss: Weights of the loss; without them the model only answers.
        """
        super().__init__(config)
        self.encoder = TwoStageEncoder(config)
        self.head = build_head(config)
        self.loss_config = loss
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: every part has initialised itself, which transformers' general scheme must not undo."""

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        loss: LossConfig | None,
        decode_scale: str = "full",
        device: torch.device | str = "cpu",
        heads: int = 1,
        local_files_only: bool = False,
    ) -> RoadworkModel:
        """A model with a new head, or several, on a loaded backbone.

        Args:
            config: Sizes and switches.
            loss: Weights of the loss to train it with; None for a model that only answers.
            decode_scale: Scale at which photos are decoded, see `InputSpec`.
            device: Device of head and backbone.
            heads: Number K of heads; see `Ensemble`.
            local_files_only: Do not ask the hub for the backbone, since it is in the cache.

        Raises:
            UserError: The backbone's weights are not available.
        """
        backbone = FrozenBackbone(config.backbone, device, local_files_only)
        width = backbone.hidden_size
        sizes = RoadworkConfig(**asdict(config), backbone_dim=width, decode_scale=decode_scale, ensemble=heads)
        model = cls(sizes, loss)
        return model.attach(backbone).to(device)

    @classmethod
    def merge(cls, models: Sequence[RoadworkModel]) -> RoadworkModel:
        """One model with all heads of several trained ones: it keeps views by the mean of their pruners' scores.

        The models must have the same sizes and backbone. What belongs to a single one of them, the cut, the slope and
        the rule of when to stop, is not taken over.

        Args:
            models: One or more models; the first one's backbone is attached to the merged one.
        """
        first = models[0]
        config = RoadworkConfig(
            **asdict(first.config.sizes), backbone_dim=first.config.backbone_dim,
            decode_scale=first.config.decode_scale, ensemble=sum(model.config.ensemble for model in models),
            pruners=sum(model.config.pruners for model in models), format_version=first.config.format_version,
        )  # fmt: skip
        merged = cls(config)
        parts: list[tuple[Any, str, list[Any]]] = [
            (merged.head, "members", [model.head for model in models]),
            (merged.encoder.pruner, "pruners", [model.encoder.pruner for model in models]),
        ]
        for whole, name, pieces in parts:
            if whole is not None:
                single = [part for piece in pieces for part in getattr(piece, name, [piece])]
                for own, part in zip(getattr(whole, name, [whole]), single, strict=True):
                    own.load_state_dict(part.state_dict())
        return merged.to(first.device, first.dtype).attach(first.backbone).eval()

    def save_pretrained(self, save_directory: str | os.PathLike[Any], **kwargs: Any) -> None:  # type: ignore[override]
        """Save the head; its config.json also holds the fingerprints of head and backbone.

        Args:
            save_directory: Folder.
            **kwargs: Further arguments of transformers.
        """
        super().save_pretrained(save_directory, **kwargs)
        self.save_config(save_directory)

    def save_config(self, folder: str | os.PathLike[Any]) -> None:
        """Write config.json beside weights that are saved already."""
        if self.encoder.backbone is not None:
            self.config.backbone_sha256 = self.encoder.backbone.fingerprint
        write_sealed(Path(folder), json.loads(self.config.to_json_string()))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        backbone: str | None = None,
    ) -> RoadworkModel:
        """Restore a saved head and its frozen backbone, and check that both are those that were saved.

        Args:
            folder: Folder of the head.
            device: Device of head and backbone; by default the CPU.
            backbone: Where the backbone is now, as a folder, a hub id or `scenes-tiny`; by default where the
                configuration says.

        Raises:
            UserError: The folder holds no such model or a damaged one, or the backbone's weights are not available or
                are others.
        """
        place = Path(folder)
        values = read_values(place)
        try:
            config = RoadworkConfig.from_dict(values)
        except Malformed as error:
            raise damaged(place / "config.json", str(error)) from error
        weights = read_weights(place)
        parts = config.ensemble * (config.layers if config.head == "roadwork" else 1)
        if parts > len(weights):  # before any of them is built
            raise damaged(place / "config.json", f"it describes {parts} parts, but there are {len(weights)} tensors")
        with torch.device("meta"):
            model = cls(config)
        check_fit(place, weights, model.state_dict())
        if not check_seal(place, values):
            say(f"{place} is of an older version and holds no fingerprints: whether it has changed was not checked")
        model.load_state_dict(weights, assign=True)
        config.name_or_path = str(folder)
        model.eval().to(device or "cpu")
        frozen = FrozenBackbone(backbone or config.backbone, model.device, option="--backbone")
        return model.attach(frozen)

    def attach(self, backbone: FrozenBackbone) -> RoadworkModel:
        """Attach a backbone; returns the model.

        Raises:
            UserError: It is not the backbone that the head was trained on, as far as that is known.
        """
        wanted = self.config.backbone_sha256
        if backbone.hidden_size != self.config.backbone_dim:
            raise UserError(
                f"the backbone {backbone.name!r} has width {backbone.hidden_size}, but this head was trained on "
                f"{self.config.backbone_dim}; choose the backbone it was trained on"
            )
        if wanted is not None and wanted != backbone.fingerprint:
            raise UserError(
                f"the backbone {backbone.name!r} has other weights or another configuration than the one this head was "
                f"trained on (fingerprint {backbone.fingerprint[:12]}, and not {wanted[:12]}); choose that one"
            )
        self.encoder.backbone = backbone
        return self

    @property
    def backbone(self) -> FrozenBackbone:
        """The attached backbone."""
        backbone = self.encoder.backbone
        assert backbone is not None, "use RoadworkModel.build or from_pretrained, which attach one"
        return backbone

    def to(self, *args: Any, **kwargs: Any) -> RoadworkModel:  # type: ignore[override]
        """Move head and backbone to a device; a change of dtype is for the head only."""
        super().to(*args, **kwargs)
        if self.encoder.backbone is not None and self.encoder.backbone.device != self.device:
            self.encoder.backbone.to(self.device)
        return self

    def encode(self, batch: Mapping[str, torch.Tensor], *, keep_all: bool = False, mix: Mix | None = None) -> Encoded:
        """Run the pruner, and the backbone on the views that it keeps; several `answer`s may share the result.

        Args:
            batch: Tensors by name, see `forward`.
            keep_all: Prune nothing, whatever the configuration says.
            mix: How photos are mixed, see `draw_mix`.
        """
        boxes, view_mask = (upload(batch[name], self.device) for name in ("boxes", "view_mask"))
        source = self.source({**batch, "boxes": boxes})
        if mix is None:
            return self._choose(source, boxes, view_mask, keep_all)
        mix = mix.to(self.device)
        return replace(self._choose(MixedTokens(source, mix), boxes, view_mask, keep_all), mix=mix)

    def source(self, batch: Mapping[str, torch.Tensor]) -> TokenSource:
        """Where a batch's tokens come from: its views, or else the cached tokens; see `forward`."""
        if "views" in batch:
            return self.encoder.online(batch["views"], batch["boxes"])
        return CachedTokens(Tokens(*(upload(batch[name], self.device) for name in ("cls", "cells", "regions"))))

    def _choose(self, source: TokenSource, boxes: torch.Tensor, view_mask: torch.Tensor, keep_all: bool) -> Encoded:
        """Let the encoder choose views, with the head's help in the two modes that need it."""
        mode = "off" if keep_all or self.encoder.pruner is None else self.config.pruning
        if mode == "dynamic" and self.config.stopping is not None and not self.training:
            rule = StoppingRule(**self.config.stopping)

            def certain(seen: Encoded, number: int) -> torch.Tensor:
                # Without metadata, as in the headline score, since the rule was fitted without it.
                return rule.certain(self.log_odds(self.answer(seen, null_metadata=True)), number)

            return self.encoder.encode_in_rounds(source, boxes, view_mask, certain)
        importance = None
        if mode == "oracle":
            with torch.no_grad():
                everything = self.encoder(source, boxes, view_mask, keep_all=True)
                importance = self.answer(everything, null_metadata=True).view_importance
        encoded: Encoded = self.encoder(source, boxes, view_mask, keep_all, importance)
        return encoded

    def answer(
        self,
        encoded: Encoded,
        metadata: Mapping[str, torch.Tensor] | None = None,
        null_metadata: bool | torch.Tensor = False,
    ) -> RoadworkOutput:
        """Run the head on encoded views.

        Args:
            encoded: Views from `encode`.
            metadata: Fields by name, see `MetadataEncoder` for their shapes; a missing field is NULL, and other names
                are ignored.
            null_metadata: Treat metadata as NULL, see `forward`.
        """
        given = metadata or {}
        fields = {name: upload(given[name], self.device) if name in given else None for name in METADATA_FIELDS}
        output: RoadworkOutput = self.head(encoded, fields, null_metadata)
        return output

    def forward(
        self,
        batch: Mapping[str, torch.Tensor],
        *,
        null_metadata: bool | torch.Tensor | None = None,
        keep_all: bool = False,
        with_loss: bool = False,
        target_counts: torch.Tensor | None = None,
    ) -> RoadworkOutput:
        """Answer for a batch of photos, from their views or from all of their cached tokens.

        Args:
            batch: Tensors by name; other names are ignored:
                `views` uint8 [B, V, 3, S, S], see `pipeline.data.dataset.prepare`; or instead `cls` [B, V, D],
                `cells` [B, V, g*g, 2D] and `regions` [B, V, D], see `pipeline.model.encoder.all_tokens`.
                `boxes` [B, V, 4] and `view_mask` bool [B, V].
                `gps`, `weather`, `daytime`, `scene`, `text`, as far as they are known.
                For a loss: `labels` int64 [B], -1 where unknown; optional `mask_targets` [B, 6, m, m], NaN where
                unknown; and `weather`.
            null_metadata: True treats all metadata as NULL; bool [B] does so for the photos where it is true. By
                default the batch's own `null_metadata`, if it has one.
            keep_all: Prune nothing, whatever the configuration says.
            with_loss: Compute the loss too; in training this mixes photos where `loss.mixup_alpha` is above 0.
            target_counts: float [terms], the divisor of each term's sum, see `count_targets`; by default the counts of
                this batch.
        """
        if null_metadata is None:
            null_metadata = batch.get("null_metadata", False)
        if not with_loss:
            return self.answer(self.encode(batch, keep_all=keep_all), batch, null_metadata)
        loss = self.loss_config
        assert loss is not None, "a model that gives a loss is built with a LossConfig"
        mix = None
        if self.training and loss.mixup_alpha > 0:
            mix = draw_mix(batch["boxes"], batch["view_mask"], loss.mixup_alpha)
        encoded = self.encode(batch, keep_all=keep_all, mix=mix)
        output, targets = self.answer(encoded, batch, null_metadata), self._targets(batch)
        counts = count_targets(targets) if target_counts is None else target_counts
        output.loss_terms = loss_terms(output, targets, loss, self.config.experts_per_token, encoded.mix)
        output.loss = combine(output.loss_terms, upload(counts, self.device), loss)
        return output

    def _targets(self, batch: Mapping[str, torch.Tensor]) -> Targets:
        labels, side = batch["labels"], self.config.mask_side
        unknown = {
            "weather": torch.full((len(labels), len(WEATHER)), torch.nan, device=self.device),
            "mask_targets": torch.full((len(labels), len(MASK_CLASSES), side, side), torch.nan, device=self.device),
        }
        return Targets.from_batch({**unknown, **batch}).to(self.device)

    def probability(
        self, logits: torch.Tensor, decision_bias: float | None = None, decision_slope: float | None = None
    ) -> torch.Tensor:
        """Probability of roadwork: [B, 2] to [B]; 0.5 is the best cut once `export` has set bias and slope.

        Args:
            logits: Logits of none and roadwork.
            decision_bias: Used instead of the model's own.
            decision_slope: Used instead of the model's own.
        """
        bias = self.config.decision_bias if decision_bias is None else decision_bias
        slope = self.config.decision_slope if decision_slope is None else decision_slope
        return (slope * (logits[..., 1].float() - logits[..., 0].float() - bias)).sigmoid()

    @staticmethod
    def log_odds(output: RoadworkOutput) -> torch.Tensor:
        """Log-odds of roadwork, before any bias: [B], in float32."""
        assert output.logits is not None
        return output.logits[:, 1].float() - output.logits[:, 0].float()
