"""Component 12: the loss, term by term and sample by sample.

Every term is a value per sample, zero where the sample has no target for it. Sums are divided by the number of samples
with that target, counted over all ranks and micro-batches of an optimizer step, so that neither accumulation nor world
size changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from pipeline.devices import upload
from pipeline.model.config import TERMS, LossConfig
from pipeline.model.evidence import as_logits, evidence_mask_loss
from pipeline.model.mixup import Mix
from pipeline.model.moe import at_least_float32, balance_loss, z_loss
from pipeline.model.output import RoadworkOutput

TARGET_OF = {
    "roadwork": "has_label", "weather": "has_weather", "segmentation": "has_mask", "evidence": "has_label",
    "evidence_masks": "has_mask",
}  # fmt: skip
DICE_SMOOTHING = 1.0  # in cells; gives a class that is nowhere in the photo a loss and a gradient too


@dataclass
class Targets:
    """The targets of a batch."""

    labels: torch.Tensor
    """Labels, int64 [B]: 1 roadwork, 0 none, -1 unknown."""
    weather: torch.Tensor
    """Weather words, float [B, 8], multi-hot; a row of NaN where unknown."""
    masks: torch.Tensor
    """Share of each cell's area that each class covers, float [B, 6, m, m]; all NaN where unknown."""

    @classmethod
    def from_batch(cls, batch: Mapping[str, torch.Tensor]) -> Targets:
        """The targets in a batch."""
        return cls(batch["labels"], batch["weather"], batch["mask_targets"])

    def to(self, device: torch.device) -> Targets:
        """The same targets on a device."""
        return Targets(upload(self.labels, device), upload(self.weather, device), upload(self.masks, device))

    @property
    def has_label(self) -> torch.Tensor:
        """Which samples have a label: bool [B]."""
        return self.labels >= 0

    @property
    def has_weather(self) -> torch.Tensor:
        """Which samples have a weather word: bool [B]. (NaN compares as False.)"""
        return self.weather.sum(dim=-1) > 0

    @property
    def has_mask(self) -> torch.Tensor:
        """Which samples have a mask: bool [B]."""
        return ~self.masks.flatten(1).isnan().any(dim=1)

    def known(self, term: str) -> torch.Tensor:
        """Which samples contribute to a loss term: bool [B]. Terms that need no target count every sample."""
        name = TARGET_OF.get(term)
        return torch.ones_like(self.labels, dtype=torch.bool) if name is None else getattr(self, name)

    def of(self, photos: torch.Tensor) -> Targets:
        """The targets of int64 [b] photos of the batch."""
        return Targets(self.labels[photos], self.weather[photos], self.masks[photos])


def count_targets(targets: Targets) -> torch.Tensor:
    """How many samples of a batch contribute to each term: float32 [len(TERMS)], in the order of `TERMS`.

    Distillation counts every sample too, although it is zero in batches whose views were pruned: the count must be
    known before the forward pass.
    """
    return torch.stack([targets.known(term).sum() for term in TERMS]).float()


