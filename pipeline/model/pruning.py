"""Component 3: view pruning, decided from the global view alone before the backbone sees the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.devices import upload

# Views seen after each round of the mode `dynamic`. Early rounds add one view, while many photos are decided; later
# rounds add two, since each costs a pass of the head and few photos are left to fill the backbone's batch.
ROUNDS = (1, 2, 3, 4, 5, 6, 7, 8, 10)


class ViewPruner(nn.Module):
    """Scores views by the global view's tokens under them, so that only the best are kept.

    score s_v = MLP([LayerNorm(region_v); LayerNorm(global CLS); view embedding]).
    """

    def __init__(self, dim: int, views: int, width: int = 128, embedding: int = 32):
        super().__init__()
        self.region_norm = nn.LayerNorm(dim)
        self.cls_norm = nn.LayerNorm(dim)
        self.view_embedding = nn.Embedding(views, embedding)
        self.mlp = nn.Sequential(nn.Linear(2 * dim + embedding, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, regions: torch.Tensor, global_cls: torch.Tensor) -> torch.Tensor:
        """Score every view.

        Args:
            regions: [B, V, D], means of the global view's patch tokens under each view's box.
            global_cls: [B, D].

        Returns:
            Scores [B, V].
        """
        batch, views, _ = regions.shape
        parts = [
            self.region_norm(regions),
            self.cls_norm(global_cls)[:, None].expand(-1, views, -1),
            self.view_embedding.weight[:views].expand(batch, -1, -1),
        ]
        scores: torch.Tensor = self.mlp(torch.cat(parts, dim=-1)).squeeze(-1)
        return scores


class MeanPruner(nn.Module):
    """The mean score of several pruners, for a model that is merged from several trained ones."""

    def __init__(self, pruners: Sequence[nn.Module]):
        super().__init__()
        self.pruners = nn.ModuleList(pruners)

    def forward(self, regions: torch.Tensor, global_cls: torch.Tensor) -> torch.Tensor:
        """Scores [B, V]; see `ViewPruner.forward`."""
        return torch.stack([pruner(regions, global_cls) for pruner in self.pruners]).mean(dim=0)


@torch.no_grad()
def choose_views(
    scores: torch.Tensor,
    view_mask: torch.Tensor,
    keep: int,
    mode: str,
    explore: bool,
    fixed_views: Sequence[int] = (),
) -> torch.Tensor:
    """Indices of the kept views, the global view (0) first, the others in their own order.

    Args:
        scores: [B, V], the pruner's or any other ranking of the views.
        view_mask: bool [B, V], False for views that do not exist.
        keep: Views to keep, K.
        mode: `random` and `fixed` are controls that ignore the scores; `off` keeps all V; any other uses the scores.
        explore: Add Gumbel noise to the scores, which samples without replacement in proportion to exp(score)
            (Kool et al. 2019, arXiv 1903.06059); for training only.
        fixed_views: The order of the mode `fixed`, the best view first; views that it lacks come last.

    Returns:
        int64 [B, K].
    """
    batch, views = scores.shape
    if mode == "off" or keep >= views:
        return torch.arange(views, device=scores.device).expand(batch, -1)
    kept = rank_views(scores, view_mask, mode, explore, fixed_views)[:, :keep]
    return kept.sort(dim=1).values


@torch.no_grad()
def rank_views(
    scores: torch.Tensor, view_mask: torch.Tensor, mode: str, explore: bool, fixed_views: Sequence[int] = ()
) -> torch.Tensor:
    """All views in the order in which they are kept: the global one, then by rank, then those that do not exist.

    See `choose_views` for the arguments.

    Returns:
        int64 [B, V].
    """
    ranking = scores.float()
    if mode == "random":
        ranking = torch.zeros_like(ranking)
    elif mode == "fixed":
        places = torch.full(ranking.shape[1:], -float(ranking.shape[1]))
        places[list(fixed_views)] = -torch.arange(float(len(fixed_views)))
        ranking = upload(places, ranking.device).expand_as(ranking)
    if mode == "random" or (explore and mode != "fixed"):
        ranking = ranking - torch.empty_like(ranking).exponential_().log()
    ranking = ranking.masked_fill(~view_mask, -torch.inf)
    ranking[:, 0] = torch.inf
    return ranking.argsort(dim=1, descending=True, stable=True)


def draw_keep(most: int) -> int:
    """How many views a training step of the mode `dynamic` keeps: any of `ROUNDS` up to `most`, equally likely.

    A head that must answer from few views must be trained on few.
    """
    rounds = rounds_up_to(most)
    return rounds[int(torch.randint(len(rounds), ()))]


def rounds_up_to(most: int) -> tuple[int, ...]:
    """The rounds that keep fewer views than `most`, and `most` itself."""
    return (*(keep for keep in ROUNDS if keep < most), most)


@dataclass(frozen=True)
class StoppingRule:
    """When the mode `dynamic` takes no more views: the answer is far enough from the cut.

    How far depends on the round and on the side: one view can show that there is roadwork, but almost all are needed to
    see that there is none.
    """

    cut: float
    """Log-odds of roadwork at which the answer changes."""
    margins_none: Sequence[float]
    """Distance below the cut, in log-odds, from which on *none* is certain, for each round but the last."""
    margins_roadwork: Sequence[float]
    """Distance above the cut, in log-odds, from which on *roadwork* is certain, for each round but the last."""

    def certain(self, log_odds: torch.Tensor, number: int) -> torch.Tensor:
        """Whether to stop after round `number`, counted from 0: bool, in the shape of the log-odds."""
        above = log_odds - self.cut
        return (above >= self.margins_roadwork[number]) | (-above >= self.margins_none[number])
