"""The arms of a study: `complete`, and arms that differ from it in one thing each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import UserError
from pipeline.model.config import LossConfig, ModelConfig
from pipeline.optim.config import OPTIMIZERS

COMPLETE = "complete"
Changes = Callable[[ModelConfig], dict[str, Any]]


def nothing(base: ModelConfig) -> dict[str, Any]:
    """No change of the model."""
    return {}


@dataclass(frozen=True)
class Arm:
    """One variant of model or training, which is trained and tested."""

    name: str
    group: str
    title: str
    """Name of the arm in tables."""
    about: str
    """What differs from `complete`, in a sentence."""
    changes: Changes = nothing
    """What differs in the model."""
    loss: tuple[tuple[str, float], ...] = ()
    """Weights of loss terms that differ, by term."""
    optimizer: str = "adamw"
    sampling: str = "gps"
    """See `benchmarks.study.sampling`."""
    seen_places: bool = False
    """Train on other photos of the places that are tested."""
    train_share: float = 1.0
    """Share of the training photos."""
    with_metadata: bool = False
    """Whether tested photos keep their metadata; it is NULL otherwise."""

    def model_of(self, base: ModelConfig) -> ModelConfig:
        """The arm's model."""
        return replace(base, **self.changes(base))

    def loss_of(self, base: LossConfig) -> LossConfig:
        """The arm's loss."""
        return replace(base, **dict(self.loss))


def dense(base: ModelConfig) -> dict[str, Any]:
    """One SwiGLU as wide as all the experts that a token is sent to."""
    width = base.expert_width * base.experts_per_token
    return {"experts": 1, "experts_per_token": 1, "expert_width": width}


def fixed(**changes: Any) -> Changes:
    """A change of the model that does not depend on the base model."""
    return lambda base: changes


ARMS = (
    Arm(COMPLETE, "complete", "complete model", "all components, views chosen by their scores, GPS-weighted sampling"),
    Arm("single_view", "heads", "single view + linear",
        "the global view alone and a linear classifier", fixed(head="single_view")),
    Arm("mean_pool", "heads", "mean-pool + MLP",
        "the mean over all twelve views and a two-layer perceptron", fixed(head="mean_pool")),
    Arm("attention_mil", "heads", "attention MIL",
        "attention pooling over all twelve views (Ilse 2018)", fixed(head="attention_mil")),
    Arm("cell_mil", "heads", "cell MIL",
        "each cell of all twelve views by itself, and the sum of their odds; it learns from labels and masks",
        fixed(head="cell_mil")),
    Arm("no_evidence", "components", "no cell evidence", "the trunk's answer alone", fixed(evidence=False)),
    Arm("random_views", "components", "random views",
        "as many views as `complete` keeps, the global one and random others", fixed(pruning="random")),
    Arm("all_views", "components", "all twelve views", "nothing is pruned", fixed(pruning="off")),
    Arm("no_pyramid", "components", "no pyramid", "cells are not fused with coarser levels", fixed(pyramid=False)),
    Arm("no_gate", "components", "no attention gate", "plain attention", fixed(attention_gate=False)),
    Arm("dense", "components", "dense FFN", "one SwiGLU of the same active width instead of the experts", dense),
    Arm("mean_fusion", "components", "mean fusion",
        "the mean of the kept views' vectors under the pruner's gates, whose weights no other gate decides",
        fixed(fusion="mean")),
    Arm("no_consistency", "losses", "no consistency loss",
        "disagreement among views costs nothing; `complete` has it at the recipe's weight",
        loss=(("consistency", 0.0),)),
    Arm("no_segmentation", "losses", "no segmentation loss",
        "no masks are learnt from", loss=(("segmentation", 0.0),)),
    Arm("no_weather", "losses", "no weather loss",
        "no weather is learnt from; `complete` does at the recipe's weight", loss=(("weather", 0.0),)),
    Arm("cross_entropy", "losses", "cross-entropy",
        "gamma 0 and alpha 1/2, which turn the focal loss into half of a cross-entropy, larger beside the other terms",
        loss=(("focal_gamma", 0.0), ("focal_alpha", 0.5))),
    Arm("uniform", "sampling", "uniform sampling", "all training photos are equally likely", sampling="uniform"),
    Arm("class_balanced", "sampling", "class-balanced sampling",
        "both classes are as likely, wherever their photos are", sampling="class_balanced"),
    Arm("gps_permuted", "sampling", "permuted GPS weights",
        "the clusters' weights, given to the wrong clusters", sampling="gps_permuted"),
    Arm("random_clusters", "sampling", "random clusters",
        "the weights of clusters of the same sizes that mean nothing", sampling="random_clusters"),
    Arm("metadata_given", "metadata", "metadata given at test",
        "the same trained heads, which now may read the metadata", with_metadata=True),
    Arm("no_metadata", "metadata", "metadata never in training", "the head has no metadata", fixed(metadata=())),
    Arm("seen_places", "data", "random split",
        "as with a split at random, training has other photos of the tested places: as many in all, half of the tested "
        "places' photos among them; the other half is tested, near-duplicates still apart", seen_places=True),
    Arm("half_data", "data", "half of the photos", "trained on half of the photos, as many steps", train_share=0.5),
    *(Arm(name, "optimizers", name, f"trained with {name} instead of AdamW", optimizer=name)
      for name in OPTIMIZERS if name != "adamw"),
)  # fmt: skip


def select_arms(names: list[str]) -> tuple[Arm, ...]:
    """Arms by their names or their groups', in the order of `ARMS`; `complete` is always there.

    Raises:
        UserError: A name is unknown.
    """
    groups = {arm.group for arm in ARMS}
    known = {arm.name for arm in ARMS} | groups | {"all"}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"plan.arms names {unknown[0]!r}, but must be among {', '.join(sorted(known))}")
    wanted = {COMPLETE, *names}
    return tuple(arm for arm in ARMS if "all" in wanted or {arm.name, arm.group} & wanted)