def loss_terms(
    output: RoadworkOutput, targets: Targets, config: LossConfig, experts_per_token: int, mix: Mix | None = None
) -> dict[str, torch.Tensor]:
    """Every loss term that the model's output allows.

    Args:
        output: The model's output; a term whose part is None is left out. With several heads, their terms' means.
        targets: The batch's targets.
        config: The shape of the focal loss.
        experts_per_token: The router's k, for the load balancing.
        mix: How the photos were mixed; the targets are those of each photo before mixing.

    Returns:
        A value per sample, [B], by term, unweighted; in float32, or float64 where the output is float64.
    """
    if output.members:
        every = [loss_terms(member, targets, config, experts_per_token, mix) for member in output.members]
        return {term: torch.stack([terms[term] for terms in every]).mean(dim=0) for term in every[0]}
    # A loss on the joined answer would let the evidence, which learns first, keep the trunk from learning.
    logits, weather_logits, evidence = output.trunk_logits, output.weather_logits, output.evidence_logits
    assert logits is not None
    terms = {"roadwork": mixed(lambda of: focal_loss(logits, of.labels, config), targets, mix)}
    if output.view_logits is not None and output.view_mask is not None:
        terms["consistency"] = view_disagreement(output.view_logits, output.view_mask)
    if weather_logits is not None:
        terms["weather"] = mixed(lambda of: weather_loss(weather_logits, of), targets, mix)
    whole, share = (targets, 1.0) if mix is None else mixed_masks(targets, mix)
    if output.mask_logits is not None:
        terms["segmentation"] = share * segmentation_loss(output.mask_logits, whole)
    if evidence is not None:
        terms["evidence"] = mixed(lambda of: focal_loss(as_logits(evidence), of.labels, config), targets, mix)
    if output.evidence_map is not None:
        known = whole.masks.masked_fill(~whole.has_mask[:, None, None, None], 0.0)
        terms["evidence_masks"] = share * evidence_mask_loss(output, known) * whole.has_mask
    if output.router_logits is not None and output.token_mask is not None:
        mask = output.token_mask
        balance = [balance_loss(logits, mask, experts_per_token) for logits in output.router_logits]
        terms["balance"] = torch.stack(balance).mean(dim=0)
        terms["router_z"] = torch.stack([z_loss(logits, mask) for logits in output.router_logits]).mean(dim=0)
    if output.view_scores is not None and output.view_importance is not None and output.view_mask is not None:
        terms["distillation"] = (
            importance_divergence(output.view_scores, output.view_importance, output.view_mask)
            if output.kept_all
            else torch.zeros_like(terms["roadwork"])
        )
    return terms


def mixed(loss: Callable[[Targets], torch.Tensor], targets: Targets, mix: Mix | None) -> torch.Tensor:
    """A loss of mixed photos that is linear in its targets: the same mix of the losses for both photos' targets.

    If one photo of a pair lacks a target, its share drops out. The shares of each target add up to 1 over the two
    photos that have it, so `count_targets` need not know which photos are mixed.

    Args:
        loss: Gives values per photo, [B], for given targets, zero where there is none.
        targets: The photos' targets before mixing.
        mix: How the photos were mixed; None for not at all.
    """
    if mix is None:
        return loss(targets)
    share = mix.share.to(targets.labels.device)
    return share * loss(targets) + (1 - share) * loss(targets.of(mix.partner))


def mixed_masks(targets: Targets, mix: Mix) -> tuple[Targets, torch.Tensor]:
    """Masks of mixed photos, and the weight of each: Dice is not linear, so masks are mixed instead of losses.

    Returns:
        The targets with masks mixed by the shares, or with the one mask of a pair, and [B] the sum of the shares of the
        photos that have a mask.
    """
    partner = targets.of(mix.partner)
    own, other = mix.share * targets.has_mask, (1 - mix.share) * partner.has_mask
    weight = own + other
    own, other = (part / weight.clamp(min=torch.finfo(weight.dtype).tiny) for part in (own, other))
    parts = [part[:, None, None, None] * of.masks.nan_to_num(0.0) for part, of in ((own, targets), (other, partner))]
    masks = parts[0] + parts[1]
    masks = torch.where((weight > 0)[:, None, None, None], masks, torch.nan)
    return replace(targets, masks=masks), weight


