"""Fit pruning to a validation split: when an answer is certain enough, and which views are best for all photos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch.utils.data import DataLoader, Subset

from pipeline.data.batch import Batch, batches_of
from pipeline.data.feature_dataset import open_split
from pipeline.data.index import Index
from pipeline.devices import upload
from pipeline.errors import UserError
from pipeline.evaluation.calibration import best_cut, check_finite
from pipeline.evaluation.metrics import TIE, confusion_counts, has_both, mcc_of
from pipeline.evaluation.scoring import find_cache
from pipeline.model.encoder import CachedTokens, Tokens, TokenSource
from pipeline.model.pruning import StoppingRule, rank_views, rounds_up_to
from pipeline.model.roadwork import RoadworkModel
from pipeline.progress import say, track

CHANCE_STEP = 1.5
MOST_FOR_ORDER = 512  # photos whose tokens are held at once to find the order of `fixed`
PRIOR_LOG_SLOPE, PRIOR_VARIANCE = 1.0, 10.0  # worth less than one photo


Loader = DataLoader[Batch]


@dataclass(frozen=True)
class Photos:
    """B photos on the model's device."""

    source: TokenSource
    """Where the photos' tokens are read."""
    boxes: torch.Tensor
    """Boxes of the views as x0, y0, x1, y1 in [0, 1], [B, V, 4]."""
    view_mask: torch.Tensor
    """Which views exist, bool [B, V]."""


@dataclass(frozen=True)
class RoundAnswers:
    """A model's answers after each round of views, for N labelled photos."""

    labels: np.ndarray
    """0 or 1, [N]."""
    log_odds: np.ndarray
    """Log-odds of roadwork, [N, R]; the last round has all the views that the model may keep."""
    views: np.ndarray
    """Number of views that each answer rests on, [N, R]; no more than the photo has."""

    def stopped(self, rule: StoppingRule) -> tuple[np.ndarray, np.ndarray]:
        """The answers under a rule: log-odds [N] and views [N]."""
        above = self.log_odds[:, :-1] - rule.cut
        stop = (above >= rule.margins_roadwork) | (-above >= rule.margins_none)
        rounds = np.where(stop.any(axis=1), stop.argmax(axis=1), stop.shape[1])
        rows = np.arange(len(rounds))
        return self.log_odds[rows, rounds], self.views[rows, rounds]

    def mcc(self, log_odds: np.ndarray, cut: float) -> float:
        """Matthews correlation of answers with log-odds [N], above `cut` for roadwork."""
        return float(mcc_of(*confusion_counts(self.labels, log_odds, cut).sum(axis=0)))