def combine(terms: dict[str, torch.Tensor], counts: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """The loss: the weighted sum over terms of sum / count.

    Args:
        terms: Values from `loss_terms`.
        counts: Counts from `count_targets`, summed over the ranks and micro-batches of the optimizer step. Gradients
            must be summed over these too; where they are averaged, the caller multiplies by the number averaged over.
        config: The weights.

    Returns:
        A scalar.
    """
    counts = counts.clamp(min=1)
    parts = [getattr(config, term) * terms[term].sum() / counts[TERMS.index(term)] for term in terms]
    return torch.stack(parts).sum()


def focal_loss(logits: torch.Tensor, labels: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Focal loss with smoothed labels: -sum_c q_c alpha_c (1 - p_c)^gamma log p_c, over a softmax of two.

    q is the one-hot label times (1 - smoothing), plus smoothing / 2; alpha is `focal_alpha` for roadwork and
    1 - `focal_alpha` for none. Without smoothing it is RetinaNet's (Lin et al. 2017, arXiv 1708.02002, eq. 5) with the
    difference of the two logits as its single logit. RetinaNet divides by the number of positives, this loss by that of
    all labelled samples.

    Args:
        logits: [B, 2].
        labels: int64 [B], -1 where unknown.
        config: alpha, gamma and smoothing.

    Returns:
        [B].
    """
    log_p = at_least_float32(logits).log_softmax(dim=-1)
    label = labels.clamp(min=0).to(log_p.dtype)
    q_roadwork = label * (1 - config.label_smoothing) + config.label_smoothing / 2
    alpha = config.focal_alpha
    weights = torch.stack([(1 - q_roadwork) * (1 - alpha), q_roadwork * alpha], dim=-1)
    # 1 - p_c is the other class's p; as a power of exp(log p) its gradient is finite for every gamma.
    modulation = (config.focal_gamma * log_p.flip(-1)).exp()
    return -(weights * modulation * log_p).sum(dim=-1) * (labels >= 0)


def view_disagreement(view_logits: torch.Tensor, view_mask: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of the views' predictions: their mean KL divergence from the mean prediction.

    Args:
        view_logits: [B, K, 2].
        view_mask: bool [B, K], at least one True in every row.

    Returns:
        [B] in nats: 0 where all agree or there is one view, and log 2 at most.
    """
    log_p = at_least_float32(view_logits).log_softmax(dim=-1)
    share = view_mask.to(log_p.dtype)
    share = share / share.sum(dim=1, keepdim=True)
    # In logarithms throughout: the log of an underflowed probability would be infinite.
    log_mean = (log_p + share.log()[..., None]).logsumexp(dim=1, keepdim=True)
    divergence = (log_p.exp() * (log_p - log_mean)).sum(dim=-1)
    return (share * divergence).sum(dim=1)


def weather_loss(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Cross entropy to the photo's weather words, which share the probability evenly: [B, 8] to [B]."""
    log_p = at_least_float32(logits).log_softmax(dim=-1)
    # Zeroed before any computation, because 0 * NaN would be NaN.
    words = targets.weather.masked_fill(~targets.has_weather[:, None], 0.0).to(log_p.dtype)
    return -(F.normalize(words, p=1.0, dim=-1) * log_p).sum(dim=-1)


def segmentation_loss(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Soft Dice loss + binary cross entropy, per image and class, averaged over the classes.

    Dice is 1 - (2 sum pt + s) / (sum p^2 + sum t^2 + s) (V-Net, arXiv 1606.04797). The squares matter: a cell may be
    covered in part, and with plain sums the best answer to t = 0.5 would be p = 1.

    Args:
        logits: [B, 6, m, m].
        targets: Targets with `masks` of the same shape.

    Returns:
        [B].
    """
    logits = at_least_float32(logits).flatten(2)
    present = targets.has_mask
    cover = targets.masks.masked_fill(~present[:, None, None, None], 0.0).to(logits.dtype).flatten(2)
    p = logits.sigmoid()
    overlap = 2 * (p * cover).sum(dim=-1) + DICE_SMOOTHING
    dice = 1 - overlap / (p.square().sum(dim=-1) + cover.square().sum(dim=-1) + DICE_SMOOTHING)
    entropy = F.binary_cross_entropy_with_logits(logits, cover, reduction="none").mean(dim=-1)
    return (dice + entropy).mean(dim=1) * present


def importance_divergence(scores: torch.Tensor, importance: torch.Tensor, view_mask: torch.Tensor) -> torch.Tensor:
    """KL divergence of the pruner's softmax over the existing views from the fusion's importance.

    The importance is taken as given: it gets no gradient.

    Args:
        scores: [B, V].
        importance: [B, V], 0 or more, zero for views that do not exist.
        view_mask: bool [B, V].

    Returns:
        [B] in nats.
    """
    absent = ~view_mask
    log_q = at_least_float32(scores).masked_fill(absent, -torch.inf).log_softmax(dim=-1)
    log_q = log_q.masked_fill(absent, 0.0)  # their importance is 0, and 0 * inf would be NaN
    target = F.normalize(importance.detach().to(log_q.dtype), p=1.0, dim=-1)
    return (torch.xlogy(target, target) - target * log_q).sum(dim=-1)