def answer_rounds(
    model: RoadworkModel, photos: Photos, order: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A model's answers after each round of the mode `dynamic`, as if it never stopped early.

    Args:
        model: A model with the head `roadwork`.
        photos: B photos.
        order: int64 [B, V], views in the order in which they are taken; by default by their scores.

    Returns:
        `log_odds` and `views` of `RoundAnswers`.
    """
    if order is None:
        scores = model.encoder.score(photos.source)
        assert scores is not None
        order = rank_views(scores, photos.view_mask, "scored", explore=False)
    rounds = rounds_up_to(model.config.keep_views)
    answers = [answer_from(model, photos, order[:, :keep]) for keep in rounds]
    existing = photos.view_mask.sum(dim=1, keepdim=True).cpu().numpy()
    return np.stack(answers, axis=1), np.minimum(existing, rounds)


def answer_from(model: RoadworkModel, photos: Photos, views: torch.Tensor) -> np.ndarray:
    """Log-odds of roadwork [B] with metadata NULL, from the views int64 [B, K], the global one among them."""
    views = views.sort(dim=1).values
    scores = model.encoder.score(photos.source)
    mask = photos.view_mask.gather(1, views)
    encoded = model.encoder.gather(photos.source, photos.boxes, scores, views, mask)
    return model.log_odds(model.answer(encoded, null_metadata=True)).double().cpu().numpy()


def fit_rule(answers: RoundAnswers, cut: float, max_loss: float) -> StoppingRule:
    """The rule that stops a photo once more views would hardly change its answer.

    With balanced classes, a share x of answers that turn wrong costs 2x of MCC. So a photo may stop where the chance
    that its answer still changes is `max_loss` / 2; most that stop are far surer than that, and some changes are for
    the better. If this still costs more on the photos at hand, as it may with rare classes, the chance is lowered until
    it does not.

    Args:
        answers: Answers on the validation split.
        cut: Log-odds at which the answer changes.
        max_loss: Largest loss of MCC against the last round, above 0; 0.002 is 0.2 points. Less than one photo's worth
            cannot be measured, so the check allows at least that.
    """
    risks = Risks.fit(answers, cut)
    full = answers.mcc(answers.log_odds[:, -1], cut)
    most = max(max_loss, 2 / len(answers.labels))
    chance = max_loss / 2
    while True:
        rule = risks.rule(chance)
        if full - answers.mcc(answers.stopped(rule)[0], cut) <= most + TIE:
            return rule
        chance /= CHANCE_STEP


@dataclass(frozen=True)
class Risks:
    """The chance of a change on either side of the cut after each round but the last."""

    cut: float
    none: tuple[Risk, ...]
    roadwork: tuple[Risk, ...]

    @classmethod
    def fit(cls, answers: RoundAnswers, cut: float) -> Risks:
        """Fit the chances to the answers that changed between each round and the last."""
        above = answers.log_odds[:, :-1] - cut
        changes = (answers.log_odds[:, -1:] > cut) != (above > 0)
        none, roadwork = (
            tuple(
                Risk.fit(distance[distance >= 0], change[distance >= 0])
                for distance, change in zip(side.T, changes.T, strict=True)
            )
            for side in (-above, above)
        )
        return cls(cut, none, roadwork)

    def rule(self, chance: float) -> StoppingRule:
        """The rule that stops where the chance of a change is at most `chance`."""
        none, roadwork = ([risk.distance(chance) for risk in side] for side in (self.none, self.roadwork))
        return StoppingRule(self.cut, none, roadwork)


@dataclass(frozen=True)
class Risk:
    """Chance that an answer still changes: sigmoid(offset - slope * distance from the cut)."""

    offset: float
    slope: float
    """Per log-odd, above 0."""

    @classmethod
    def fit(cls, distances: np.ndarray, changes: np.ndarray) -> Risk:
        """Logistic regression with a weak prior, without which a round in which nothing changes would have no slope.

        Args:
            distances: [n], 0 or more.
            changes: bool [n].
        """

        def loss(parameters: np.ndarray) -> float:
            offset, log_slope = parameters
            logits = offset - np.exp(log_slope) * distances
            prior = (offset**2 + (log_slope - PRIOR_LOG_SLOPE) ** 2) / (2 * PRIOR_VARIANCE)
            return float(np.logaddexp(0, logits).sum() - logits[changes].sum() + prior)

        offset, log_slope = minimize(loss, (0.0, PRIOR_LOG_SLOPE), method="Nelder-Mead").x
        return cls(float(offset), float(np.exp(log_slope)))

    def distance(self, chance: float) -> float:
        """The distance from which on the chance of a change is at most `chance`."""
        return max(0.0, (self.offset + math.log((1 - chance) / chance)) / self.slope)


def best_order(answer: Callable[[Sequence[int]], np.ndarray], labels: np.ndarray, views: int) -> list[int]:
    """The order of the views that is best for all photos together, by greedy choice.

    Args:
        answer: Gives log-odds [N] from the given views.
        labels: 0 or 1, [N].
        views: How many views there are, the global one (0) among them.

    Returns:
        The views from 1 on. Each gives the lowest cross entropy together with view 0 and those before it.
    """
    sign = 1 - 2 * np.asarray(labels)
    order: list[int] = []
    while len(order) < views - 1:
        left = [view for view in range(1, views) if view not in order]
        losses = [np.logaddexp(0, sign * answer([0, *order, view])).mean() for view in left]
        order.append(left[int(np.argmin(losses))])
    return order


def open_validation(
    model: RoadworkModel, index: Index, shards: str, given: str | None, features: str, batch_size: int, workers: int
) -> Loader:
    """The labelled photos of the validation split.

    Args:
        model: The model that will answer.
        index: The index of the shards, or of a fold of theirs.
        shards: Folder or URL of the shards.
        given: See `find_cache`.
        features: See `find_cache`.
        batch_size: Photos in one forward pass.
        workers: Processes that read; 0 reads in this one.

    Raises:
        UserError: The photos are not of both classes.
    """
    labels = index.split("val").labels
    if not has_both(labels):
        raise UserError(
            f"the validation split of {shards} does not have labels of both classes; name other shards with --shards"
        )
    cache = find_cache(given, features, index, model)
    dataset = open_split(shards, index, "val", model.config.input_spec, cache)
    labelled = Subset(dataset, np.flatnonzero(labels >= 0).tolist())
    return batches_of(labelled, batch_size, workers)


@torch.inference_mode()
def fit_dynamic(model: RoadworkModel, loader: Loader, max_loss: float) -> dict[str, Any]:
    """Set the model's stopping rule; returns it with its effect on the photos that it was fitted to."""
    parts = [(labels, *answer_rounds(model, photos)) for photos, labels in opened(model, loader, "answering")]
    answers = RoundAnswers(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    names = [f"number {number + 1}" for number in range(len(answers.labels))]
    check_finite(answers.log_odds.sum(axis=1), names, "the model, on the labelled photos of the split 'val',")
    cut = best_cut(answers.labels, answers.log_odds[:, -1])
    rule = fit_rule(answers, cut, max_loss)
    model.config.stopping = asdict(rule)
    log_odds, views = answers.stopped(rule)
    before, after = (answers.mcc(values, cut) for values in (answers.log_odds[:, -1], log_odds))
    of = model.config.input_spec.num_views
    say(
        f"{views.mean():.2f} of {of} views on average, and MCC {after:.3f} against {before:.3f} "
        f"with {model.config.keep_views} views of every photo, both on the {len(views)} validation photos that the "
        "rule was fitted to"
    )
    return {
        "max_loss": max_loss, "stopping": asdict(rule), "n": len(views), "views": float(views.mean()),
        "mcc": after, "mcc_without": before,
    }  # fmt: skip


@torch.inference_mode()
def fit_fixed(model: RoadworkModel, loader: Loader) -> dict[str, Any]:
    """Set the order of the mode `fixed`; returns it."""
    held: list[tuple[torch.Tensor, ...]] = []
    known: list[np.ndarray] = []
    for photos, labels in opened(model, loader, "encoding"):
        photos.source.take(photos.view_mask)
        held.append((*photos.source.tokens, photos.boxes, photos.view_mask))
        known.append(labels)
        if sum(map(len, known)) >= MOST_FOR_ORDER:
            break
    *tokens, boxes, view_mask = (torch.cat(part) for part in zip(*held, strict=True))
    photos, labels = Photos(CachedTokens(Tokens(*tokens)), boxes, view_mask), np.concatenate(known)

    def answer(views: Sequence[int]) -> np.ndarray:
        return answer_from(model, photos, torch.tensor(views, device=boxes.device).expand(len(boxes), -1))

    order = best_order(answer, labels, view_mask.shape[1])
    model.config.fixed_views = order
    say(f"the best views for all: 0, {', '.join(map(str, order))} (validation, n={len(labels)})")
    return {"fixed_views": order, "n": len(labels)}


def opened(model: RoadworkModel, loader: Loader, what: str) -> Iterator[tuple[Photos, np.ndarray]]:
    """The batches of a loader on the model's device, with their labels."""
    for batch in track(loader, len(loader), what, unit="batches"):
        boxes, view_mask = (upload(batch[name], model.device) for name in ("boxes", "view_mask"))
        yield Photos(model.source(batch), boxes, view_mask), batch["labels"].numpy()
